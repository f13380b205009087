"""Which figures a report has: from cells and runs to panels."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qdm_lightning.reporting.collect import Run
from qdm_lightning.reporting.figures import Line, Panel
from qdm_lightning.reporting.records import read_trajectory
from qdm_lightning.reporting.summary import Cell, Estimate, Group
from qdm_lightning.reporting.tables import all_cells

POINTS = 150
"""Points of a loss curve, at most."""

CURVES = {
    "train/loss": "trained loss",
    "val/simple": "held out: L_simple",
    "val/nem": "held out: L_NeM",
    "teacher/train/loss": "teacher: trained loss",
}


@dataclass(frozen=True)
class Sketch:
    """A figure before it is drawn."""

    title: str
    caption: str
    panels: list[list[Panel]]


def series(groups: Sequence[Group]) -> list[str]:
    """Names of all series, in the order of the cells of the first bits that has them."""
    return list(dict.fromkeys(cell.series or cell.bits for group in groups for cell in group.cells))


def _name(cell: Cell) -> str:
    return cell.series or cell.bits


def _mean(values: dict[int, float]) -> float:
    return float(np.mean(list(values.values())))


def _teacher(group: Group, distance: str) -> float | None:
    values = {(result.run.seed, result.teacher[distance]) for result in group.results if distance in result.teacher}
    return float(np.mean([value for _, value in sorted(values)])) if values else None


def bits_sketch(group: Group, distance: str) -> Sketch:
    """Distance against bits; a line a method, intervals over seeds, the teacher and the floor across."""
    ticks = list(dict.fromkeys(cell.bits for cell in group.cells))
    names = list(dict.fromkeys(map(_name, group.cells)))
    lines = []
    for index, name in enumerate(names):
        cells = [cell for cell in group.cells if _name(cell) == name and cell.values(distance)]
        shift = 0.07 * (index - (len(names) - 1) / 2)
        estimates = [Estimate.of(cell.values(distance).values()) for cell in cells]
        x = [ticks.index(cell.bits) + shift for cell in cells]
        lines.append(Line(name, x, [e.mean for e in estimates], [e.half_width for e in estimates]))
    floor = next((result.floor[distance] for result in group.results if distance in result.floor), None)
    bounds = {"teacher": _teacher(group, distance), "two halves of the real images": floor}
    panel = Panel(
        title=f"{distance} against bits",
        xlabel="bits of weights and activations",
        ylabel=distance,
        lines=lines,
        ticks=ticks,
        bounds={name: value for name, value in bounds.items() if value is not None and math.isfinite(value)},
        log_y=_wide(lines),
    )
    return Sketch(
        f"{distance} against bits", "Mean over seeds; bars are 95 % intervals, a ring marks a single seed.", [[panel]]
    )


def _wide(lines: Sequence[Line]) -> bool:
    """Whether values span more than a decade."""
    values = [y for line in lines for y in line.y if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def bytes_sketch(group: Group, distance: str) -> Sketch | None:
    """Distance against bytes stored; None where no student tells its bytes."""
    lines = []
    for name in dict.fromkeys(map(_name, group.cells)):
        cells = [cell for cell in group.cells if _name(cell) == name and cell.values(distance) and cell.cost("bytes")]
        estimates = [Estimate.of(cell.values(distance).values()) for cell in cells]
        x = [cell.cost("bytes")[0] / 1e6 for cell in cells]
        if cells:
            lines.append(Line(name, x, [e.mean for e in estimates], [e.half_width for e in estimates]))
    if not lines:
        return None
    top: dict[float, tuple[float, str]] = {}  # the bits, once beside the highest point of each size
    for cell in group.cells:
        if cell.values(distance) and cell.cost("bytes"):
            size, y = cell.cost("bytes")[0] / 1e6, _mean(cell.values(distance))
            if math.isfinite(y):
                top[size] = max(top.get(size, (y, cell.bits)), (y, cell.bits))
    texts = [(x, y, text) for x, (y, text) in top.items()]
    whole = {stored / 1e6 for cell in group.cells for stored in cell.cost("float_bytes")}
    teacher = _teacher(group, distance)
    stars = {"teacher in float32": (max(whole), teacher)} if whole and teacher is not None else None
    panel = Panel(
        title=f"{distance} and bytes",
        xlabel="stored, MB (logarithmic)",
        ylabel=distance,
        lines=lines,
        texts=texts,
        stars=stars,
        joined=False,
        log_x=True,
        log_y=_wide(lines),
    )
    return Sketch(
        f"Trade-off of {distance} and bytes", "Lower left is better. Bars are 95 % intervals over the seeds.", [[panel]]
    )


def steps_sketches(groups: Sequence[Group]) -> list[Sketch]:
    """Distance against sampling steps: groups whose protocols are the same but for `sampler.steps`, where there are several."""
    families = defaultdict(list)
    for group in groups:
        rest = {name: value for name, value in group.protocol.items() if name != "sampler.steps"}
        families[json.dumps(rest, sort_keys=True, default=str)].append(group)
    sketches = []
    for family in families.values():
        for distance in family[0].distances if len(family) > 1 else []:
            ordered = sorted(family, key=lambda group: group.protocol["sampler.steps"])
            panels = [_steps_panel(ordered, distance, bits) for bits in dict.fromkeys(c.bits for g in ordered for c in g.cells)]
            title = f"{distance} against sampling steps, protocols {', '.join(group.name for group in ordered)}"
            caption = "Each number of steps is a protocol of its own; all else is alike. Dashed: the teacher, sampled alike."
            sketches.append(Sketch(title, caption, [panels]))
    return sketches


def _steps_panel(family: Sequence[Group], distance: str, bits: str) -> Panel:
    points = defaultdict(list)
    for group in family:
        for cell in group.cells:
            if cell.bits == bits and cell.values(distance):
                points[_name(cell)].append((group.protocol["sampler.steps"], Estimate.of(cell.values(distance).values())))
    lines = [
        Line(name, [float(steps) for steps, _ in found], [e.mean for _, e in found], [e.half_width for _, e in found])
        for name, found in points.items()
    ]
    teacher = [(float(g.protocol["sampler.steps"]), value) for g in family if (value := _teacher(g, distance)) is not None]
    if teacher:
        lines.append(Line("teacher", [steps for steps, _ in teacher], [value for _, value in teacher], ink=True))
    return Panel(title=bits, xlabel="sampling steps", ylabel=distance, lines=lines, log_x=True, log_y=_wide(lines))


def loss_sketch(groups: Sequence[Group]) -> tuple[Sketch | None, list[str]]:
    """Loss curves of every run: a row a loss, a column a bit-width; and notes on files that could not be read."""
    cells, notes = all_cells(groups), []
    curves: dict[str, dict[str, list[Line]]] = {name: defaultdict(list) for name in CURVES}
    for cell in cells:
        for result in cell.results.values():
            try:
                found = result.run.curves
            except ValueError as error:
                notes.append(f"{error}: no loss curve of it")
                continue
            for name in CURVES.keys() & found.keys():
                steps, values = found[name]
                stride = max(1, -(-len(steps) // POINTS))
                curves[name][cell.bits].append(Line(_name(cell), steps[::stride], values[::stride]))
    bits = list(dict.fromkeys(cell.bits for cell in cells))
    panels = [
        [
            Panel(title=f"{width}, {title}", xlabel="step", ylabel="loss", lines=curves[name][width], log_y=True)
            for width in bits
        ]
        for name, title in CURVES.items()
        if curves[name]
    ]
    if len(bits) == 1:
        panels = [[row[0] for row in panels]]  # beside one another
    caption = (
        "A line a run, seeds alike in color. The trained loss is L_simple or L_NeM, whichever the method trains: "
        "compare methods on the held-out losses. A teacher's curve is there where this run trained it."
    )
    return (Sketch("Loss curves", caption, panels) if any(panels) else None), notes


def nem_sketch(cells: Sequence[Cell]) -> Sketch | None:
    """L_NeM on the held-out set by range of t, mean over seeds, a panel a bit-width; None without students."""
    panels = []
    for bits in dict.fromkeys(cell.bits for cell in cells):
        lines = []
        for cell in cells:
            errors = [r.run.student["nem_error"] for r in cell.results.values() if r.run.student.get("nem_error")]
            if cell.bits == bits and errors and len({len(error) for error in errors}) == 1:
                settings = next(iter(cell.results.values())).run.settings
                width = settings.get("diffusion.num_train_timesteps", 1000) / len(errors[0])
                centers = [width * (k + 0.5) for k in range(len(errors[0]))]
                lines.append(Line(_name(cell), centers, [float(value) for value in np.mean(errors, axis=0)]))
        if lines:
            panels.append(
                Panel(
                    title=bits,
                    xlabel="timestep t (sampling goes to the right)",
                    ylabel="L_NeM",
                    lines=lines,
                    log_y=True,
                    falling=True,
                )
            )
    caption = (
        "L_NeM = ||eps_FP - eps_Q||² on the held-out set in ranges of t, mean over seeds: the error of one step at noised "
        "real images, without what gathers over the steps."
    )
    return Sketch("Error of the noise estimate by timestep", caption, [panels]) if panels else None


def trajectory_sketches(groups: Sequence[Group]) -> tuple[list[Sketch], list[str]]:
    """The error that gathers over sampling, where runs were diagnosed; a figure for each way of measuring, and notes."""
    found: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    notes: list[str] = []
    lacking: list[Run] = []
    for cell in all_cells(groups):
        for result in cell.results.values():
            try:
                read = read_trajectory(result.run.folder)
            except ValueError as error:
                notes.append(f"{result.run.name}/{error}: left out of the error along the trajectory")
                continue
            if read is None:
                lacking.append(result.run)
                continue
            how, t, mse = read
            found[how][cell.bits].append(Line(_name(cell), t, mse))
    sketches = []
    for how, by_bits in found.items():
        panels = [
            Panel(
                title=bits,
                xlabel="timestep t (sampling goes to the right)",
                ylabel="mean squared error",
                lines=lines,
                log_y=True,
                falling=True,
            )
            for bits, lines in by_bits.items()
        ]
        count = sum(map(len, by_bits.values()))
        caption = f"States x_t of student against teacher from the same noise, a line a run ({count} diagnosed): {how}."
        if lacking:
            caption += f" {len(lacking)} runs were not diagnosed (python -m qdm_lightning.diagnose run=...)."
        sketches.append(Sketch("Error along the trajectory", caption, [panels]))
    return sketches, notes
