"""One run from beginning to end: teacher, calibration, student, images, distances, files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn

from qdm_lightning.base.checks import writable
from qdm_lightning.base.files import write_json, write_whole
from qdm_lightning.base.ranks import rank
from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.diffusion.sampling import image_seeds
from qdm_lightning.display.image_grids import save_grid
from qdm_lightning.integer import provenance as integer_provenance
from qdm_lightning.integer import to_integer
from qdm_lightning.loggers import opened
from qdm_lightning.loggers.csv_metrics import CSVMetrics
from qdm_lightning.loggers.media import log_pictures
from qdm_lightning.metrics.few_images import distance_of_equals
from qdm_lightning.metrics.frechet import features, frechet_distance, frechet_key, halves_distance
from qdm_lightning.models.denoiser import Denoiser, denoiser
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.models.unet import example_inputs
from qdm_lightning.quantization import compiled
from qdm_lightning.quantization.cost import cost as count_cost
from qdm_lightning.runs.caches import mark_cache
from qdm_lightning.runs.folder import METRICS, check_there
from qdm_lightning.runs.provenance import git_commit, hardware, peak_memory, versions
from qdm_lightning.training.checkpoints import LAST
from qdm_lightning.training.devices import deterministic_or_one_line, measuring_device, set_up
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.plan import PlanOfRun
from qdm_lightning.training.propagation import propagation
from qdm_lightning.training.publishing import log_layers, log_results, log_scales
from qdm_lightning.training.restore import check_checkpoints
from qdm_lightning.training.resume import resume_point
from qdm_lightning.training.student import calibrate_student, prepare_student, student_settings
from qdm_lightning.training.student_files import save_student
from qdm_lightning.training.teacher import check_networks, check_schedule, obtain_teacher
from qdm_lightning.training.teacher_images import teacher_images
from qdm_lightning.training.trainer import fit
from qdm_lightning.training.validation_set import ValidationSet, nem_error

CHECKPOINTS = "checkpoints"
GRID_IMAGES = 16

UNMEASURED = "metrics=none: no distance is measured; metrics=inception, or another feature network, measures one"

FEWEST_IMAGES = 4
"""Training images: their distance is measured between two halves, each of which needs a covariance."""


@dataclass
class Result:
    """What `run` returns: `metrics` as in metrics.json, the run folder, and the networks that were measured."""

    metrics: dict[str, Any]
    run_dir: Path
    teacher: Denoiser
    student: Denoiser | None
    module: DiffusionModule | None


@deterministic_or_one_line()
def run(experiment: Experiment, progress: Any) -> Result:
    """Run the experiment and leave its files in `experiment.run_dir`; with `experiment.resume`, go on from its last checkpoint.

    Raises:
        FileNotFoundError, ValueError: data, teacher or settings that can't be used, before anything is trained.
    """
    set_up(experiment.trainer)
    experiment.load_data()
    train, val = len(experiment.data.train_images), len(experiment.data.val_images)
    if train < FEWEST_IMAGES:
        raise ValueError(
            f"the data hold {train + val} images, {train} to train on: at least 5 are needed, {FEWEST_IMAGES} to train on"
        )
    device = measuring_device(experiment.trainer.accelerator)
    if experiment.execution == "integer" and device.type != "cpu":
        raise ValueError(f"execution=integer runs on the CPU, not on {device.type}: type trainer.accelerator=cpu")
    check_schedule(experiment)
    check_networks(experiment)
    if experiment.feature_network is None:
        progress.say(UNMEASURED)
    else:
        features(experiment.feature_network, experiment.data.train_images[:1])  # it takes such images, or says so now
    writable("paths.cache", Path(experiment.paths.cache).expanduser())
    if experiment.resume:
        resume_point(experiment.run_dir / CHECKPOINTS)  # damaged checkpoints are told now
        check_checkpoints(experiment)
    csv = partial(CSVMetrics, experiment.run_dir / "metrics.csv", experiment.resume)
    with opened(
        [csv, *([] if rank() else experiment.loggers)], run_dir=experiment.run_dir, config=experiment.resolved
    ) as loggers:
        if not rank():
            experiment.keep_data()
            for cache in (experiment.paths.cache, experiment.resolved.get("data", {}).get("cache")):
                if cache:
                    mark_cache(cache)
        result = Run(experiment, progress, loggers).result()
    if not rank():
        check_there(experiment.run_dir)
        write_json(experiment.run_dir / METRICS, result.metrics)  # the last file: who finds it finds all others
    return result


class Run:
    """An experiment under way: what its stages share, and the stages as methods.

    Args:
        experiment: settings and factories; the data are set up.
        progress: shows the stages.
        loggers: get losses and results.
    """

    def __init__(self, experiment: Experiment, progress: Any, loggers: list[Any]) -> None:
        self.experiment, self.progress, self.loggers = experiment, progress, loggers
        self.folder = experiment.run_dir
        self.device = measuring_device(experiment.trainer.accelerator)
        self.seeds = image_seeds(experiment.seed, experiment.num_samples)
        data, total = experiment.data, experiment.diffusion.num_train_timesteps
        self.validation_set = ValidationSet.from_images(
            data.val_images, total, experiment.trainer.val_images, labels=data.val_labels
        )
        self.metrics: dict[str, Any] = {"floor": {}, "teacher": {}, "seconds": {}, "seed": experiment.seed, "warnings": []}

    def result(self) -> Result:
        """The whole run, stage after stage; the first rank alone measures and writes."""
        teacher = self.teacher()
        network = self.experiment.feature_network
        if not rank() and network is not None:
            halves, key = halves_distance(self.real_features), frechet_key(network)
            equals = distance_of_equals(halves, len(self.real_features), self.experiment.num_samples)
            self.metrics |= {"floor": {key: halves}, "floor_at_size": {key: equals}}
        module = None if self.experiment.quant.is_float else self.student(teacher)
        student = module.ema_student if module else None
        if not rank():
            self.measure(teacher, student)
            self.write(student)
        return Result(self.metrics, self.folder, teacher, student, module)

    def teacher(self) -> Denoiser:
        """The frozen full-precision network, trained where there is none yet."""
        with self.timed("teacher"):
            unet, self.metrics["teacher_origin"] = obtain_teacher(self.experiment, self.fit, self.progress.say)
        return denoiser(unet.to(memory_format=torch.channels_last), self.experiment.diffusion).requires_grad_(False).eval()

    def student(self, teacher: Denoiser) -> DiffusionModule:
        """The quantized student, calibrated and trained; the module has its best checkpoint loaded."""
        e, checkpoints = self.experiment, self.folder / CHECKPOINTS
        unet, cost = self.quantized(teacher.unet)
        if not (checkpoints / LAST).exists():
            for logger in self.loggers:
                if isinstance(logger, CSVMetrics):
                    logger.go_back(of_teacher=False, step=0)
            with self.timed("calibration"):
                calibrate_student(unet, e, self.progress)
            if e.execution == "integer":
                to_integer(unet)  # what can't be is told before anything is trained
        weights = None if e.nem.mode == "off" else e.weighting(e.diffusion, partial(self.propagation, teacher))
        module = DiffusionModule(
            unet,
            teacher.unet,
            settings=student_settings(unet, e),
            diffusion=e.diffusion,
            nem=e.nem,
            optimizer=e.optimizer,
            max_steps=e.trainer.max_steps,
            seed=e.seed,
            flip=e.data.flip,
            teacher_bf16=e.trainer.teacher_bf16,
            weights=weights,
        )
        fitted: Mapping[str, Any] = {"steps": 0}
        if e.quant.mode == "qat":
            with self.timed("student"):
                fitted = self.fit(module, checkpoints)
        self.metrics["student"] = {"bits": [e.quant.weight_bits, e.quant.act_bits], **fitted, "cost": cost}
        save_student(module.ema_student.unet, e, self.folder / "student")
        return module

    def propagation(self, teacher: Denoiser) -> Tensor:
        """How far an error at each timestep travels to the teacher's images, (T,), see `error_propagation`."""
        e, drawn_by = self.experiment, self.image_sampler(teacher.to(self.device))
        with self.timed("propagation"):
            return propagation(drawn_by, e.resolved["model"], Path(e.paths.cache).expanduser(), self.folder, self.progress)

    def quantized(self, teacher: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The student's U-Net, not calibrated, and its cost; says and writes what got how many bits."""
        e, size = self.experiment, int(self.experiment.data.image_size or 0)
        student, report = prepare_student(teacher, e)
        write_whole(self.folder / "quantization.txt", f"{report.table()}\n".encode(), checksum=False)
        self.progress.say(report.summary())
        student = student.to(self.device).to(memory_format=torch.channels_last)
        cost = count_cost(student, report, example_inputs(student, (e.data.channels, size, size)))
        log_layers(self.loggers, report, cost)
        return student, cost.totals()

    def fit(self, module: DiffusionModule, checkpoints: Path) -> dict[str, Any]:
        """Train a module, teacher or student, under a stage of its own; returns what `trainer.fit` returns."""
        e, name = self.experiment, module.prefix.rstrip("/") or "student"
        there = LambdaCallback(on_validation_end=lambda *_: check_there(self.folder))
        scales, student = LambdaCallback(on_validation_end=log_scales), module.teacher is not None
        users = [self.plan(module), *e.callbacks] if student or e.quant.is_float else []
        with self.progress.stage(name, module.max_steps, "steps") as stage:
            fitted = fit(
                module,
                e.data,
                self.validation_set,
                e.trainer,
                folder=checkpoints,
                stage=stage,
                loggers=self.loggers,
                callbacks=[there, *([scales] if student else []), *users],
                between_steps=partial(self.sample, module) if student else None,
            )
        for warning in module.warnings:
            self.progress.say(f"warning: {warning}")
        self.metrics["warnings"] += module.warnings
        return fitted

    def plan(self, module: DiffusionModule) -> PlanOfRun:
        """Says after the first steps of the run's last training what is left of the run."""
        drawn_by = self.image_sampler(module.ema_student)
        calls = drawn_by.steps(len(self.seeds)) * (1 if module.teacher is None else 2)
        return PlanOfRun(self.progress.say, calls, drawn_by.call_seconds)

    def sample(self, module: DiffusionModule, step: int) -> None:
        """After each `trainer.sample_every`th step but the last: a grid of the student's images, and their distance."""
        every = self.experiment.trainer.sample_every
        if not every or not step or step % every or step >= module.max_steps:
            return
        images = self.draw(self.image_sampler(module.ema_student), f"sampling at step {step}")
        path = self.folder / "samples" / f"step_{step:07d}.png"
        save_grid(path, [to_uint8(images[:GRID_IMAGES])], [f"student, step {step}"])
        log_pictures(self.loggers, "samples/student", path, step)
        distance = {f"sampled/{key}": value for key, value in self.distance(images).items()}
        for logger in self.loggers if distance else ():
            logger.log_metrics(distance, step)

    def measure(self, teacher: Denoiser, student: Denoiser | None) -> None:
        """Images of both networks from the same seeds, their distances, and where in t the student errs."""
        e = self.experiment
        with self.timed("sampling_teacher"):
            wanted = self.teachers_images(teacher.to(self.device))
        self.metrics["teacher"] = self.distance(wanted)
        rows = {"teacher": to_uint8(wanted[:GRID_IMAGES])}
        if student is not None:
            student = student.to(self.device)
            drawing = student
            if e.execution == "integer":
                drawing = denoiser(to_integer(student.unet)[0], e.diffusion)
                self.metrics["student"] |= {"execution": e.execution, **integer_provenance()}
            with self.timed("sampling_student"):
                images = self.draw(self.image_sampler(drawing), "sampling (student)")
            self.metrics["student"] |= {
                **self.distance(images),
                "image_mse": float((images.double() - wanted.double()).square().mean()),
                "nem_error": nem_error(student, teacher, self.validation_set, e.diffusion, e.sampler.batch_size),
            }
            rows[f"student W{e.quant.weight_bits}A{e.quant.act_bits}"] = to_uint8(images[:GRID_IMAGES])
        save_grid(self.folder / "samples.png", list(rows.values()), list(rows))

    def teachers_images(self, teacher: Denoiser) -> Tensor:
        """The teacher's images of the run's seeds, drawn or from the cache; arguments and shape as for `draw`."""
        e, image_sampler = self.experiment, self.image_sampler(teacher)
        draw, cache = partial(self.draw, image_sampler, "sampling (teacher)"), Path(e.paths.cache).expanduser()
        return teacher_images(image_sampler, self.seeds, e.resolved["model"], cache, draw, self.progress.say)

    def write(self, student: Denoiser | None) -> None:
        """What the results must carry, and everything to the loggers."""
        self.metrics |= {
            "num_samples": self.experiment.num_samples,
            "kernels": compiled.provenance(),
            "versions": versions(),
            "hardware": hardware(),
            "peak_memory_bytes": peak_memory(),
            "git": git_commit(),
            **({"unmeasured": UNMEASURED} if self.experiment.feature_network is None else {}),
            **({"trial": True} if self.experiment.resolved.get("trial", False) else {}),
        }
        log_results(self.loggers, self.experiment, self.metrics, student, self.validation_set)

    def image_sampler(self, network: Denoiser) -> ImageSampler:
        """Draws as the experiment's sampler says, on the network's device."""
        e, size = self.experiment, int(self.experiment.data.image_size or 0)
        return ImageSampler(
            network=network,
            sampler=e.sampler,
            diffusion=e.diffusion,
            shape=(e.data.channels, size, size),
            device=next(network.parameters()).device,
        )

    def draw(self, image_sampler: ImageSampler, stage: str) -> Tensor:
        """Images of the run's seeds, (num_samples, C, H, W) float32 in [-1, 1] on the CPU, under a stage of that name."""
        with self.progress.stage(stage, image_sampler.steps(len(self.seeds)), "steps") as shown:
            return image_sampler.draw(self.seeds, lambda: shown.advance(1))

    def distance(self, images: Tensor) -> dict[str, float]:
        """Frechet distance of images in [-1, 1] to the real training images, by its key; empty where none is measured."""
        network = self.experiment.feature_network
        if network is None:
            return {}
        return {frechet_key(network): frechet_distance(self.real_features, features(network, to_uint8(images)))}

    @cached_property
    def real_features(self) -> Tensor:
        """Features of the training images, (N, dim); from here on the feature network is on the measuring device."""
        network = self.experiment.feature_network
        assert network is not None
        return features(network.to(self.device), self.experiment.data.train_images)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Wall-clock seconds of the block become those of `stage`."""
        begin = time.perf_counter()
        yield
        self.metrics["seconds"][stage] = round(time.perf_counter() - begin, 2)
