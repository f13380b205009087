"""Plots as PNG: boxes over timesteps, curves over the steps of sampling. From plain numbers alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qdm_lightning.base.files import write_whole

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of Okabe and Ito: told apart with any kind of color vision."""

GRID = "#d9d9d9"


@dataclass(frozen=True, kw_only=True)
class BoxPanel:
    """Boxes over timesteps, of one quantity in one or several runs side by side.

    Args:
        title, ylabel: of the panel.
        timesteps: positions, (S,).
        boxes: run to S times (1 %, 25 %, 50 %, 75 %, 99 %).
        limits: values that are drawn as lines, such as the ends of a grid.
    """

    title: str
    ylabel: str
    timesteps: Sequence[int]
    boxes: Mapping[str, Sequence[Sequence[float]]]
    limits: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class CurvePanel:
    """Curves over timesteps, which fall from left to right as sampling goes.

    Args:
        title, ylabel: of the panel.
        curves: run to (timesteps, values).
        dashed: the same, drawn dashed in the color of the same run.
        log: logarithmic values.
    """

    title: str
    ylabel: str
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    dashed: Mapping[str, tuple[Sequence[int], Sequence[float]]] = field(default_factory=dict)
    log: bool = False


def save_boxes(path: Path, rows: Sequence[Sequence[BoxPanel]], title: str) -> None:
    """Draw rows of panels; run k has the k-th color everywhere. Raises ValueError without panels, or where rows differ."""
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError("boxes need rows of equally many panels, at least one")
    columns = len(rows[0])
    figure = Figure(figsize=(4.6 * columns, 2.2 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    runs = list(dict.fromkeys(run for row in rows for panel in row for run in panel.boxes))
    for row, line in zip(rows, axes, strict=True):
        for panel, ax in zip(row, line, strict=True):
            _draw_boxes(ax, panel, runs)
    for ax in axes[-1]:
        ax.set_xlabel("timestep t")
    _finish(path, figure, title, runs)


def _draw_boxes(ax: Any, panel: BoxPanel, runs: Sequence[str]) -> None:
    width = 0.8 / max(len(panel.boxes), 1)
    for index, (run, boxes) in enumerate(panel.boxes.items()):
        names = ("whislo", "q1", "med", "q3", "whishi")
        statistics = [{**dict(zip(names, box, strict=True)), "fliers": []} for box in boxes]
        color = COLORS[runs.index(run) % len(COLORS)]
        ax.bxp(
            statistics,
            positions=[k + (index - (len(panel.boxes) - 1) / 2) * width for k in range(len(boxes))],
            widths=0.85 * width,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": color, "alpha": 0.55, "edgecolor": color},
            medianprops={"color": "black"},
            whiskerprops={"color": color},
            capprops={"color": color},
        )
    for value in panel.limits:
        ax.axhline(value, color="black", linestyle=":", linewidth=1)
    ax.set_xticks(range(len(panel.timesteps)), [str(t) for t in panel.timesteps])
    _dress(ax, panel.title, panel.ylabel)


def save_curves(path: Path, panels: Sequence[CurvePanel], title: str) -> None:
    """Draw panels side by side; run k has the k-th color everywhere. Raises ValueError without panels."""
    if not panels:
        raise ValueError("curves need at least one panel")
    figure = Figure(figsize=(5.4 * len(panels), 4.2), layout="constrained")
    runs = list(dict.fromkeys(run for panel in panels for run in panel.curves))
    for panel, ax in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for style, curves in (("-", panel.curves), ("--", panel.dashed)):
            for run, (t, values) in curves.items():
                ax.plot(t, values, style, color=COLORS[runs.index(run) % len(COLORS)], linewidth=1.6)
        ax.invert_xaxis()
        if panel.log and all(value > 0 for curves in (panel.curves, panel.dashed) for _, v in curves.values() for value in v):
            ax.set_yscale("log")
        ax.set_xlabel("timestep t (sampling goes to the right)")
        _dress(ax, panel.title, panel.ylabel)
    _finish(path, figure, title, runs)


def _dress(ax: Any, title: str, ylabel: str) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=8)
    ax.tick_params(which="both", labelsize=7)
    ax.grid(axis="y", color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def _finish(path: Path, figure: Figure, title: str, runs: Sequence[str]) -> None:
    """Title, a legend below, and the file."""
    figure.suptitle(title, fontsize=11)
    handles = [_patch(COLORS[index % len(COLORS)]) for index in range(len(runs))]
    figure.legend(handles, list(runs), loc="outside lower center", ncols=min(len(runs), 3), fontsize=8, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    write_whole(path, stream.getvalue())


def _patch(color: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=color)
