"""Which figures a report has: from cells and runs to panels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdm_lightning.display.plots import Line, Panel
from qdm_lightning.metrics.estimate import Estimate
from qdm_lightning.reporting.labels import grouped, identity
from qdm_lightning.reporting.records import read_curves, read_trajectory
from qdm_lightning.reporting.summary import Cell, Group, all_cells

POINTS = 150
"""Points of a loss curve, at most."""

CURVES = {
    "train/loss": "trained loss",
    "val/simple": "validation: L_simple",
    "val/nem": "validation: L_NeM",
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
    return list(dict.fromkeys(cell.series for group in groups for cell in group.cells))


def _lines(points: Iterable[tuple[str, float, Estimate]], dash: str = "") -> list[Line]:
    """A line a series from (its name, x, the estimate of y), in the order of their first points."""
    return [
        Line(name, [x for _, x, _ in own], [e.mean for _, _, e in own], [e.half_width for _, _, e in own], dash)
        for name, own in grouped(points, lambda point: point[0]).items()
    ]


def bits_sketch(group: Group, distance: str) -> Sketch:
    """Distance against bits; a line a method, intervals over seeds, the teacher and the floor across."""
    title, ticks, names = f"{distance} against bits", list(dict.fromkeys(cell.bits for cell in group.cells)), series([group])
    shift = {name: 0.07 * (index - (len(names) - 1) / 2) for index, name in enumerate(names)}
    lines = _lines((c.series, ticks.index(c.bits) + shift[c.series], c.estimate(distance)) for c in group.measured(distance))
    teacher = group.teacher(distance)
    bounds = {"teacher": teacher.mean if teacher else None, **dict([floor] if (floor := group.floor(distance)) else [])}
    panel = Panel(
        title=title,
        xlabel="bits of weights and activations",
        ylabel=distance,
        lines=lines,
        ticks=ticks,
        bounds={name: value for name, value in bounds.items() if value is not None and math.isfinite(value)},
        log_y=None,
    )
    return Sketch(title, "Mean over seeds; bars are 95 % intervals, a ring marks a single seed.", [[panel]])


def bytes_sketch(group: Group, distance: str) -> Sketch | None:
    """Distance against bytes stored; None where no student tells its bytes."""
    sized = [(cell.cost("bytes")[0] / 1e6, cell) for cell in group.measured(distance) if cell.cost("bytes")]
    if not sized:
        return None
    lines = _lines(((cell.series, size, cell.estimate(distance)) for size, cell in sized), dash="none")
    points = [(size, cell.estimate(distance).mean, cell.bits) for size, cell in sized]
    by_size = grouped((point for point in points if math.isfinite(point[1])), lambda point: point[0])
    whole, teacher = [count for cell in group.cells for count in cell.cost("float_bytes")], group.teacher(distance)
    if whole and teacher:
        lines.append(Line("teacher in float32", [max(whole) / 1e6], [teacher.mean], dash="none", ink=True, marker="*"))
    panel = Panel(
        title=f"{distance} and bytes",
        xlabel="stored, MB (logarithmic)",
        ylabel=distance,
        lines=lines,
        texts=list(map(max, by_size.values())),  # the bits, once beside the highest point of each size
        log_x=True,
        log_y=None,
    )
    title = f"Trade-off of {distance} and bytes"
    return Sketch(title, "Lower left is better. Bars are 95 % intervals over the seeds.", [[panel]])


def steps_sketches(groups: Sequence[Group]) -> list[Sketch]:
    """Distance against sampling steps: groups whose protocols are the same but for `sampler.steps`, where there are several."""
    sketches = []
    for family in grouped(groups, lambda group: identity({**group.protocol, "sampler.steps": None})).values():
        for distance in family[0].distances if len(family) > 1 else []:
            ordered = sorted(family, key=lambda group: group.protocol["sampler.steps"])
            panels = [_steps_panel(ordered, distance, bits) for bits in dict.fromkeys(c.bits for g in ordered for c in g.cells)]
            title = f"{distance} against sampling steps, protocols {', '.join(group.name for group in ordered)}"
            caption = "Each number of steps is a protocol of its own; all else is alike. Dashed: the teacher, sampled alike."
            sketches.append(Sketch(title, caption, [panels]))
    return sketches


def _steps_panel(family: Sequence[Group], distance: str, bits: str) -> Panel:
    steps = [(group, float(group.protocol["sampler.steps"])) for group in family]
    lines = _lines(
        (c.series, x, c.estimate(distance)) for group, x in steps for c in group.measured(distance) if c.bits == bits
    )
    teacher = [(x, estimate.mean) for group, x in steps if (estimate := group.teacher(distance))]
    if teacher:
        lines.append(Line("teacher", [x for x, _ in teacher], [mean for _, mean in teacher], ink=True, dash="--"))
    return Panel(title=bits, xlabel="sampling steps", ylabel=distance, lines=lines, log_x=True, log_y=None)


def loss_sketch(groups: Sequence[Group], notes: list[str]) -> Sketch | None:
    """Loss curves of every run: a row a loss, a column a bit-width. Files that cannot be read are added to the notes."""
    lines: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for cell, curves in _each_run(groups, read_curves, notes):
        for name in CURVES.keys() & curves.keys():
            steps, values = curves[name]
            stride = -(-len(steps) // POINTS)
            lines[name, cell.bits].append(Line(cell.series, steps[::stride], values[::stride]))
    bits = list(dict.fromkeys(cell.bits for group in groups for cell in group.cells))
    panels = [
        [Panel(title=f"{width}, {title}", xlabel="step", ylabel="loss", lines=lines[name, width], log_y=True) for width in bits]
        for name, title in CURVES.items()
        if any(lines[name, width] for width in bits)
    ]
    if len(bits) == 1:
        panels = [[row[0] for row in panels]]  # beside one another
    caption = (
        "A line a run, seeds alike in color. The trained loss is L_simple or L_NeM, whichever the method trains: "
        "compare methods on the validation losses. A teacher's curve is there where this run trained it."
    )
    return Sketch("Loss curves", caption, panels) if any(panels) else None


def _each_run(groups: Sequence[Group], read: Callable[[Path], Any], notes: list[str]) -> Iterator[tuple[Cell, Any]]:
    """What `read` finds in the folder of every run; what cannot be read becomes a note."""
    for cell in all_cells(groups):
        for run in cell.runs:
            try:
                yield cell, read(run.folder)
            except (ValueError, OSError) as error:
                notes.append(f"{run.named(error)}; left out of the figures")


def nem_sketch(cells: Sequence[Cell]) -> Sketch | None:
    """L_NeM on the validation set by range of t, mean over seeds, a panel a bit-width; None without students."""
    lines = defaultdict(list)
    for cell in cells:
        errors = [run.student["nem_error"] for run in cell.runs if run.student.get("nem_error")]
        if errors and len({len(error) for error in errors}) == 1:
            width = cell.runs[0].settings.get("diffusion.num_train_timesteps", 1000) / len(errors[0])
            centers = [width * (k + 0.5) for k in range(len(errors[0]))]
            lines[cell.bits].append(Line(cell.series, centers, [float(value) for value in np.mean(errors, axis=0)]))
    caption = (
        "L_NeM = ||eps_FP - eps_Q||² on the validation set in ranges of t, mean over seeds: the error of one step at noised "
        "real images, without what accumulates over the steps."
    )
    return Sketch("Error of the noise estimate by timestep", caption, _by_timestep(lines, "L_NeM")) if lines else None


def _by_timestep(lines: Mapping[str, Sequence[Line]], ylabel: str) -> list[list[Panel]]:
    """A row of panels, one for each bit-width."""
    axes: dict[str, Any] = {"xlabel": "timestep t (sampling goes to the right)", "log_y": True, "falling": True}
    return [[Panel(title=bits, ylabel=ylabel, lines=curves, **axes) for bits, curves in lines.items()]]


def trajectory_sketches(groups: Sequence[Group], notes: list[str]) -> list[Sketch]:
    """The error that accumulates in sampling, where runs were diagnosed; a figure for each way of measuring.

    Files that cannot be read are added to the notes.
    """
    lines: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    runs = list(_each_run(groups, read_trajectory, notes))
    diagnosed = [(cell, *trajectory) for cell, trajectory in runs if trajectory is not None]
    for cell, how, points in diagnosed:
        lines[how][cell.bits].append(Line(cell.series, [t for t, _ in points], [mse for _, mse in points]))
    lacking = len(runs) - len(diagnosed)
    without = f" {lacking} runs were not diagnosed (python -m qdm_lightning.diagnose run=...)." if lacking else ""
    caption = "States x_t of student against teacher from the same noise, a line a run ({} diagnosed): {}.{}"
    return [
        Sketch(
            "Error along the trajectory",
            caption.format(sum(map(len, by_bits.values())), how, without),
            _by_timestep(by_bits, "mean squared error"),
        )
        for how, by_bits in lines.items()
    ]
