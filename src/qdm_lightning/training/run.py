"""One run from beginning to end: teacher, calibration, student, images, distances, files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdm_lightning.base.files import atomic_path, write_json
from qdm_lightning.base.ranks import rank
from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.display.image_grids import save_grid
from qdm_lightning.loggers import CSVMetrics, finish, named_loggers
from qdm_lightning.loggers.media import log_pictures
from qdm_lightning.metrics.frechet import features
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization import compiled
from qdm_lightning.quantization.cost import cost
from qdm_lightning.runs.provenance import git_commit, hardware, peak_memory, versions
from qdm_lightning.training.callbacks import LearnedScales, SampleDuringTraining, StageProgress
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.devices import measuring_device
from qdm_lightning.training.evaluation import Measurer, nem_error
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.publishing import log_layers, log_results
from qdm_lightning.training.student import calibrate_student, prepare_student
from qdm_lightning.training.student_files import save_student
from qdm_lightning.training.teacher import check_schedule, obtain_teacher
from qdm_lightning.training.teacher_images import teacher_images
from qdm_lightning.training.trainer import fit, last_checkpoint
from qdm_lightning.training.validation_set import ValidationSet

GRID_IMAGES = 16


@dataclass
class Result:
    """What `run` returns: `metrics` as in metrics.json, the run folder, and the networks that were measured."""

    metrics: dict[str, Any]
    run_dir: Path
    teacher: Denoiser
    student: Denoiser | None
    module: DiffusionModule | None


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - begin, 2)


def run(experiment: Experiment, progress: Any) -> Result:
    """Run the experiment and leave its files in `experiment.run_dir`; with `experiment.resume`, go on from its last checkpoint.

    Raises:
        FileNotFoundError, ValueError: data, teacher or settings that can't be used, before anything is trained.
    """
    if experiment.trainer.threads:
        torch.set_num_threads(experiment.trainer.threads)
    compiled.set_mode(experiment.trainer.compile)
    experiment.data.setup()
    check_schedule(experiment)
    features(experiment.feature_network, experiment.data.train_images[:1])  # it takes such images, or says so now
    validation_set = ValidationSet.from_images(
        experiment.data.val_images, experiment.diffusion.num_train_timesteps, experiment.trainer.val_images
    )
    checkpoint = last_checkpoint(experiment.run_dir / "checkpoints") if experiment.resume else None
    step = int(load_checkpoint(checkpoint)["global_step"]) if checkpoint else (0 if experiment.resume else None)
    loggers: list[Any] = [CSVMetrics(experiment.run_dir / "metrics.csv", step)]
    try:
        loggers += [] if rank() else named_loggers(experiment)
        return _stages(experiment, validation_set, progress, loggers)
    finally:
        finish(loggers)


def _stages(experiment: Experiment, validation_set: ValidationSet, progress: Any, loggers: list[Any]) -> Result:
    clock = _Clock()
    with clock("teacher"):
        unet, origin = obtain_teacher(experiment, validation_set, progress, loggers)
    teacher = Denoiser(unet.to(memory_format=torch.channels_last)).requires_grad_(False).eval()
    device = measuring_device(experiment.trainer.accelerator)
    experiment.feature_network.to(device)
    measurer = Measurer(experiment)
    metrics: dict[str, Any] = {"floor": measurer.floor(), "teacher": {}, "seconds": clock.seconds, "seed": experiment.seed}
    module, student = None, None
    if not experiment.quant.is_float:
        module, fitted = _train_student(experiment, unet, validation_set, measurer, progress, loggers, clock)
        student = module.ema_student
        save_student(student.unet, experiment, experiment.run_dir / "student")
        metrics["student"] = {"bits": [experiment.quant.weight_bits, experiment.quant.act_bits], **fitted}
        teacher = module.teacher or teacher
    if rank():  # the first rank alone measures
        return Result(metrics, experiment.run_dir, teacher, student, module)
    for network in (teacher, student):
        if network is not None:
            network.to(device)
    rows, labels = _measure(experiment, measurer, teacher, student, validation_set, metrics, progress, clock)
    metrics |= {
        "teacher_origin": origin,
        "num_samples": experiment.num_samples,
        "kernels": compiled.provenance(),
        "versions": versions(),
        "hardware": hardware(),
        "peak_memory_bytes": peak_memory(),
        "git": git_commit(),
    }
    picture = experiment.run_dir / "samples.png"
    save_grid(picture, rows, labels)
    write_json(experiment.run_dir / "metrics.json", metrics)
    log_results(loggers, experiment, metrics, picture, student, validation_set)
    return Result(metrics, experiment.run_dir, teacher, student, module)


def _train_student(
    experiment: Experiment,
    teacher: Any,
    validation_set: ValidationSet,
    measurer: Measurer,
    progress: Any,
    loggers: list[Any],
    clock: _Clock,
) -> tuple[DiffusionModule, dict[str, Any]]:
    """The trained module with its best checkpoint loaded, and what its training says."""
    folder = experiment.run_dir / "checkpoints"
    student, price = _prepare_student(experiment, teacher, progress, loggers)
    if last_checkpoint(folder) is None:
        with clock("calibration"):
            calibrate_student(student, experiment, progress)
    config = experiment.trainer
    module = DiffusionModule(
        student,
        teacher,
        diffusion=experiment.diffusion,
        nem=experiment.nem,
        optimizer=experiment.optimizer,
        max_steps=config.max_steps,
        seed=experiment.seed,
        flip=experiment.data.flip,
        teacher_bf16=config.teacher_bf16,
    )
    if experiment.quant.mode == "ptq":
        return module, {"steps": 0, "cost": price}
    callbacks = [LearnedScales(), *experiment.callbacks]
    if config.sample_every:
        callbacks.append(
            SampleDuringTraining(_measure_in_training(experiment, module, measurer, progress, loggers), config.sample_every)
        )
    with clock("student"), progress.stage("student", config.max_steps, "steps") as stage:
        fitted = fit(
            module,
            experiment.data,
            validation_set,
            config,
            folder=folder,
            max_steps=config.max_steps,
            seed=experiment.seed,
            loggers=loggers,
            callbacks=[StageProgress(stage), *callbacks],
        )
    return module, {**fitted, "cost": price}


def _prepare_student(experiment: Experiment, teacher: Any, progress: Any, loggers: list[Any]) -> tuple[Any, dict[str, Any]]:
    """The quantized U-Net, not calibrated, and its cost; says and keeps what got how many bits."""
    student, report = prepare_student(teacher, experiment)
    with atomic_path(experiment.run_dir / "quantization.txt") as beside:
        beside.write_text(report.table() + "\n", "utf-8")
    progress.say(report.summary())
    size = int(experiment.data.image_size or 0)
    student = student.to(measuring_device(experiment.trainer.accelerator)).to(memory_format=torch.channels_last)
    image, t = torch.zeros(1, experiment.data.channels, size, size), torch.zeros(1, dtype=torch.int64)
    price = cost(student, report, (image, t))
    log_layers(loggers, report, price)
    return student, price.totals()


def _measure_in_training(
    experiment: Experiment, module: DiffusionModule, measurer: Measurer, progress: Any, loggers: list[Any]
) -> Any:
    def measure(step: int) -> Mapping[str, float]:
        images = measurer.draw(module.ema_student, progress, f"sampling at step {step}")
        path = experiment.run_dir / "samples" / f"step_{step:07d}.png"
        save_grid(path, [to_uint8(images[:GRID_IMAGES])], [f"student, step {step}"])
        log_pictures(loggers, "samples/student", path, step)
        return {f"sampled/{key}": value for key, value in measurer.distance(images).items()}

    return measure


def _measure(
    experiment: Experiment,
    measurer: Measurer,
    teacher: Denoiser,
    student: Denoiser | None,
    validation_set: ValidationSet,
    metrics: dict[str, Any],
    progress: Any,
    clock: _Clock,
) -> tuple[list[Tensor], list[str]]:
    """Fill in the measurements; returns the rows and labels of the picture."""
    with clock("sampling_teacher"):
        wanted = teacher_images(measurer, teacher, progress)
    metrics["teacher"] |= measurer.distance(wanted)
    rows, labels = [to_uint8(wanted[:GRID_IMAGES])], ["teacher"]
    if student is not None:
        with clock("sampling_student"):
            drawn = measurer.draw(student, progress, "sampling (student)")
        device = next(student.parameters()).device
        metrics["student"] |= measurer.distance(drawn)
        metrics["student"]["image_mse"] = float((drawn.double() - wanted.double()).square().mean())
        metrics["student"]["nem_error"] = nem_error(student, teacher, validation_set, experiment, device)
        rows.append(to_uint8(drawn[:GRID_IMAGES]))
        labels.append(f"student W{experiment.quant.weight_bits}A{experiment.quant.act_bits}")
    return rows, labels
