"""Runs as cells over seeds: mean, standard deviation (std), 95 % interval, differences to a baseline, gap to the teacher.

A cell is a set of runs that differ in their seed alone. For a measure m with values m_1..m_n over n seeds:

* interval: mean +- t(0.975, n - 1) * std / sqrt(n), Student's t, std with n - 1; none for n = 1.
* difference to the baseline: the same of the differences cell_i - baseline_i, over the seeds i that both have.
* gap closed: 100 * (baseline - cell) / (baseline - teacher) of the distance, in percent, each the mean over the seeds that
  both cells have. 0 is the baseline, 100 its teacher. None where the teacher is not nearer than the baseline, or the two
  cells had different teachers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.special import stdtrit  # scipy.stats would take a second to load

from qdm_lightning.quantization.spec import TAQ
from qdm_lightning.reporting.collect import Result, Run
from qdm_lightning.reporting.records import METRICS, flatten

IGNORED = ("seed", "run", "paths.", "logger.", "tags", "trainer.threads", "callbacks.", "data.cache", "data.verify")
"""Beginnings of settings that do not make another cell."""

MEASURED = ("sampler.", "num_samples", "metrics.")
"""Beginnings of settings that belong to the protocol: they do not make another cell either."""

NONE = "none"
"""Method of a trained cell without TaQ and NeM."""

T = TypeVar("T")


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items by their key, in the order of first appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


@dataclass(frozen=True)
class Estimate:
    """Mean over n seeds, their standard deviation, and half the width of the mean's 95 % interval (NaN for one seed)."""

    mean: float
    std: float
    half_width: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """From one value a seed, at least one."""
        array = np.array(list(values), dtype=float)
        n = len(array)
        std = float(array.std(ddof=1)) if n > 1 else math.nan
        return cls(float(array.mean()), std, float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n) if n > 1 else math.nan, n)

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
        """The label without the bits; the bits where nothing else is left."""
        return (self.method + self.rest).strip() or self.bits

    @property
    def label(self) -> str:
        return f"{self.bits} {self.method}{self.rest}".strip()

    @property
    def runs(self) -> list[Run]:
        return [result.run for result in self.results.values()]

    def values(self, measure: str) -> dict[int, float]:
        """The measure by seed; empty where no run has it."""
        return {seed: r.scores[measure] for seed, r in sorted(self.results.items()) if measure in r.scores}

    def estimate(self, measure: str) -> Estimate:
        """The measure over the seeds, of which one at least has it."""
        return Estimate.of(self.values(measure).values())

    def teacher(self, measure: str) -> dict[int, float]:
        """The teacher's measure by seed."""
        return {seed: r.teacher[measure] for seed, r in sorted(self.results.items()) if measure in r.teacher}

    def cost(self, name: str) -> list[float]:
        """Distinct values of `student.cost` (`speedup.linear` and so on), which should be one."""
        values = [flatten(run.student.get("cost", {})).get(name) for run in self.runs]
        return sorted({float(value) for value in values if isinstance(value, int | float)})


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
        names = dict.fromkeys(name for result in self.results for name in result.scores)
        return sorted(names, key=lambda name: not _is_distance(name))

    @property
    def distances(self) -> list[str]:
        """Frechet distances: `fid` over Inception features, `fd_<network>` over others."""
        return list(filter(_is_distance, self.measures))

    @property
    def title(self) -> str:
        """Short: images, sampler, feature network, and who measured."""
        p = self.protocol
        sampler = f"{p.get('sampler.kind', 'sampler')} with {p.get('sampler.steps', '?')} steps"
        distances = " and ".join(self.distances) or "no distance"
        return f"{p.get('num_samples', '?')} images, {sampler}, {distances}, {p['measured']}"

    def measured(self, measure: str) -> list[Cell]:
        """The cells that have the measure."""
        return [cell for cell in self.cells if cell.values(measure)]

    def teacher(self, distance: str) -> Estimate | None:
        """The teacher's distance over the seeds; None where it was not measured alike."""
        values = {(result.run.seed, result.teacher[distance]) for result in self.results if distance in result.teacher}
        return Estimate.of(value for _, value in sorted(values)) if values else None

    def floor(self, distance: str) -> float | None:
        """The distance between two halves of the real images, where it is known."""
        return min((result.floor[distance] for result in self.results if distance in result.floor), default=None)


def _is_distance(name: str) -> bool:
    return name == "fid" or name.startswith("fd_")


def all_cells(groups: Sequence[Group]) -> list[Cell]:
    """A cell for each label, in order, with the first result of every seed."""
    cells: dict[str, Cell] = {}
    for group in groups:
        for cell in group.cells:
            whole = cells.setdefault(cell.label, Cell(cell.bits, cell.method, cell.rest))
            whole.results = {**cell.results, **whole.results}
    return list(cells.values())


def difference(cell: Cell, baseline: Cell, measure: str) -> Estimate | None:
    """cell - baseline by seed, over the seeds that both have; None where there are none."""
    ours, theirs = cell.values(measure), baseline.values(measure)
    shared = sorted(ours.keys() & theirs.keys())
    return Estimate.of(ours[seed] - theirs[seed] for seed in shared) if shared else None


def gap_closed(cell: Cell, baseline: Cell, distance: str) -> float | None:
    """100 * (baseline - cell) / (baseline - teacher) in percent, of means over the seeds that both have (see the module)."""
    columns = (cell.values(distance), baseline.values(distance), cell.teacher(distance), baseline.teacher(distance))
    shared = sorted(set.intersection(*map(set, columns)))
    if not shared:
        return None
    ours, theirs, our_teacher, teacher = (np.array([column[seed] for seed in shared]) for column in columns)
    if not np.allclose(our_teacher, teacher, rtol=1e-4, atol=0):
        return None
    gap = float(np.mean(theirs - teacher))
    return 100 * float(np.mean(theirs - ours)) / gap if gap > 0 else None


def summarize(results: Sequence[Result], baseline: str | None = None) -> tuple[list[Group], list[str]]:
    """Results as groups of one protocol, their cells, and the baseline of each.

    Args:
        results: at least one.
        baseline: label of a cell for all differences, or a method for those of equal bits; None takes `none` at equal bits.

    Returns:
        Groups, those measured at the end of training first, and notes on what was left out.

    Raises:
        ValueError: nothing is called `baseline`.
    """
    labels = _labels(list({result.run.folder: result.run for result in results}.values()))
    by_protocol = grouped(results, lambda result: json.dumps(result.protocol, sort_keys=True, default=str))
    groups, notes = [], []
    for number, key in enumerate(sorted(by_protocol, key=lambda key: _place(by_protocol[key][0], key))):
        cells: dict[tuple[str, str, str], Cell] = {}
        for result in by_protocol[key]:
            label = labels[result.run.folder]
            cell = cells.setdefault(label, Cell(*label))
            if result.run.seed in cell.results:
                earlier = cell.results[result.run.seed]
                notes.append(f"{earlier.run.name}/{earlier.source}: {result.run.name} is the same cell and seed, and counts")
            cell.results[result.run.seed] = result
        name = chr(ord("A") + number) if number < 26 else f"P{number + 1}"
        ordered = sorted(cells.values(), key=_order)
        groups.append(Group(name, by_protocol[key][0].protocol, ordered, _baselines(ordered, baseline)))
    if baseline is not None and not any(group.baselines for group in groups):
        names = dict.fromkeys(text for group in groups for cell in group.cells for text in (cell.label, cell.series))
        raise ValueError(f"baseline={baseline} is no cell: choose one of {', '.join(map(repr, names))}")
    return groups, notes


def _place(result: Result, key: str) -> tuple[Any, ...]:
    """Where a protocol stands: the runs' own first, then by sampler and steps."""
    steps = result.protocol.get("sampler.steps")
    return (result.source != METRICS, str(result.protocol.get("sampler.kind")), steps if isinstance(steps, int) else 0, key)


def _order(cell: Cell) -> tuple[Any, ...]:
    widths = [-cell.runs[0].settings[f"quant.{name}"] for name in ("weight_bits", "act_bits")]
    return (*widths, "PTQ" in cell.method, cell.method != NONE, "+" in cell.method, "NeM" in cell.method, cell.series)


def _baselines(cells: Sequence[Cell], asked: str | None) -> dict[str, Cell]:
    fixed = next((cell for cell in cells if cell.label == asked), None)
    if fixed:
        return {cell.label: fixed for cell in cells}
    chosen = {}
    for cell in cells:
        alike = [other for other in cells if other.bits == cell.bits and (asked or NONE) in (other.method, other.series)]
        same = [other for other in alike if other.rest == cell.rest] or alike
        if len(same) == 1:
            chosen[cell.label] = same[0]
    return chosen


def varying(runs: Sequence[Run], ignored: Sequence[str] = IGNORED) -> list[str]:
    """Settings that differ between the runs, `_target_`s first; those that begin with `ignored` are left out."""
    names = sorted({name for run in runs for name in run.settings if not name.startswith(tuple(ignored))})
    if all(run.settings.get("teacher.seed") == run.seed for run in runs):  # each seed its own teacher
        names = [name for name in names if name != "teacher.seed"]
    return sorted(filter(lambda name: _differs(runs, name), names), key=lambda name: not name.endswith("_target_"))


def _differs(runs: Sequence[Run], name: str) -> bool:
    return len({json.dumps(run.settings.get(name), default=str) for run in runs}) > 1


def _labels(runs: Sequence[Run]) -> dict[Path, tuple[str, str, str]]:
    """(bits, method, rest) by run folder: equal for the same cell, different for any two cells.

    `rest` names a setting only where bits, method and the settings before do not tell its values apart.
    """
    several_taq = len({_taq(run) for run in runs} - {""}) > 1
    several_nem = len({_nem(run) for run in runs} - {""}) > 1
    labels = {run.folder: [*_method(run, several_taq, several_nem), ""] for run in runs}
    for name in varying(runs, (*IGNORED, *MEASURED)):
        for alike in grouped(runs, lambda run: tuple(labels[run.folder])).values():
            for run in alike if _differs(alike, name) else ():
                value = str(run.settings.get(name))
                short = value.rpartition(".")[2] if name.endswith("_target_") else value
                labels[run.folder][2] += f" {name.removesuffix('._target_')}={short}"
    return {folder: (bits, method, rest) for folder, (bits, method, rest) in labels.items()}


def _method(run: Run, several_taq: bool, several_nem: bool) -> tuple[str, str]:
    """Bits and method (see `Cell`)."""
    weight, act = run.settings["quant.weight_bits"], run.settings["quant.act_bits"]
    if weight == act == 32:
        return "fp32", ""
    taq, nem = _taq(run), _nem(run)
    parts = ["PTQ"] if run.settings.get("quant.mode") == "ptq" else []
    parts += [f"TaQ({taq})" if several_taq else "TaQ"] if taq else []
    parts += [f"NeM({nem})" if several_nem else "NeM"] if nem else []
    return f"w{weight}a{act}", "+".join(parts) or NONE


def _taq(run: Run) -> str:
    """The variant's name as it is typed, or its class; empty without one."""
    target = str(run.settings.get("taq._target_") or "")
    names = {getattr(kind, "_target_", ""): name for name, kind in TAQ.items() if name != "off"}
    return names.get(target, target.rpartition(".")[2])


def _nem(run: Run) -> str:
    """The mode, or `on policy`; empty without one, also where nothing is trained."""
    if run.settings.get("quant.mode") == "ptq":
        return ""
    mode = "on policy" if run.settings.get("nem.on_policy_fraction") else str(run.settings.get("nem.mode", "off"))
    return "" if mode == "off" else mode
