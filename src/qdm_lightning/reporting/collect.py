"""What lies in run folders: settings, results, evaluations, diagnoses. Reads alone; what a report must not hide is kept."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qdm_lightning.reporting.records import flatten, read_evaluation, read_metrics, read_settings

CONFIG, METRICS, CURVES = "config.yaml", "metrics.json", "metrics.csv"
TRAINING = ("data.batch_size", "data.flip")
LOCATION = ("data.root", "data.path", "data.cache", "data.verify", "data.download")
"""Settings of `data` that are no part of how a result was measured: the floor tells other data apart."""


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
        return dict(self.metrics.get("student") or {})

    @property
    def seconds(self) -> float:
        return float(sum(self.metrics.get("seconds", {}).values()))

    @cached_property
    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """Columns of metrics.csv as (steps, values); empty without that file. Raises ValueError where it is damaged."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        file = self.folder / CURVES
        if not file.is_file():
            return found
        try:
            with file.open(newline="", encoding="utf-8") as stream:
                for row in csv.DictReader(stream):
                    for name, text in row.items():
                        if name != "step" and text:
                            steps, values = found.setdefault(name, ([], []))
                            steps.append(float(row["step"]))
                            values.append(float(text))
        except (ValueError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.name}/{CURVES} is damaged ({error})") from error
        return found


@dataclass(frozen=True)
class Result:
    """What was measured of one run under one protocol.

    Attributes:
        source: file below the run that says so.
        protocol: all that two results must share to stand in one table, as dotted names.
        scores, teacher, floor: name to value; `teacher` is empty where it was not measured alike.
        record: the whole file, with versions, hardware and commit.
    """

    run: Run
    source: str
    protocol: dict[str, Any]
    scores: dict[str, float]
    teacher: dict[str, float]
    floor: dict[str, float]
    record: dict[str, Any]


@dataclass
class Found:
    """All that lies below the given folders.

    Attributes:
        unfinished: (name of the job's folder, what is there).
        notes: what was left out, a line each.
    """

    runs: list[Run] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    unfinished: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect(folders: Sequence[Path], load: Callable[[Path], Any]) -> Found:
    """Read every run in and below `folders`, once each.

    Args:
        folders: runs, or folders of runs such as a sweep's.
        load: reads a YAML file to plain data; any exception of its own means that the file is damaged.

    Raises:
        FileNotFoundError: a folder that is not there, or none with a finished run.
        ValueError: a damaged config.yaml or metrics.json.
    """
    found, seen = Found(), set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give a run, or a folder of runs such as outputs/..._sweep")
        root = folder.resolve()
        for path in _jobs(root):
            name = "/".join([root.name, *path.relative_to(root).parts])
            if path not in seen:
                seen.add(path)
                _read(path, name, load, found)
    if not found.runs:
        also = f"; {len(found.unfinished)} unfinished: {found.unfinished[0][0]}, ..." if found.unfinished else ""
        raise FileNotFoundError(
            f"no finished run (a folder with {METRICS} and {CONFIG}) below {', '.join(map(str, folders))}{also}"
        )
    return found


def _jobs(root: Path) -> Iterator[Path]:
    """Folders of jobs; nothing below a job is one."""
    for path, folders, files in os.walk(root):
        begun = ".hydra" in folders and "multirun.yaml" not in files
        if CONFIG in files or METRICS in files or begun:
            yield Path(path)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _read(path: Path, name: str, load: Callable[[Path], Any], found: Found) -> None:
    if not (path / METRICS).is_file():
        there = _state(path) if (path / CONFIG).is_file() else f"ended before it began: no {CONFIG}"
        found.unfinished.append((name, there))
        return
    if not (path / CONFIG).is_file():
        found.notes.append(f"{name} has a {METRICS} but no {CONFIG}: left out")
        return
    run = Run(path, name, read_settings(path / CONFIG, load), read_metrics(path / METRICS))
    found.runs.append(run)
    found.results.append(own_result(run))
    for file in sorted(path.glob("evaluations/*/evaluation.json")):
        try:
            found.results += _evaluation(run, file)
        except ValueError as error:
            found.notes.append(f"{name}/{file.relative_to(path).as_posix()}: {error}; left out")


def _state(path: Path) -> str:
    try:
        steps = Run(path, path.name, {}, {}).curves.get("train/loss", ([], []))[0]
    except ValueError:
        steps = []
    ended = f"last step in {CURVES}: {steps[-1]:g}" if steps else "no step of a student in its records"
    return f"no {METRICS}; {ended}"


def own_result(run: Run) -> Result:
    """What the run measured at its end: distances, image_mse, and nem_error, the mean of its buckets.

    The scores of a run without student are its teacher's.
    """
    teacher = {name: float(value) for name, value in run.metrics["teacher"].items()}
    floor = {name: float(value) for name, value in run.metrics["floor"].items()}
    source = run.student or run.metrics["teacher"]
    scores = {name: float(source[name]) for name in [*teacher, "image_mse"] if isinstance(source.get(name), int | float)}
    if run.student.get("nem_error"):
        scores["nem_error"] = float(np.mean(run.student["nem_error"]))
    protocol = {"measured": "at the end of training"}
    for name, value in run.settings.items():
        data = name.startswith("data.") and name not in (*TRAINING, *LOCATION)
        if data or name == "num_samples" or name.startswith(("sampler.", "metrics.", "diffusion.")):
            protocol[name] = value
    protocol |= {f"floor.{name}": f"{value:.4g}" for name, value in floor.items()}
    return Result(run, METRICS, protocol, scores, teacher, floor, run.metrics)


def _evaluation(run: Run, file: Path) -> list[Result]:
    """The student's result in an evaluation.json, with its teacher's where that was measured alike; none for a teacher's.

    Raises:
        ValueError: no such record.
    """
    record = read_evaluation(file)
    if record["network"] != "student":
        return [] if run.student else [_evaluated(run, file, record, {})]
    wanted = _evaluation_protocol(record)
    for other in sorted(file.parents[1].glob("*/evaluation.json")):
        try:
            theirs = read_evaluation(other)
        except ValueError:
            continue  # noted on its own
        if theirs["network"] == "teacher" and _evaluation_protocol(theirs) == wanted:
            return [_evaluated(run, file, record, _scores(theirs))]
    return [_evaluated(run, file, record, {})]


def _evaluated(run: Run, file: Path, record: dict[str, Any], teacher: dict[str, float]) -> Result:
    origin = record["origin"]
    weights = f"{origin.get('weights')} of {Path(str(origin.get('file'))).name}"
    protocol = {**_evaluation_protocol(record), "weights": weights}
    floor = {name: float(value) for name, value in record.get("floor", {}).items()}
    return Result(run, file.relative_to(run.folder).as_posix(), protocol, _scores(record), teacher, floor, record)


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record["scores"].items() if not name.endswith("_std")}


def _evaluation_protocol(record: Mapping[str, Any]) -> dict[str, Any]:
    nested = {"sampler": record["sampler"], "diffusion": record["diffusion"]}
    return {"measured": "by evaluate", **flatten(record["protocol"]), **flatten(nested)}
