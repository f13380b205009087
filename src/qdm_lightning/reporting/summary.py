"""Runs as cells over seeds: mean, deviation, 95 % interval, differences to a baseline, the gap to the teacher.

A cell is a set of runs that differ in their seed alone. For a measure m with values m_1..m_n over n seeds:

* interval: mean +- t(0.975, n - 1) * deviation / sqrt(n), Student's t, deviation with n - 1; none for n = 1.
* difference to the baseline: the same of the differences cell_i - baseline_i, over the seeds i that both have.
* gap closed: 100 * (baseline - cell) / (baseline - teacher) of the distance, in percent, each the mean over the seeds that
  both cells have. 0 is the baseline, 100 its teacher. None where the teacher is not nearer than the baseline, or the two
  cells had different teachers.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtrit  # scipy.stats would take a second to load

from qdm_lightning.reporting.collect import Result, Run

IGNORED = ("seed", "run", "paths.", "logger.", "tags", "trainer.threads", "callbacks.", "data.cache", "data.verify")
"""Beginnings of settings that do not make another cell."""

MEASURED = ("sampler.", "num_samples", "metrics.")
"""Beginnings of settings that belong to the protocol: they do not make another cell either."""

NONE = "none"
"""Method of a trained cell without TaQ and NeM."""


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
        half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n) if n > 1 else math.nan
        return cls(float(array.mean()), deviation, half, n)

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


@dataclass
class Cell:
    """Results of runs that differ in their seed alone, under one protocol.

    Attributes:
        bits: such as `w4a4`, or `fp32`.
        method: `none`, `TaQ`, `NeM` or `TaQ+NeM`, variants in parentheses where there are several; `PTQ` or `PTQ+TaQ` where no
            gradient step was taken.
        rest: what else tells it from others, as ` name=value`.
        results: by seed.
    """

    bits: str
    method: str
    rest: str = ""
    results: dict[int, Result] = field(default_factory=dict)

    @property
    def series(self) -> str:
        """The label without the bits."""
        return (self.method + self.rest).strip()

    @property
    def label(self) -> str:
        return f"{self.bits} {self.series}".strip()

    @property
    def widths(self) -> tuple[int, int]:
        settings = next(iter(self.results.values())).run.settings
        return settings["quant.weight_bits"], settings["quant.act_bits"]

    def values(self, measure: str) -> dict[int, float]:
        """The measure by seed."""
        return {seed: r.scores[measure] for seed, r in sorted(self.results.items()) if measure in r.scores}

    def teacher(self, measure: str) -> dict[int, float]:
        return {seed: r.teacher[measure] for seed, r in sorted(self.results.items()) if measure in r.teacher}

    def cost(self, name: str) -> list[float]:
        """Distinct values of `student.cost` (`speedup.linear` and so on), which should be one."""
        found = []
        for result in self.results.values():
            value: Any = result.run.student.get("cost", {})
            for part in name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                found.append(float(value))
        return sorted(set(found))


@dataclass
class Group:
    """Cells whose results share a protocol.

    Attributes:
        name: `A`, `B`, ...
        baselines: label of a cell to the cell that differences are taken to; cells without one are left out.
    """

    name: str
    protocol: dict[str, Any]
    cells: list[Cell]
    baselines: dict[str, Cell] = field(default_factory=dict)

    @property
    def results(self) -> list[Result]:
        return [result for cell in self.cells for result in cell.results.values()]

    @property
    def measures(self) -> list[str]:
        """Names of the scores, distances first."""
        names, distances = dict.fromkeys(name for result in self.results for name in result.scores), self.distances
        return sorted(names, key=lambda name: name not in distances)

    @property
    def distances(self) -> list[str]:
        """Frechet distances: `fid` over Inception features, `fd_<network>` over others."""
        names = dict.fromkeys(name for result in self.results for name in result.scores)
        return [name for name in names if name == "fid" or name.startswith("fd_")]

    @property
    def title(self) -> str:
        """Short: images, sampler, feature network, and who measured."""
        p = self.protocol
        sampler = f"{p.get('sampler.kind', 'sampler')} with {p.get('sampler.steps', '?')} steps"
        return (
            f"{p.get('num_samples', '?')} images, {sampler}, {' and '.join(self.distances) or 'no distance'}, {p['measured']}"
        )


def difference(cell: Cell, baseline: Cell, measure: str) -> Estimate | None:
    """cell - baseline by seed, over the seeds that both have; None where there are none."""
    ours, theirs = cell.values(measure), baseline.values(measure)
    shared = sorted(ours.keys() & theirs.keys())
    return Estimate.of(ours[seed] - theirs[seed] for seed in shared) if shared else None


def gap_closed(cell: Cell, baseline: Cell, distance: str) -> float | None:
    """100 * (baseline - cell) / (baseline - teacher) in percent, of means over the seeds that both have (see the module)."""
    ours, theirs, mine, other = (
        cell.values(distance), baseline.values(distance), cell.teacher(distance), baseline.teacher(distance)
    )  # fmt: skip
    shared = sorted(ours.keys() & theirs.keys() & mine.keys() & other.keys())
    if not shared or any(not math.isclose(mine[seed], other[seed], rel_tol=1e-4) for seed in shared):
        return None
    gap = float(np.mean([theirs[seed] - other[seed] for seed in shared]))
    closed = float(np.mean([theirs[seed] - ours[seed] for seed in shared]))
    return 100 * closed / gap if gap > 0 else None


def summarize(
    results: Sequence[Result], variants: Mapping[str, str], baseline: str | None = None
) -> tuple[list[Group], list[str]]:
    """Results as groups of one protocol, their cells, and the baseline of each.

    Args:
        results: at least one.
        variants: class that TaQ names as `_target_` to its short name.
        baseline: label of a cell for all differences, or a method for those of equal bits; None takes `none` at equal bits.

    Returns:
        Groups, those measured at the end of training first, and notes on what was left out.

    Raises:
        ValueError: nothing is called `baseline`.
    """
    runs = list({result.run.folder: result.run for result in results}.values())
    labels = _labels(runs, variants)
    by_protocol: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_protocol[json.dumps(result.protocol, sort_keys=True, default=str)].append(result)
    groups, notes = [], []
    for number, key in enumerate(sorted(by_protocol, key=lambda key: _place(by_protocol[key][0], key))):
        cells: dict[str, Cell] = {}
        for result in by_protocol[key]:
            bits, method, rest = labels[result.run.folder]
            cell = cells.setdefault(f"{bits} {method}{rest}", Cell(bits, method, rest))
            if result.run.seed in cell.results:
                earlier = cell.results[result.run.seed]
                notes.append(f"{earlier.run.name}/{earlier.source}: {result.run.name} is the same cell and seed, and counts")
            cell.results[result.run.seed] = result
        name = chr(ord("A") + number) if number < 26 else f"P{number + 1}"
        groups.append(Group(name, by_protocol[key][0].protocol, sorted(cells.values(), key=_order)))
    for group in groups:
        group.baselines = _baselines(group.cells, baseline)
    if baseline is not None and not any(group.baselines for group in groups):
        names = dict.fromkeys(text for group in groups for cell in group.cells for text in (cell.label, cell.series) if text)
        raise ValueError(f"baseline={baseline} is no cell: choose one of {', '.join(map(repr, names))}")
    return groups, notes


def _place(result: Result, key: str) -> tuple[Any, ...]:
    """Where a protocol stands: the runs' own first, then by sampler and steps."""
    steps = result.protocol.get("sampler.steps")
    own = result.source == "metrics.json"
    return (not own, str(result.protocol.get("sampler.kind")), steps if isinstance(steps, int) else 0, key)


def _order(cell: Cell) -> tuple[Any, ...]:
    weight, act = cell.widths
    return (-weight, -act, "PTQ" in cell.method, cell.method != NONE, "+" in cell.method, "NeM" in cell.method, cell.series)


def _baselines(cells: Sequence[Cell], asked: str | None) -> dict[str, Cell]:
    found = {}
    fixed = next((cell for cell in cells if cell.label == asked), None)
    for cell in cells:
        alike = [other for other in cells if other.bits == cell.bits and asked in (None, other.series, other.method)]
        if asked is None:
            alike = [other for other in alike if other.method == NONE]
        same = [other for other in alike if other.rest == cell.rest] or alike
        chosen = fixed or (same[0] if len(same) == 1 else None)
        if chosen is not None:
            found[cell.label] = chosen
    return found


def varying(runs: Sequence[Run], ignored: Sequence[str] = IGNORED) -> list[str]:
    """Settings that differ between the runs, `_target_`s first; those that begin with `ignored` are left out."""
    names = sorted({name for run in runs for name in run.settings if not name.startswith(tuple(ignored))})
    differing = [name for name in names if len({_shown(run, name) for run in runs}) > 1]
    if all(run.settings.get("teacher.seed") == run.seed for run in runs):  # each seed its own teacher
        differing = [name for name in differing if name != "teacher.seed"]
    return sorted(differing, key=lambda name: not name.endswith("_target_"))


def _shown(run: Run, name: str) -> str:
    return json.dumps(run.settings.get(name), default=str)


def _labels(runs: Sequence[Run], variants: Mapping[str, str]) -> dict[Any, tuple[str, str, str]]:
    """(bits, method, rest) by run folder: equal for the same cell, different for any two cells.

    `rest` names a setting only where bits, method and the settings before do not tell its values apart.
    """
    taqs = {run.settings.get("taq._target_") for run in runs} - {None}
    nems = {_nem(run) for run in runs} - {"off"}
    labels = {run.folder: [*_method(run, variants if len(taqs) > 1 else None, len(nems) > 1), ""] for run in runs}
    for name in varying(runs, (*IGNORED, *MEASURED)):
        alike = defaultdict(list)
        for run in runs:
            alike[tuple(labels[run.folder])].append(run)
        for same in alike.values():
            if len({_shown(run, name) for run in same}) > 1:
                for run in same:
                    value = str(run.settings.get(name))
                    short = value.rpartition(".")[2] if name.endswith("_target_") else value
                    labels[run.folder][2] += f" {name.removesuffix('._target_')}={short}"
    return {folder: (bits, method, rest) for folder, (bits, method, rest) in labels.items()}


def _method(run: Run, variants: Mapping[str, str] | None, name_nem: bool) -> tuple[str, str]:
    settings = run.settings
    weight, act = settings["quant.weight_bits"], settings["quant.act_bits"]
    if weight == act == 32:
        return "fp32", ""
    target, mimics = settings.get("taq._target_"), _nem(run)
    taq = "TaQ" if target else ""
    if target and variants is not None:
        taq = f"TaQ({variants.get(target, str(target).rpartition('.')[2])})"
    nem = "" if mimics == "off" else f"NeM({mimics})" if name_nem else "NeM"
    ptq = "PTQ" if settings.get("quant.mode") == "ptq" else ""
    return f"w{weight}a{act}", "+".join(filter(None, (ptq, taq, nem))) or NONE


def _nem(run: Run) -> str:
    """`off`, also where nothing is trained; else the mode, or `on policy`."""
    if run.settings.get("quant.mode") == "ptq":
        return "off"
    return "on policy" if run.settings.get("nem.on_policy_fraction") else str(run.settings.get("nem.mode", "off"))
