"""Files of run folders, read and checked: what is damaged or of another kind is a ValueError that says so.

Settings that an older version stored get the names of this one, so that runs of either compare.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qdm_lightning.runs.formats import upgraded

CONFIG, METRICS, CURVES = "config.yaml", "metrics.json", "metrics.csv"


def flatten(plain: Any, key: str = "") -> dict[str, Any]:
    """A nested configuration as dotted names.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if not isinstance(plain, Mapping):
        return {key: plain}
    return {name: value for k, v in plain.items() for name, value in flatten(v, f"{key}.{k}" if key else str(k)).items()}


def read_settings(file: Path) -> dict[str, Any]:
    """A config.yaml as dotted names. Raises ValueError unless it has the bits."""
    try:
        plain = upgraded(yaml.safe_load(file.read_text("utf-8")))
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}): remove that run's folder, or repair it") from error
    settings = flatten(plain) if isinstance(plain, dict) else {}
    if not all(isinstance(settings.get(f"quant.{name}"), int) for name in ("weight_bits", "act_bits")):
        raise ValueError(f"{file} is no run's configuration: it has no quant.weight_bits and quant.act_bits")
    return settings


def _read_json(file: Path, name: str, advice: str = "") -> dict[str, Any]:
    """Empty where the file holds no mapping. Raises ValueError where it cannot be read."""
    try:
        plain = upgraded(json.loads(file.read_text("utf-8")))
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} is damaged ({error}){advice}") from error
    return plain if isinstance(plain, dict) else {}


def read_metrics(file: Path) -> dict[str, Any]:
    """A metrics.json. Raises ValueError unless seed, teacher, floor and a student's cost are of the right kind."""
    metrics = {"seconds": {}, "student": {}, **_read_json(file, str(file), ": remove it and run that job again")}
    student, seed = metrics["student"], metrics.get("seed")
    scores = numbers(metrics.get("teacher")) and numbers(metrics.get("floor"))
    if not scores or not isinstance(seed, int) or not isinstance(student, dict):
        raise ValueError(f"{file} is no run's record: it needs seed, teacher and floor, and their numbers")
    errors = student.get("nem_error", [])
    if not isinstance(errors, list) or not all(isinstance(value, int | float) for value in errors):
        raise ValueError(f"{file} is no run's record: student.nem_error must be a list of numbers")
    if not numbers(metrics["seconds"]) or not isinstance(student.get("cost", {}), dict):
        raise ValueError(f"{file} is no run's record: seconds must hold numbers, student.cost the cost")
    return metrics


def numbers(value: Any) -> bool:
    """Whether `value` is a dict of numbers."""
    return isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())


def read_evaluation(file: Path) -> dict[str, Any]:
    """An evaluation.json. Raises ValueError unless it has what a report shows."""
    record = _read_json(file, "it")
    groups = ("protocol", "scores", "sampler", "origin", "diffusion")
    known = "network" in record and all(isinstance(record.get(name), dict) for name in groups)
    if not known or not numbers(record["scores"]) or not numbers(record.get("floor", {})):
        raise ValueError("no record of an evaluation")
    return record


def read_curves(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Columns of a run's metrics.csv as (steps, values); empty without that file. Raises ValueError where it is damaged."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    if not (folder / CURVES).is_file():
        return curves
    try:
        with (folder / CURVES).open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                for name, text in row.items():
                    if name != "step" and text:
                        steps, values = curves.setdefault(name, ([], []))
                        steps.append(float(row["step"]))
                        values.append(float(text))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{CURVES} is damaged ({error})") from error
    return curves


def read_trajectory(folder: Path) -> tuple[str, list[float], list[float]] | None:
    """The error that accumulates over the steps of sampling, where `diagnose` measured it for this run.

    Returns:
        How it was measured, timesteps t, and the mean squared error of the states x_t, the common noise left out; None
        where there is no diagnosis.

    Raises:
        ValueError: a damaged diagnosis.json.
    """
    file = next(iter(sorted(folder.glob("*/diagnosis.json"))), None)
    if file is None:
        return None
    name = file.relative_to(folder).as_posix()
    record = _read_json(file, name)
    try:
        measured = next(iter(record["runs"].values()))["error"]
        if measured is None:
            return None
        how = f"{record['num_images']} images, " + ", ".join(f"{key} {value}" for key, value in record["sampler"].items())
        points = [(float(t), float(mse)) for t, mse in zip(measured["t"][1:], measured["mse"][1:], strict=True)]
        if not all(math.isfinite(t) for t, _ in points):
            raise ValueError("a timestep is not finite")
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{name} is no diagnosis of ours") from error
    return how, [t for t, _ in points], [mse for _, mse in points]
