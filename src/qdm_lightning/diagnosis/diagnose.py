"""The paper's two claims on a run, and on others laid over it, as pictures and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qdm_lightning.base.files import write_json, write_whole
from qdm_lightning.diagnosis.activations import Distribution, activation_distributions, choose_layers, layers_of
from qdm_lightning.diagnosis.gains import Gain, by_kind, grid_gains, table
from qdm_lightning.diagnosis.spec import DiagnosisConfig
from qdm_lightning.diagnosis.trajectory_error import TrajectoryError, trajectory_error
from qdm_lightning.diffusion.propagation import error_propagation, network_calls
from qdm_lightning.diffusion.sampling import image_seeds, spread
from qdm_lightning.display.plots import BoxPanel, Line, Panel, save_png
from qdm_lightning.evaluation.protocol import run_label
from qdm_lightning.evaluation.spec import listed
from qdm_lightning.evaluation.subject import Subject
from qdm_lightning.loggers import opened
from qdm_lightning.loggers.media import log_pictures, log_table
from qdm_lightning.quantization.layers import cached_weights
from qdm_lightning.quantization.spec import QuantConfig, TaQScale
from qdm_lightning.runs.provenance import environment, git_commit, versions
from qdm_lightning.training.experiment import Experiment

PANELS = {
    "raw": ("", "x"),
    "grid": (", as the quantizer sees it", "x / s + z (levels)"),
    "quantized": (", quantized", "quantized x"),
}
"""What is shown of a layer: what follows its name in the title, and the axis."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` returns: the record as in diagnosis.json, the table of gains, and the files that it wrote."""

    record: dict[str, Any]
    folder: Path
    pictures: dict[str, Path]
    gains: str


@dataclass(frozen=True)
class _RunDiagnosis:
    """One run's activations by layer, and its trajectory error; None where the network itself is the teacher."""

    subject: Subject
    activations: dict[str, Distribution]
    error: TrajectoryError | None


def diagnose(experiments: Sequence[Experiment], config: DiagnosisConfig, progress: Any) -> Diagnosis:
    """Diagnose the first run, others laid over it.

    Args:
        experiments: one for each run, all with the sampler of the first.
        config: what is shown.
        progress: shows the stages.

    Raises:
        FileNotFoundError, ValueError: bad input, found before anything is computed.
    """
    subjects = [Subject.restored(experiment, config) for experiment in experiments]
    for line in (line for subject in subjects for line in subject.warnings):
        progress.say(f"warning: {line}")
    layers = choose_layers(layers_of(subjects[0].simulated), listed(config.layers) or None)
    runs = {
        name: _RunDiagnosis(
            subject, _activations(subject, layers, config, progress), _trajectory_error(subject, config, progress)
        )
        for name, subject in _named(subjects).items()
    }
    gains = _gains(subjects[0], config, progress)
    travel = _propagation(subjects[0], progress)
    folder = Path(config.out).expanduser().resolve() if config.out else experiments[0].run_dir / "diagnosis"
    pictures = {"activations": folder / "activations.png"}
    save_png(pictures["activations"], _box_rows(layers, runs), "Inputs of layers by timestep: boxes 25-75 %, whiskers 1-99 %")
    errors = {name: run.error for name, run in runs.items() if run.error is not None}
    if errors:
        pictures["error"] = folder / "error.png"
        save_png(pictures["error"], [_curve_panels(errors)], "Student against teacher from the same noise")
    if gains:
        pictures["gains"] = folder / "gains.png"
        save_png(pictures["gains"], [[_gains_panel(gains)]], "Signal to quantization noise: gain over one grid for all t")
    pictures["propagation"] = folder / "propagation.png"
    save_png(pictures["propagation"], [[_propagation_panel(travel)]], "How far an error of the noise estimate travels")
    write_whole(folder / "gains.txt", f"{table(gains)}\n".encode(), checksum=False)
    record = {
        "runs": {name: _record(run) for name, run in runs.items()},
        "gains": [asdict(gain) for gain in gains],
        "propagation": {"images": PROPAGATION_IMAGES, "t": list(travel), "S": list(travel.values())},
        "num_images": config.num_images,
        "sampler": experiments[0].sampler.settings(),
        "diffusion": experiments[0].diffusion.settings(),
        "environment": environment(subjects[0].image_sampler.device),
        "versions": versions(),
        "git": git_commit(),
    }
    write_json(folder / "diagnosis.json", record)
    _log(experiments[0], pictures, errors, gains)
    return Diagnosis(record, folder, pictures, table(gains))


def _named(subjects: Sequence[Subject]) -> dict[str, Subject]:
    """Subjects by short names; by the names of their folders where those are the same."""
    folders = [subject.experiment.run_dir.name for subject in subjects]
    names = [run_label(folder) for folder in folders]
    names = names if len(set(names)) == len(names) else folders
    unique = [name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names)]
    return dict(zip(unique, subjects, strict=True))


def _activations(subject: Subject, layers: Sequence[str], config: DiagnosisConfig, progress: Any) -> dict[str, Distribution]:
    """Distributions by layer; layers that this run has not are left out, with a line that says so."""
    experiment, network = subject.experiment, subject.simulated
    own = layers_of(network)
    absent = [name for name in layers if name not in own]
    if absent:
        progress.say(f"{experiment.run_dir.name} has no layer {', '.join(absent)}: left out of its plots")
    experiment.load_data()
    images, labels = experiment.data.val_images, experiment.data.val_labels
    chosen = torch.arange(config.num_images) % len(images)
    timesteps = spread(range(experiment.diffusion.num_train_timesteps), config.timesteps)
    with progress.stage("activations", len(timesteps), "timesteps") as stage, cached_weights(network):
        return activation_distributions(
            network,
            [name for name in layers if name in own],
            images[chosen],
            experiment.diffusion,
            timesteps,
            device=subject.image_sampler.device,
            batch_size=experiment.sampler.batch_size,
            labels=None if labels is None else labels[chosen],
            on_step=stage.advance,
        )


def _trajectory_error(subject: Subject, config: DiagnosisConfig, progress: Any) -> TrajectoryError | None:
    teacher, student = subject.teacher(), subject.image_sampler
    if teacher is None:
        return None
    seeds = image_seeds(0, config.num_images)
    with progress.stage("trajectories", 2 * student.steps(len(seeds)), "steps") as stage, cached_weights(student.network):
        return trajectory_error(teacher, student, seeds, config.points, stage.advance)


PROPAGATION_IMAGES, PROPAGATION_POINTS = 16, 20
"""Images and timesteps by which S(t) is measured here."""


def _gains(subject: Subject, config: DiagnosisConfig, progress: Any) -> list[Gain]:
    """Of the full-precision network of a run, at the bits of its student; at W4A4 where the run trained a teacher."""
    experiment, teacher = subject.experiment, subject.teacher() or subject.image_sampler
    experiment.load_data()
    with progress.stage("grids by timestep", 1, "passes") as stage:
        found = grid_gains(
            teacher.network,
            QuantConfig() if experiment.quant.is_float else experiment.quant,
            experiment.data.val_images,
            experiment.diffusion,
            device=teacher.device,
            batch_size=experiment.sampler.batch_size,
            groups=experiment.resolved["taq"].get("groups", TaQScale.groups),
            labels=experiment.data.val_labels,
        )
        stage.advance(1)
    return found


def _propagation(subject: Subject, progress: Any) -> dict[int, float]:
    """S(t) of the run's full-precision network with the sampler of this command."""
    s = subject.teacher() or subject.image_sampler
    calls = network_calls(s.sampler, s.diffusion, PROPAGATION_IMAGES, PROPAGATION_POINTS)
    with progress.stage("error propagation", calls, "steps") as stage:
        seeds = image_seeds(0, PROPAGATION_IMAGES)
        return error_propagation(
            s.estimator,
            s.sampler,
            s.diffusion,
            shape=s.shape,
            seeds=seeds,
            labels=s.labels(seeds),
            points=PROPAGATION_POINTS,
            device=s.device,
            on_step=lambda: stage.advance(1),
        )


def _gains_panel(gains: Sequence[Gain]) -> Panel:
    kinds = by_kind(gains)
    places = range(len(kinds))
    none = [0.0] * len(kinds)
    names = {"groups": "a grid for each group of t", "normalize": "the sample's own moments"}
    lines = [
        Line(text, list(places), [getattr(kind, name) for kind in kinds], error=none, dash="none")
        for name, text in names.items()
    ]
    ticks = [kind.name for kind in kinds]
    return Panel(
        title="mean of the layers of a kind", xlabel="", ylabel="dB", lines=lines, ticks=ticks, bounds={"one grid": 0.0}
    )


def _propagation_panel(travel: Mapping[int, float]) -> Panel:
    return Panel(
        title="squared deviation of the image for a unit of squared error at t",
        xlabel="timestep t (sampling goes to the right)",
        ylabel="S(t)",
        lines=[Line("S(t)", list(travel), list(travel.values()))],
        log_y=True,
        falling=True,
    )


def _box_rows(layers: Sequence[str], runs: Mapping[str, _RunDiagnosis]) -> list[list[BoxPanel]]:
    """A row for each layer: raw, on the grid, quantized; raw alone where no run quantizes."""
    quantized = any(d.grid for run in runs.values() for d in run.activations.values())
    return [[_boxes(layer, kind, runs) for kind in (PANELS if quantized else ("raw",))] for layer in layers]


def _boxes(layer: str, kind: str, runs: Mapping[str, _RunDiagnosis]) -> BoxPanel:
    by_run = {name: run.activations[layer] for name, run in runs.items() if layer in run.activations}
    limits = sorted({0.0, *(float(d.levels) for d in by_run.values() if d.levels is not None)})
    title, ylabel = PANELS[kind]
    return BoxPanel(
        title=layer + title,
        ylabel=ylabel,
        timesteps=next(iter(by_run.values())).t,
        boxes={name: getattr(d, kind) for name, d in by_run.items() if getattr(d, kind)},
        limits=limits if kind == "grid" else (),
    )


def _curve_panels(errors: Mapping[str, TrajectoryError]) -> list[Panel]:
    def lines(name: str, first: int = 0, dash: str = "-") -> list[Line]:
        return [Line(run, d.t[first:], getattr(d, name)[first:], dash=dash) for run, d in errors.items()]

    def panel(title: str, ylabel: str, lines: list[Line], log_y: bool = False) -> Panel:
        return Panel(
            title=title,
            xlabel="timestep t (sampling goes to the right)",
            ylabel=ylabel,
            lines=lines,
            log_y=log_y,
            falling=True,
        )

    return [
        panel("states x_t, accumulated error", "mean squared error", lines("mse", first=1), log_y=True),  # 0: the common noise
        panel("states x_t", "cosine", lines("cosine")),
        panel(
            "noise estimates: accumulated (line), one step (dashed)",
            "mean squared error",
            lines("noise_mse") + lines("step_mse", dash="--"),
            log_y=True,
        ),
    ]


def _record(run: _RunDiagnosis) -> dict[str, Any]:
    return {
        "run": str(run.subject.experiment.run_dir),
        "network": run.subject.network,
        "origin": run.subject.origin,
        "execution": run.subject.execution,
        "activations": {name: asdict(distribution) for name, distribution in run.activations.items()},
        "oscillation": {name: {kind: d.oscillation(kind) for kind in ("raw", "grid")} for name, d in run.activations.items()},
        "error": None if run.error is None else asdict(run.error),
    }


def _log(
    experiment: Experiment, pictures: Mapping[str, Path], errors: Mapping[str, TrajectoryError], gains: Sequence[Gain]
) -> None:
    """Pictures, the errors of the finished images and the table of gains, to the loggers that the experiment names."""
    with opened(experiment.loggers, run_dir=experiment.run_dir, config=experiment.resolved) as loggers:
        for name, path in pictures.items():
            log_pictures(loggers, f"diagnosis/{name}", path, 0)
        log_table(loggers, "diagnosis/gains", list(Gain.columns), [gain.row() for gain in by_kind(gains)])
        values = {
            f"diagnosis/{name}/{run}": getattr(error, name)
            for run, error in errors.items()
            for name in ("image_mse", "image_cosine")
        }
        for logger in loggers:
            logger.log_metrics(values)
