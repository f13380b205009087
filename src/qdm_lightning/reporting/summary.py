"""Runs as cells over seeds: mean, standard deviation (std), 95 % interval, differences to a baseline, gap to the teacher.

A cell is a set of runs that differ in their seed alone. For a measure m with values m_1..m_n over n seeds:

* interval: mean +- t(0.975, n - 1) * std / sqrt(n), Student's t, std with n - 1; none for n = 1.
* difference to the baseline: the same of the differences cell_i - baseline_i, over the seeds i that both have.
* above the teacher: the same of 100 * (cell_i - teacher_i) / mean of the teacher's distance, in percent.
* gap closed: 100 * (baseline - cell) / (baseline - teacher) of the distance, in percent, each the mean over the seeds that
  both cells have. 0 is the baseline, 100 its teacher. None where the teacher is not nearer than the baseline, or the two
  cells had different teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qdm_lightning.diffusion.spec import solver_name
from qdm_lightning.metrics.estimate import Estimate
from qdm_lightning.reporting.collect import Result, Run
from qdm_lightning.reporting.labels import NONE, grouped, identity, labels
from qdm_lightning.reporting.records import METRICS, flatten


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

    def values(self, measure: str, of: str = "scores") -> dict[int, float]:
        """The measure by seed, or with `of="teacher"` the teacher's; empty where no run has it."""
        values = {seed: getattr(result, of) for seed, result in sorted(self.results.items())}
        return {seed: scores[measure] for seed, scores in values.items() if measure in scores}

    def estimate(self, measure: str) -> Estimate:
        """The measure over the seeds, of which one at least has it."""
        return Estimate.of(self.values(measure).values())

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
        p, distances = self.protocol, " and ".join(self.distances) or "no distance"
        how = f", {p['execution']} execution" if "execution" in p else ""
        known = {"kind": p.get("sampler.kind", "sampler"), "scheduler": {"_target_": p.get("sampler.scheduler._target_")}}
        sampler = f"{solver_name(known)} with {p.get('sampler.steps', '?')} steps"
        return f"{p.get('num_samples', '?')} images, {sampler}, {distances}, {p['measured']}{how}"

    def measured(self, measure: str) -> list[Cell]:
        """The cells that have the measure."""
        return [cell for cell in self.cells if cell.values(measure)]

    def teacher(self, distance: str) -> Estimate | None:
        """The teacher's distance over the seeds; None where it was not measured alike."""
        values = {(result.run.seed, result.teacher[distance]) for result in self.results if distance in result.teacher}
        return Estimate.of(value for _, value in sorted(values)) if values else None

    def floor(self, distance: str) -> tuple[str, float] | None:
        """What a perfect generator would reach, and what it is: of as many real images, or, where a record of an older version
        knows no more, of two halves of the real images; None where neither is known."""
        for words, known in (("as many real images", "equals"), ("two halves of the real images", "floor")):
            values = [getattr(result, known)[distance] for result in self.results if distance in getattr(result, known)]
            if values:
                return words, min(values)
        return None


def _is_distance(name: str) -> bool:
    return name == "fid" or name.startswith("fd_")


def all_cells(groups: Sequence[Group]) -> list[Cell]:
    """A cell for each label, in order, with the first result of every seed."""
    by_label = grouped((cell for group in groups for cell in group.cells), lambda cell: cell.label)
    return [
        replace(own[0], results={seed: result for cell in reversed(own) for seed, result in cell.results.items()})
        for own in by_label.values()
    ]


def difference(cell: Cell, baseline: Cell, measure: str) -> Estimate | None:
    """cell - baseline by seed, over the seeds that both have; None where there are none."""
    ours, theirs = _paired(cell.values(measure), baseline.values(measure))
    return Estimate.of(ours - theirs) if len(ours) else None


def above_teacher(cell: Cell, distance: str) -> Estimate | None:
    """100 * (cell - teacher) by seed, over the teacher's mean, in percent; None where there is none."""
    ours, teachers = _paired(cell.values(distance), cell.values(distance, "teacher"))
    return Estimate.of(100 * (ours - teachers) / teachers.mean()) if len(ours) and teachers.mean() > 0 else None


def gap_closed(cell: Cell, baseline: Cell, distance: str) -> float | None:
    """100 * (baseline - cell) / (baseline - teacher) in percent, of means over the seeds that both have (see the module)."""
    columns = [each.values(distance, of) for of in ("scores", "teacher") for each in (cell, baseline)]
    ours, theirs, our_teacher, teacher = _paired(*columns)
    if not len(ours) or not np.allclose(our_teacher, teacher, rtol=1e-4, atol=0):
        return None
    gap = float(np.mean(theirs - teacher))
    return 100 * float(np.mean(theirs - ours)) / gap if gap > 0 else None


def _paired(*columns: dict[int, float]) -> list[np.ndarray]:
    """The values of columns by seed, each at the seeds that all of them have."""
    shared = sorted(set.intersection(*map(set, columns)))
    return [np.array([column[seed] for seed in shared]) for column in columns]


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
    names = labels(list({result.run.folder: result.run for result in results}.values()))
    groups, notes = list[Group](), list[str]()
    by_protocol = grouped(results, lambda result: identity(result.protocol)).values()
    for number, alike in enumerate(sorted(by_protocol, key=lambda alike: _place(alike[0]))):
        cells = []
        for (bits, method, rest), own in grouped(alike, lambda result: names[result.run.folder]).items():
            counts = {result.run.seed: result for result in own}  # the last of a seed
            notes += [
                f"{r.run.name}/{r.source}: {counts[r.run.seed].run.name} is the same cell and seed, and counts"
                for r in own
                if counts[r.run.seed] is not r
            ]
            cells.append(Cell(bits, method, rest, counts))
        cells.sort(key=_order)
        name = chr(ord("A") + number) if number < 26 else f"P{number + 1}"
        groups.append(Group(name, alike[0].protocol, cells, _baselines(cells, baseline)))
    if baseline is not None and not any(group.baselines for group in groups):
        choices = dict.fromkeys(text for group in groups for cell in group.cells for text in (cell.label, cell.series))
        raise ValueError(f"baseline={baseline} is no cell: choose one of {', '.join(map(repr, choices))}")
    return groups, notes


def _place(result: Result) -> tuple[Any, ...]:
    """Where a protocol stands: the runs' own first, then by sampler and steps."""
    kind, steps = result.protocol.get("sampler.kind"), result.protocol.get("sampler.steps")
    return (result.source != METRICS, str(kind), steps if isinstance(steps, int) else 0, identity(result.protocol))


def _order(cell: Cell) -> tuple[Any, ...]:
    widths = [-cell.runs[0].settings[f"quant.{name}"] for name in ("weight_bits", "act_bits")]
    return (*widths, "PTQ" in cell.method, cell.method != NONE, "+" in cell.method, "NeM" in cell.method, cell.series)


def _baselines(cells: Sequence[Cell], asked: str | None) -> dict[str, Cell]:
    fixed = [cell for cell in cells if cell.label == asked]
    chosen = {}
    for cell in cells:
        named = [other for other in cells if other.bits == cell.bits and (asked or NONE) in (other.method, other.series)]
        alike = fixed or [other for other in named if other.rest == cell.rest] or named
        if len(alike) == 1:
            chosen[cell.label] = alike[0]
    return chosen
