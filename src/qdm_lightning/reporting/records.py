"""Files of run folders, read and checked: what is damaged or of another kind is a ValueError that says so.

Settings that an older version stored get the names of this one, so that runs of either compare.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdm_lightning.base.files import read_json, reading
from qdm_lightning.runs.folder import plain_yaml
from qdm_lightning.runs.formats import ADDED, upgraded

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
    with reading(file, "remove that run's folder, or repair it") as stream:
        settings = ADDED | flatten(plain_yaml(stream.read().decode()))
    if not all(isinstance(settings.get(f"quant.{name}"), int) for name in ("weight_bits", "act_bits")):
        raise ValueError(f"{file} is no run's configuration: it has no quant.weight_bits and quant.act_bits")
    return settings


def read_metrics(file: Path) -> dict[str, Any]:
    """A metrics.json. Raises ValueError unless seed, teacher, floor and a student's cost are of the right kind."""
    metrics = {"seconds": {}, "student": {}, **upgraded(read_json(file, "remove it and run that job again"))}
    student, seed = metrics["student"], metrics.get("seed")
    scores = all(numbers(metrics.get(name)) for name in ("teacher", "floor")) and numbers(metrics.get("floor_at_size", {}))
    if not scores or not isinstance(seed, int) or not isinstance(student, dict):
        raise ValueError(f"{file} is no run's record: it needs seed, teacher and floor, and their numbers")
    errors = student.get("nem_error", [])
    if not isinstance(errors, list) or not numbers(dict(enumerate(errors))):
        raise ValueError(f"{file} is no run's record: student.nem_error must be a list of numbers")
    if not numbers(metrics["seconds"]) or not isinstance(student.get("cost", {}), dict):
        raise ValueError(f"{file} is no run's record: seconds must hold numbers, student.cost the cost")
    return metrics


def numbers(value: Any) -> bool:
    """Whether `value` is a dict of numbers."""
    return isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())


def read_evaluation(file: Path) -> dict[str, Any]:
    """An evaluation.json. Raises ValueError unless it has what a report shows."""
    record = upgraded(read_json(file))
    known = all(isinstance(record.get(name), dict) for name in ("protocol", "scores", "sampler", "origin", "diffusion"))
    numeric = all(numbers(record.get(name, {})) for name in ("scores", "floor", "floor_at_size"))
    if "network" not in record or not known or not numeric:
        raise ValueError(f"{file} is no record of an evaluation")
    return dict(record)


def read_curves(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Columns of a run's metrics.csv as (steps, values); empty without that file. Raises ValueError where it is damaged."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    if (folder / CURVES).exists():
        with reading(folder / CURVES) as stream:
            for row in csv.DictReader(line.decode() for line in stream):
                for name, text in row.items():
                    if name != "step" and text:
                        steps, values = curves.setdefault(name, ([], []))
                        steps.append(float(row["step"]))
                        values.append(float(text))
    return curves


def read_trajectory(folder: Path) -> tuple[str, list[tuple[int, float]]] | None:
    """The error that accumulates over the steps of sampling, where `diagnose` measured it for this run.

    Returns:
        How it was measured, and for each timestep t the mean squared error of the states x_t, the common noise left out; None
        where there is no diagnosis.

    Raises:
        ValueError: a damaged diagnosis.json.
    """
    file = next(iter(sorted(folder.glob("*/diagnosis.json"))), None)
    if file is None:
        return None
    record = upgraded(read_json(file))
    try:
        error = next(iter(record["runs"].values()))["error"]
        if error is None:
            return None
        how = f"{record['num_images']} images, " + ", ".join(f"{key} {value}" for key, value in record["sampler"].items())
        points = [(int(t), float(mse)) for t, mse in zip(error["t"][1:], error["mse"][1:], strict=True)]
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, StopIteration) as problem:
        raise ValueError(f"{file} is no diagnosis of ours") from problem
    return how, points
