"""The paper's two claims on a run, and on others beside it, as pictures and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdm_lightning.base.files import write_json
from qdm_lightning.diagnosis.activations import Distribution, activation_distributions, choose_layers, layers_of
from qdm_lightning.diagnosis.trajectory_error import TrajectoryError, trajectory_error
from qdm_lightning.diffusion.sampling import image_seeds
from qdm_lightning.display.plots import BoxPanel, CurvePanel, save_boxes, save_curves
from qdm_lightning.evaluation.plan import image_sampler, restored_sampler
from qdm_lightning.evaluation.protocol import run_label
from qdm_lightning.evaluation.sample import spread
from qdm_lightning.evaluation.spec import DiagnosisConfig, listed
from qdm_lightning.loggers import opened
from qdm_lightning.loggers.media import log_pictures
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.runs.provenance import environment, git_commit, versions
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.restore import restore_teacher

FOLDER = "diagnosis"


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` returns: the record as in diagnosis.json, and the files that it wrote."""

    record: dict[str, Any]
    folder: Path
    pictures: dict[str, Path]


@dataclass(frozen=True)
class _Subject:
    """One run under diagnosis; `teacher` is None where the network itself is the teacher."""

    experiment: Experiment
    which: str
    origin: dict[str, Any]
    image_sampler: ImageSampler
    teacher: ImageSampler | None


def diagnose(experiments: Sequence[Experiment], config: DiagnosisConfig, progress: Any) -> Diagnosis:
    """Diagnose the first run, others laid over it.

    Args:
        experiments: of the runs, all with the sampler of the first.
        config: what is shown.
        progress: shows the stages.

    Raises:
        FileNotFoundError, ValueError: bad input, told before anything is computed.
    """
    subjects = _named([_subject(experiment, config) for experiment in experiments])
    first = next(iter(subjects.values()))
    names = choose_layers(layers_of(first.image_sampler.network), listed(config.layers) or None)
    layers = {run: _distributions(subject, names, config, progress) for run, subject in subjects.items()}
    trajectory_errors = {run: _trajectory_error(s, config, progress) for run, s in subjects.items() if s.teacher is not None}
    folder = Path(config.out).expanduser().resolve() if config.out else first.experiment.run_dir / FOLDER
    record = _record(subjects, layers, trajectory_errors, config)
    pictures = {"activations": folder / "activations.png"}
    save_boxes(
        pictures["activations"], _box_rows(names, layers), "Inputs of layers by timestep: boxes 25-75 %, whiskers 1-99 %"
    )
    if trajectory_errors:
        pictures["error"] = folder / "error.png"
        save_curves(pictures["error"], _curve_panels(trajectory_errors), "Student against teacher from the same noise")
    write_json(folder / "diagnosis.json", record)
    _log(first.experiment, pictures, record)
    return Diagnosis(record, folder, pictures)


def _subject(experiment: Experiment, config: DiagnosisConfig) -> _Subject:
    which, restored, drawn_by = restored_sampler(experiment, config)
    teacher = None
    if which == "student":
        teacher = image_sampler(experiment, restore_teacher(experiment, drawn_by.device), drawn_by.device)
    return _Subject(experiment, which, restored.origin, drawn_by, teacher)


def _named(subjects: Sequence[_Subject]) -> dict[str, _Subject]:
    """Subjects by short names; by the names of their folders where those are the same."""
    short = [run_label(subject.experiment.run_dir.name) for subject in subjects]
    if len(set(short)) < len(short):
        short = [subject.experiment.run_dir.name for subject in subjects]
    return {
        name if short.count(name) == 1 else f"{name} ({k})": s for k, (name, s) in enumerate(zip(short, subjects, strict=True))
    }


def _distributions(subject: _Subject, names: Sequence[str], config: DiagnosisConfig, progress: Any) -> dict[str, Distribution]:
    """By layer; layers that this run has not are left out, and said."""
    drawn_by, experiment = subject.image_sampler, subject.experiment
    there = layers_of(drawn_by.network)
    absent = [name for name in names if name not in there]
    if absent:
        progress.say(f"{experiment.run_dir.name} has no layer {', '.join(absent)}: left out of its plots")
    experiment.data.setup()
    total = experiment.diffusion.num_train_timesteps
    steps = sorted(set(spread(range(total), config.timesteps)))
    with progress.stage("activations", len(steps), "timesteps") as stage:
        found = activation_distributions(
            drawn_by.network,
            [name for name in names if name in there],
            _images(experiment.data.val_images, config.num_images),
            experiment.diffusion,
            steps,
            device=drawn_by.device,
            batch_size=experiment.sampler.batch_size,
            on_step=lambda: stage.advance(1),
        )
    return {distribution.layer: distribution for distribution in found}


def _images(images: Tensor, count: int) -> Tensor:
    return images[torch.arange(count) % len(images)]


def _trajectory_error(subject: _Subject, config: DiagnosisConfig, progress: Any) -> TrajectoryError:
    assert subject.teacher is not None
    seeds = image_seeds(0, config.num_images)
    with progress.stage("trajectories", 2 * subject.image_sampler.steps(len(seeds)), "steps") as stage:
        return trajectory_error(subject.teacher, subject.image_sampler, seeds, config.points, lambda: stage.advance(1))


def _box_rows(names: Sequence[str], layers: Mapping[str, Mapping[str, Distribution]]) -> list[list[BoxPanel]]:
    """A row for each layer: raw, on the grid, quantized; raw alone where no run quantizes."""
    rows = []
    quantized = any(d.grid for found in layers.values() for d in found.values())
    for name in names:
        here = {run: found[name] for run, found in layers.items() if name in found}
        t = next(iter(here.values())).t
        panels = [BoxPanel(title=name, ylabel="x", timesteps=t, boxes={run: d.raw for run, d in here.items()})]
        if quantized:
            levels = {float(d.levels) for d in here.values() if d.levels is not None}
            panels += [
                BoxPanel(
                    title=f"{name}, as the quantizer sees it",
                    ylabel="x / s + z (levels)",
                    timesteps=t,
                    boxes={run: d.grid for run, d in here.items() if d.grid},
                    limits=sorted({0.0, *levels}),
                ),
                BoxPanel(
                    title=f"{name}, quantized",
                    ylabel="quantized x",
                    timesteps=t,
                    boxes={run: d.quantized for run, d in here.items() if d.quantized},
                ),
            ]
        rows.append(panels)
    return rows


def _curve_panels(trajectory_errors: Mapping[str, TrajectoryError]) -> list[CurvePanel]:
    def curves(name: str) -> dict[str, tuple[Sequence[int], Sequence[float]]]:
        return {run: (d.t, getattr(d, name)) for run, d in trajectory_errors.items()}

    states = {run: (d.t[1:], d.mse[1:]) for run, d in trajectory_errors.items()}  # the first state is the common noise
    return [
        CurvePanel(title="states x_t, gathered error", ylabel="mean squared error", curves=states, log=True),
        CurvePanel(title="states x_t", ylabel="cosine", curves=curves("cosine")),
        CurvePanel(
            title="noise estimates: gathered (line), of one step (dashed)",
            ylabel="mean squared error",
            curves=curves("noise_mse"),
            dashed=curves("step_mse"),
            log=True,
        ),
    ]


def _record(
    subjects: Mapping[str, _Subject],
    layers: Mapping[str, Mapping[str, Distribution]],
    trajectory_errors: Mapping[str, TrajectoryError],
    config: DiagnosisConfig,
) -> dict[str, Any]:
    runs = {}
    for run, subject in subjects.items():
        found = layers[run]
        runs[run] = {
            "run": str(subject.experiment.run_dir),
            "network": subject.which,
            "origin": subject.origin,
            "activations": {name: asdict(d) for name, d in found.items()},
            "oscillation": {name: {which: d.oscillation(which) for which in ("raw", "grid")} for name, d in found.items()},
            "error": asdict(trajectory_errors[run]) if run in trajectory_errors else None,
        }
    first = next(iter(subjects.values()))
    return {
        "runs": runs,
        "num_images": config.num_images,
        "sampler": asdict(first.experiment.sampler),
        "diffusion": asdict(first.experiment.diffusion),
        "environment": environment(first.image_sampler.device),
        "versions": versions(),
        "git": git_commit(),
    }


def _log(experiment: Experiment, pictures: Mapping[str, Path], record: Mapping[str, Any]) -> None:
    """Pictures and the final errors, to the loggers that the experiment names."""
    if not experiment.loggers:
        return
    with opened(experiment.loggers, run_dir=experiment.run_dir, config=experiment.resolved) as loggers:
        for name, path in pictures.items():
            log_pictures(loggers, f"diagnosis/{name}", path, 0)
        values = {
            f"diagnosis/{name}/{run}": found["error"][name]
            for run, found in record["runs"].items()
            for name in ("image_mse", "image_cosine")
            if found["error"]
        }
        for logger in loggers:
            logger.log_metrics(values)
