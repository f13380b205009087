"""The networks of an earlier run, rebuilt from its folder: its teacher, and its student with the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger
from torch import nn

from qdm_lightning.metrics.weights import file_hash, state_hash
from qdm_lightning.models.pretrained import load_unet
from qdm_lightning.quantization import kernels
from qdm_lightning.training.denoiser import Denoiser
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.files import load_checkpoint
from qdm_lightning.training.spec import TrainerConfig
from qdm_lightning.training.student import calibrate_student, prepare_student

PREFIXES = {"ema": "ema.module.unet.", "raw": "student.unet."}
"""Where a checkpoint keeps the student's averaged weights, and those of the optimizer."""


@dataclass(frozen=True)
class Restored:
    """A network in eval mode, frozen, and `origin`, a record of where its weights come from."""

    network: Denoiser
    origin: dict[str, Any]


def set_up(trainer: TrainerConfig) -> None:
    """Threads and compilation as a run's settings say; before any network runs."""
    if trainer.threads:
        torch.set_num_threads(trainer.threads)
    kernels.set_mode(trainer.compile)


def find_device(accelerator: str) -> torch.device:
    """The device that `accelerator` (`auto`, `cpu`, `gpu`, `cuda`, `mps`) means on this machine; it must have one."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def restore(experiment: Experiment, which: str, weights: str, checkpoint: str, device: torch.device, progress: Any) -> Restored:
    """`restore_teacher` or `restore_student`, by `which`."""
    if which == "teacher":
        if weights != "ema":
            raise ValueError("network=teacher keeps no raw weights, only its average: leave out weights=raw")
        return restore_teacher(experiment, device)
    return restore_student(experiment, device, weights=weights, checkpoint=checkpoint, progress=progress)


def restore_teacher(experiment: Experiment, device: torch.device) -> Restored:
    """The run's own copy of its teacher.

    Raises:
        FileNotFoundError: the run never got as far.
        ValueError: its files are damaged.
    """
    folder = experiment.run_dir / "teacher"
    unet = _teacher_unet(experiment)
    origin = {"file": "teacher", "weights": "ema", "sha256": state_hash(unet), "step": None}
    files = sorted((folder / "unet").glob("*.safetensors"))
    if len(files) == 1:
        origin |= {"file": files[0].relative_to(experiment.run_dir).as_posix(), "sha256": file_hash(files[0])}
    return Restored(_frozen(unet, device), origin)


def restore_student(
    experiment: Experiment, device: torch.device, *, weights: str = "ema", checkpoint: str = "best", progress: Any
) -> Restored:
    """The run's student.

    A run with `quant.mode=ptq` that left no checkpoint is calibrated again, which gives the same student.

    Args:
        experiment: of the run, from its own configuration.
        weights: `ema` or `raw`.
        checkpoint: `best`, `last`, or a file.
        progress: shows the calibration, where there is one.

    Raises:
        FileNotFoundError: no such checkpoint, or the run never got as far.
        ValueError: a full-precision run, which has no student, or a checkpoint that is damaged or another network's.
    """
    if experiment.quant.is_float:
        raise ValueError(f"{experiment.run_dir} trained at 32 bits: it has no student, type network=teacher")
    student, _ = prepare_student(_teacher_unet(experiment), experiment)
    student.to(memory_format=torch.channels_last)
    path = _checkpoint_file(experiment, checkpoint)
    if experiment.quant.mode == "ptq" and checkpoint == "best" and not path.is_file():
        experiment.data.setup()
        calibrate_student(student, experiment, progress)
        origin = {"file": None, "weights": "calibrated", "sha256": state_hash(student), "step": 0}
        return Restored(_frozen(student, device), origin)
    state = load_checkpoint(path)
    _fill(student, state.get("state_dict", {}), PREFIXES[weights], path)
    origin = {"file": _name(path, experiment.run_dir), "weights": weights, "sha256": file_hash(path)}
    return Restored(_frozen(student, device), origin | {"step": int(state["global_step"])})


def _teacher_unet(experiment: Experiment) -> nn.Module:
    folder = experiment.run_dir / "teacher"
    if not (folder / "unet").is_dir():
        raise FileNotFoundError(
            f"run={experiment.run_dir} has no teacher yet: train it to its end, python -m qdm_lightning.train run=..."
        )
    return load_unet(folder)


def _checkpoint_file(experiment: Experiment, checkpoint: str) -> Path:
    if checkpoint not in ("best", "last"):
        return Path(checkpoint).expanduser().resolve()
    path = experiment.run_dir / "checkpoints" / f"{checkpoint}.ckpt"
    if not path.is_file() and experiment.quant.mode != "ptq":
        raise FileNotFoundError(
            f"{path} is not there: the run was ended before its first checkpoint, python -m qdm_lightning.train run=... goes on"
        )
    return path


def _fill(student: nn.Module, state: dict[str, Any], prefix: str, path: Path) -> None:
    """Load the tensors below `prefix`, which must be exactly the student's."""
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    own = student.state_dict()
    wrong = sorted(set(own) ^ set(given)) + sorted(n for n in set(own) & set(given) if own[n].shape != given[n].shape)
    if wrong:
        raise ValueError(f"{path} is no checkpoint of this student: {len(wrong)} tensors do not fit, such as {wrong[0]}")
    student.load_state_dict(given)


def _frozen(unet: nn.Module, device: torch.device) -> Denoiser:
    moved = unet.to(memory_format=torch.channels_last).to(device)
    return Denoiser(moved).requires_grad_(False).eval()


def _name(path: Path, run_dir: Path) -> str:
    return path.relative_to(run_dir).as_posix() if path.is_relative_to(run_dir) else str(path)


@contextmanager
def run_loggers(experiment: Experiment) -> Iterator[list[Any]]:
    """The loggers that the experiment names (its metrics.csv aside), finished after the block."""
    loggers: list[Any] = []
    try:
        tags = experiment.resolved.get("tags", ())
        for make in experiment.loggers:
            loggers.append(make(run_dir=experiment.run_dir, config=experiment.resolved, run_tags=tags))
        yield loggers
    finally:
        for logger in loggers:
            logger.finalize("finished")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()
