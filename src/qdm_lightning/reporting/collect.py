"""What lies in run folders: settings, results, evaluations, diagnoses. Reads alone; what a report must not hide is kept."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qdm_lightning.metrics.constants import with_added
from qdm_lightning.reporting.records import (
    CONFIG,
    CURVES,
    METRICS,
    flatten,
    read_curves,
    read_evaluation,
    read_metrics,
    read_settings,
)

PROTOCOL = ("num_samples", "execution", "data.", "sampler.", "metrics.", "diffusion.")
"""Beginnings of settings that say how a run measured its result."""

UNMEASURED = tuple(f"data.{name}" for name in ("batch_size", "flip", "root", "path", "cache", "verify", "download"))
"""Settings of `data` that do not: how it trained, and where the images lie. The floor tells other images apart."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        name: its folder as a report shows it, from the folder that was given.
        settings: of config.yaml, as dotted names.
        metrics: as in metrics.json.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.metrics["seed"])

    @property
    def student(self) -> dict[str, Any]:
        """Empty for a run that trained a teacher alone."""
        return dict(self.metrics["student"])

    @property
    def seconds(self) -> float:
        return float(sum(self.metrics["seconds"].values()))

    def named(self, error: Exception) -> str:
        """The message of an error about a file of the run, by the run's name in place of its folder."""
        return str(error).replace(str(self.folder), self.name)


@dataclass(frozen=True)
class Result:
    """What was measured of one run under one protocol.

    Attributes:
        source: file below the run that says so.
        protocol: all that two results must share to stand in one table, as dotted names.
        scores, teacher, floor: name to value; `teacher` is empty where it was not measured alike.
        record: the whole file, with versions, hardware and commit.
        equals: what as many real images would have, by name; empty in records of version 0.1.
    """

    run: Run
    source: str
    protocol: dict[str, Any]
    scores: dict[str, float]
    teacher: dict[str, float]
    floor: dict[str, float]
    record: dict[str, Any]
    equals: dict[str, float] = field(default_factory=dict)


@dataclass
class Contents:
    """All that lies below the given folders.

    Attributes:
        unfinished: (name of the job's folder, what is there).
        notes: what was left out, a line each.
    """

    runs: list[Run] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    unfinished: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect(folders: Sequence[Path]) -> Contents:
    """Read every run in and below `folders` (runs, or folders of runs such as a sweep's), once each.

    Raises:
        FileNotFoundError: a folder that is not there, or none with a finished run.
        ValueError: a damaged config.yaml or metrics.json.
    """
    contents, names = Contents(), dict[Path, str]()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give a run, or a folder of runs such as outputs/..._sweep")
        root = folder.resolve()
        for path in _jobs(root):
            names.setdefault(path, (root.name / path.relative_to(root)).as_posix())
    for path, name in names.items():
        _read(path, name, contents)
    if not contents.runs:
        also = f"; {len(contents.unfinished)} unfinished: {contents.unfinished[0][0]}, ..." if contents.unfinished else ""
        raise FileNotFoundError(
            f"no finished run (a folder with {METRICS} and {CONFIG}) below {', '.join(map(str, folders))}{also}"
        )
    return contents


def _jobs(root: Path) -> Iterator[Path]:
    """Folders of jobs; nothing below a job is one."""
    for path, folders, files in os.walk(root):
        begun = ".hydra" in folders and "multirun.yaml" not in files
        if CONFIG in files or METRICS in files or begun:
            yield Path(path)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _read(path: Path, name: str, contents: Contents) -> None:
    """Add what is in the folder of one job."""
    config, metrics = ((path / file).is_file() for file in (CONFIG, METRICS))
    if not metrics:
        contents.unfinished.append((name, _state(path) if config else f"ended before it began: no {CONFIG}"))
    elif not config:
        contents.notes.append(f"{name} has a {METRICS} but no {CONFIG}: left out")
    else:
        run = Run(path, name, read_settings(path / CONFIG), read_metrics(path / METRICS))
        contents.runs.append(run)
        contents.results += [own_result(run), *_evaluations(run, contents.notes)]


def _state(path: Path) -> str:
    try:
        steps = read_curves(path).get("train/loss", ([], []))[0]
    except ValueError:
        steps = []
    ended = f"last step in {CURVES}: {steps[-1]:g}" if steps else "no step of a student in its records"
    return f"no {METRICS}; {ended}"


def own_result(run: Run) -> Result:
    """What the run measured at its end: distances, image_mse, and nem_error, the mean of its buckets.

    The scores of a run without student are its teacher's.
    """
    teacher, floor = _floats(run.metrics["teacher"]), _floats(run.metrics["floor"])
    source = run.student or teacher
    scores = {name: float(source[name]) for name in [*teacher, "image_mse"] if isinstance(source.get(name), int | float)}
    if run.student.get("nem_error"):
        scores["nem_error"] = float(np.mean(run.student["nem_error"]))
    shared = {name: value for name, value in run.settings.items() if name.startswith(PROTOCOL) and name not in UNMEASURED}
    if shared.get("execution") == "simulated":  # which goes without saying
        del shared["execution"]
    floors = {f"floor.{name}": f"{value:.4g}" for name, value in floor.items()}
    protocol = {"measured": "at the end of training", **shared, **floors}
    return Result(run, METRICS, protocol, scores, teacher, floor, run.metrics, _floats(run.metrics.get("floor_at_size", {})))


def _evaluations(run: Run, notes: list[str]) -> Iterator[Result]:
    """A result for each evaluation.json below the run; what cannot be read becomes a note.

    The teacher's evaluations of a run with a student are no results of their own: they are the `teacher` of those that
    measured alike.
    """
    records: dict[str, dict[str, Any]] = {}
    for file in sorted(run.folder.glob("evaluations/*/evaluation.json")):
        try:
            records[file.relative_to(run.folder).as_posix()] = read_evaluation(file)
        except (ValueError, OSError) as error:
            notes.append(f"{run.named(error)}; left out")
    of_teacher = [(_protocol(record), _scores(record)) for record in records.values() if record["network"] == "teacher"]
    for source, record in records.items():
        if record["network"] == "student" or not run.student:
            protocol, origin, floor = _protocol(record), record["origin"], _floats(record.get("floor", {}))
            teacher = next((scores for alike, scores in of_teacher if run.student and alike == protocol), {})
            weights = f"{origin.get('weights')} of {Path(str(origin.get('file'))).name}"
            execution = {"execution": record["execution"]} if record.get("execution", "simulated") != "simulated" else {}
            equals = _floats(record.get("floor_at_size", {}))
            whole = {**protocol, "weights": weights, **execution}
            yield Result(run, source, whole, _scores(record), teacher, floor, record, equals)


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in _floats(record["scores"]).items() if not name.endswith("_std")}


def _protocol(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two evaluations must share to compare, but for the weights."""
    rest = flatten({"sampler": record["sampler"], "diffusion": record["diffusion"]})
    return {"measured": "by evaluate", **flatten(with_added(record["protocol"])), **rest}
