"""Files of run folders, read and checked: what is damaged or of another kind is a ValueError that says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def flatten(plain: Any, key: str = "") -> dict[str, Any]:
    """A nested configuration as dotted names.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if not isinstance(plain, Mapping):
        return {key: plain}
    return {name: value for k, v in plain.items() for name, value in flatten(v, f"{key}.{k}" if key else str(k)).items()}


def read_settings(file: Path, load: Callable[[Path], Any]) -> dict[str, Any]:
    """A config.yaml as dotted names. Raises ValueError unless it has the bits."""
    try:
        plain = load(file)
    except Exception as error:
        raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}): remove that run's folder, or repair it") from error
    settings = flatten(plain) if isinstance(plain, dict) else {}
    bits = [settings.get(f"quant.{name}") for name in ("weight_bits", "act_bits")]
    if not all(isinstance(width, int) for width in bits):
        raise ValueError(f"{file} is no run's configuration: it has no quant.weight_bits and quant.act_bits")
    return settings


def read_metrics(file: Path) -> dict[str, Any]:
    """A metrics.json. Raises ValueError unless seed, teacher, floor and a student's cost are of the right kind."""
    try:
        metrics = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it and run that job again") from error
    scores = [metrics.get(name) for name in ("teacher", "floor")] if isinstance(metrics, dict) else [None]
    student = metrics.get("student", {}) if isinstance(metrics, dict) else None
    if not all(map(numbers, scores)) or not isinstance(metrics.get("seed"), int) or not isinstance(student, dict):
        raise ValueError(f"{file} is no run's record: it needs seed, teacher and floor, and their numbers")
    errors = student.get("nem_error", [])
    if not isinstance(errors, list) or not all(isinstance(value, int | float) for value in errors):
        raise ValueError(f"{file} is no run's record: student.nem_error must be a list of numbers")
    if not numbers(metrics.setdefault("seconds", {})) or not isinstance(student.get("cost", {}), dict):
        raise ValueError(f"{file} is no run's record: seconds must hold numbers, student.cost the cost")
    return dict(metrics)


def numbers(value: Any) -> bool:
    """Whether `value` is a dict of numbers."""
    return isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())


def read_evaluation(file: Path) -> dict[str, Any]:
    """An evaluation.json. Raises ValueError unless it has what a report shows."""
    try:
        record = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"damaged ({error})") from error
    groups = ("protocol", "scores", "sampler", "origin", "diffusion")
    known = isinstance(record, dict) and "network" in record and all(isinstance(record.get(name), dict) for name in groups)
    if not known or not numbers(record["scores"]) or not numbers(record.get("floor", {})):
        raise ValueError("no record of an evaluation")
    return dict(record)


def read_trajectory(folder: Path) -> tuple[str, list[float], list[float]] | None:
    """The error that gathers over the steps of sampling, where `diagnose` measured it for this run.

    Returns:
        How it was measured, timesteps t, and the mean squared error of the states x_t, the common noise left out; None
        where there is no diagnosis.

    Raises:
        ValueError: a damaged diagnosis.json.
    """
    file = next(iter(sorted(folder.glob("*/diagnosis.json"))), None)
    if file is None:
        return None
    try:
        record = json.loads(file.read_text("utf-8"))
        error = next(iter(record["runs"].values()))["error"]
        if error is None:
            return None
        sampler = record["sampler"]
        how = f"{record['num_images']} images, " + ", ".join(f"{name} {value}" for name, value in sampler.items())
        t, mse = [float(x) for x in error["t"][1:]], [float(x) for x in error["mse"][1:]]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, OSError) as error:
        raise ValueError(f"{file.relative_to(folder).as_posix()} is no diagnosis of ours") from error
    if len(t) != len(mse) or not all(map(math.isfinite, t)):
        raise ValueError(f"{file.relative_to(folder).as_posix()} is no diagnosis of ours")
    return how, t, mse
