"""Runs as a table: mean, deviation and 95 % interval over seeds for each cell, differences to a baseline paired by seed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

IGNORED = ("seed", "run", "paths.", "logger.", "tags", "trainer.threads", "callbacks.")
"""Settings that do not make another cell."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its settings as dotted names, its metrics."""

    folder: Path
    settings: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.metrics["seed"])

    def measures(self) -> dict[str, float]:
        """Numbers of the student: distances, image_mse, mean nem_error, stored bytes, and seconds in all."""
        student = self.metrics.get("student", {})
        found = {name: float(value) for name, value in student.items() if name.startswith("f") and isinstance(value, float)}
        if "image_mse" in student:
            found["image_mse"] = float(student["image_mse"])
            found["nem_error"] = float(np.mean(student["nem_error"]))
        return found


@dataclass
class Cell:
    """Runs that differ in their seed alone."""

    label: str
    runs: list[Run] = field(default_factory=list)

    def values(self, measure: str) -> dict[int, float]:
        """The measure by seed."""
        return {run.seed: run.measures()[measure] for run in self.runs if measure in run.measures()}


@dataclass(frozen=True)
class Estimate:
    """Mean over n seeds, its standard deviation and half the width of its 95 % interval (Student's t; NaN for one seed)."""

    mean: float
    deviation: float
    half_width: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """From one value a seed, at least one."""
        array = np.array(list(values), dtype=float)
        n = len(array)
        deviation = float(array.std(ddof=1)) if n > 1 else math.nan
        half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n) if n > 1 else math.nan
        return cls(float(array.mean()), deviation, half, n)

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.deviation:.2g}" if self.n > 1 else f"{self.mean:.4g}"


def flatten(plain: Any, key: str = "") -> dict[str, Any]:
    """A nested configuration as dotted names.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if not isinstance(plain, dict):
        return {key: plain}
    return {name: value for k, v in plain.items() for name, value in flatten(v, f"{key}.{k}" if key else str(k)).items()}


def cells(runs: Sequence[Run]) -> list[Cell]:
    """Runs grouped by their settings but for the seed; a label says the tags, or what differs between the cells."""
    names = sorted({name for run in runs for name in run.settings if not name.startswith(IGNORED)})
    varying = [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs}) > 1]
    found: dict[tuple[str, ...], Cell] = {}
    for run in runs:
        key = tuple(json.dumps(run.settings.get(name)) for name in varying)
        found.setdefault(key, Cell(_label(run, varying))).runs.append(run)
    return sorted(found.values(), key=lambda cell: cell.label)


def _label(run: Run, varying: Sequence[str]) -> str:
    bits = f"w{run.settings['quant.weight_bits']}a{run.settings['quant.act_bits']}"
    tags = run.settings.get("tags") or []
    if tags:
        return f"{bits} {tags[-1]}"
    swapped = [name.removesuffix("._target_") for name in varying if name.endswith("._target_")]
    others = [
        name
        for name in varying
        if name not in ("quant.weight_bits", "quant.act_bits")
        and (name.endswith("._target_") or not name.startswith(tuple(f"{group}." for group in swapped)))
    ]
    texts = [f"{name.removesuffix('._target_')}={str(run.settings.get(name)).rpartition('.')[2]}" for name in others]
    return " ".join([bits, *texts])


def difference(cell: Cell, baseline: Cell, measure: str) -> Estimate | None:
    """cell - baseline by seed, over the seeds that both have; None where there are none."""
    ours, theirs = cell.values(measure), baseline.values(measure)
    shared = sorted(ours.keys() & theirs.keys())
    return Estimate.of(ours[seed] - theirs[seed] for seed in shared) if shared else None


def markdown(found: Sequence[Cell], baseline: Cell | None = None) -> str:
    """A Markdown table, a row a cell, with the teacher and the floor below it."""
    measures = list(dict.fromkeys(m for cell in found for run in cell.runs for m in run.measures()))
    versus = [f"{m} - {baseline.label}" for m in measures[:2]] if baseline else []
    lines = [f"| {' | '.join(['run', 'seeds', *measures, *versus])} |", f"|{'---|' * (2 + len(measures) + len(versus))}"]
    for cell in found:
        texts = [str(Estimate.of(cell.values(m).values())) if cell.values(m) else "-" for m in measures]
        for measure in measures[:2] if baseline else []:
            gap = difference(cell, baseline, measure) if cell is not baseline and baseline else None
            texts.append("-" if gap is None else f"{gap.mean:+.3g} ± {gap.half_width:.2g} (95 %)")
        lines.append(f"| {' | '.join([cell.label, str(len(cell.runs)), *texts])} |")
    first = found[0].runs[0].metrics
    for who in ("teacher", "floor"):
        lines.append("")
        lines.append(f"{who}: " + ", ".join(f"{name} {value:.4g}" for name, value in first[who].items()))
    return "\n".join(lines) + "\n"


def write_csv(path: Path, found: Sequence[Cell]) -> None:
    """A row a run: cell, seed, folder's name, measures, seconds."""
    measures = list(dict.fromkeys(m for cell in found for run in cell.runs for m in run.measures()))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["cell", "seed", "run", *measures, "seconds"])
        for cell in found:
            for run in sorted(cell.runs, key=lambda run: run.seed):
                values = run.measures()
                seconds = round(sum(run.metrics["seconds"].values()), 1)
                writer.writerow([cell.label, run.seed, run.folder.name, *(values.get(m, "") for m in measures), seconds])
