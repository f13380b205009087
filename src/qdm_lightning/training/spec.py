"""Settings of training: teacher, optimizer, trainer, paths. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from qdm_lightning.base.checks import at_least, between, folder, one_of, positive
from qdm_lightning.diffusion.spec import SEEDS
from qdm_lightning.runs.caches import DEFAULT

MOST_STEPS = 2**53
"""Steps and images are counted exactly, in floats too, up to here."""

MOST_THREADS = 1024
"""More threads than a machine has cores; OpenMP ends a process that cannot start its threads."""

SCHEDULES = ("cosine", "constant")
"""Courses of the learning rate after its warm-up."""


@dataclass(kw_only=True)
class LearningConfig:
    """What the trainings of teacher and student have in common.

    Args:
        lr: learning rate of weights, biases and norms.
        warmup_steps: linear warm-up before the schedule.
        schedule: course of the learning rate after the warm-up: `cosine` decay to zero at the last step, or `constant` (DDPM).
        gradient_clip: largest norm of the weights' gradient.
        ema_decay: EMA of the network, with warm-up.
    """

    lr: float = 1e-3
    warmup_steps: int = 50
    schedule: str = "cosine"
    gradient_clip: float = 1.0
    ema_decay: float = 0.995

    def check(self, group: str) -> None:
        """Raise ValueError at a value that is not allowed; `group` is the config group, which the message names."""
        positive(f"{group}.lr", self.lr)
        at_least(f"{group}.warmup_steps", self.warmup_steps, 0)
        one_of(f"{group}.schedule", self.schedule, SCHEDULES)
        positive(f"{group}.gradient_clip", self.gradient_clip)
        between(f"{group}.ema_decay", self.ema_decay, 0.0, 1.0)


TEACHER_OPTIMIZER = tuple(setting.name for setting in fields(LearningConfig))
"""Settings that the teacher's training shares with the student's optimizer."""


@dataclass(kw_only=True)
class TeacherConfig(LearningConfig):
    """Where the full-precision teacher comes from, and how `auto` trains it (config group `teacher`).

    Args:
        source: `auto` trains it once and caches it; `checkpoint` takes a run of ours; `pretrained` a diffusers folder.
        path: run folder or checkpoint file (`checkpoint`), or diffusers folder or hub id (`pretrained`).
        retrain: let `auto` train the teacher anew, although it is in the cache or came with the package.
        seed, max_steps, lr, warmup_steps, schedule, ema_decay, gradient_clip: settings of `auto`'s training, as in
            `OptimizerConfig`; a teacher is shared by the runs in which they are the same.
    """

    source: str = "auto"
    path: str | None = None
    retrain: bool = False
    seed: int = 0
    max_steps: int = 4000
    warmup_steps: int = 200
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        one_of("teacher.source", self.source, ("auto", "checkpoint", "pretrained"))
        if self.source == "auto" and self.path is not None:
            raise ValueError(
                f"teacher.path={self.path} needs teacher=checkpoint or teacher=pretrained: teacher=auto trains its own"
            )
        if self.source != "auto" and not self.path:
            raise ValueError(f"teacher={self.source} needs a path: type teacher.path=<folder>")
        between("teacher.seed", self.seed, 0, SEEDS - 1)
        between("teacher.max_steps", self.max_steps, 1, MOST_STEPS)
        self.check("teacher")


@dataclass(kw_only=True)
class OptimizerConfig(LearningConfig):
    """Adam for the student. Quantizer parameters form a group of their own.

    Args:
        lr: learning rate of weights, biases and norms.
        quantizer_lr: learning rate of log-scales and zero points.
        beta1, beta2: decay of Adam's first and second moment.
        warmup_steps: linear warm-up before the schedule.
        schedule: course of the learning rate after the warm-up: `cosine` decay to zero at the last step, or `constant` (DDPM).
        gradient_clip: largest norm of the weights' gradient.
        ema_decay: EMA of the student, with warm-up.
    """

    quantizer_lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        self.check("optimizer")
        positive("optimizer.quantizer_lr", self.quantizer_lr)
        between("optimizer.beta1", self.beta1, 0.0, 0.9999999)
        between("optimizer.beta2", self.beta2, 0.0, 0.9999999)


@dataclass(kw_only=True)
class TrainerConfig:
    """The training loop (config group `trainer`).

    Args:
        max_steps: optimizer steps of the student.
        val_every: steps between two measurements of `val/loss`, each with a checkpoint; the last step has one too.
        val_images: number of (x_0, t, eps) in the validation set, over which `val/loss` is the mean.
        overfit_images: train on so many images alone, which are also those held out (0: on all): a network must learn them.
        sample_every: steps between two sample grids and distances in training (0: only at the end).
        log_every: steps between two logged losses; also of what callbacks log by Lightning's `log`.
        accelerator, devices, num_nodes, strategy, precision: as in `lightning.Trainer`; devices are a number or `auto`, the
            strategy is `auto` or `ddp`.
        compile: `auto` compiles fake quantization where a compiler is at hand, `on` insists, `off` runs it eager.
        threads: CPU threads of torch (0: torch's own choice).
        histograms: patterns of quantizers, such as `*.query`, whose inputs W&B and TensorBoard get as histograms by timestep,
            once at the end.
        deterministic: only operations that give the same bits in each run on the same machine; an error where there is none.
        teacher_bf16: run the teacher in bfloat16 while the student trains: faster, its noise estimate less exact.
    """

    max_steps: int = 600
    val_every: int = 250
    val_images: int = 1024
    overfit_images: int = 0
    sample_every: int = 0
    log_every: int = 10
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    compile: str = "auto"
    threads: int = 0
    teacher_bf16: bool = False
    deterministic: bool = False
    histograms: list[str] = field(default_factory=lambda: ["*.query", "*.key", "*.value", "mid_block.*.conv1.*"])

    def __post_init__(self) -> None:
        for name in ("max_steps", "val_every", "val_images", "log_every", "num_nodes"):
            between(f"trainer.{name}", getattr(self, name), 1, MOST_STEPS)
        between("trainer.sample_every", self.sample_every, 0, MOST_STEPS)
        between("trainer.overfit_images", self.overfit_images, 0, MOST_STEPS)
        between("trainer.threads", self.threads, 0, MOST_THREADS)
        one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu", "cuda", "mps"))
        one_of("trainer.precision", self.precision, ("32-true", "bf16-mixed", "16-mixed"))
        one_of("trainer.strategy", self.strategy, ("auto", "ddp"))
        if isinstance(self.devices, str) and self.devices != "auto":
            if not self.devices.isdecimal():
                raise ValueError(
                    f"trainer.devices={self.devices} is not allowed: give their number, or auto, for example trainer.devices=2 "
                    "(CUDA_VISIBLE_DEVICES=0,1 before the command says which)"
                )
            self.devices = int(self.devices)
        if isinstance(self.devices, int):
            at_least("trainer.devices", self.devices, 1)
        one_of("trainer.compile", self.compile, ("auto", "on", "off"))


@dataclass(kw_only=True)
class PathsConfig:
    """Where things go: `output` for runs, `cache` for teachers and reference statistics."""

    output: str = "outputs"
    cache: str = DEFAULT

    def __post_init__(self) -> None:
        folder("paths.output", self.output)
        folder("paths.cache", self.cache)
