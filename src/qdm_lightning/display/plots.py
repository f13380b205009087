"""Every plot of the package: one style, and panels of lines or boxes from plain numbers, as PNG or SVG."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from qdm_lightning.base.files import write_whole

COLORS = ("#0072b2", "#d55e00", "#008a65", "#b04f8a", "#a87400", "#2b8fc9")
"""Of the series: after Okabe and Ito, told apart with any kind of color vision, and dark enough on white."""

MARKERS, DASHES = "osD^vP", ("-", "--", ":", "-.")

MOST_ACROSS = 8
"""So many names of ticks stand beside one another; more are turned."""

INK = "#010203"
"""Of text, axes and bounds; no series has it, so that an SVG can put the page's own color in its place."""

STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK),
    "font.size": 9,
    "figure.titlesize": 11,
    "axes.titlesize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 5.5,
    "errorbar.capsize": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "savefig.dpi": 110,
    "svg.fonttype": "none",
    "text.parse_math": False,  # text from files is text, no formula, whatever its signs
}
"""Settings of matplotlib."""


@dataclass(frozen=True)
class Line:
    """A series of a panel.

    Args:
        name: as in the legend; the same name has the same look in every plot.
        x, y: coordinates of the points; a point that is not finite is left out.
        error: half widths of intervals, NaN for none: such a point gets a ring. None draws no markers.
        dash: the line's style where it is not the series' own; `none` draws the points alone.
        ink: drawn in the color of the text instead: a bound, not a series.
        marker: drawn large at each point, in place of the series' own.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    dash: str = ""
    ink: bool = False
    marker: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes with lines, texts beside points, and horizontal lines that bound the values.

    Args:
        ticks: names of the positions 0, 1, ... of x; None leaves numbers.
        texts: (x, y, text).
        bounds: name to value, drawn across.
        log_x: a logarithmic axis.
        log_y: the same, where all values are positive; None where they span more than a decade besides.
        falling: x falls from left to right, as timesteps do in sampling.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    ticks: Sequence[str] | None = None
    texts: Sequence[tuple[float, float, str]] = ()
    bounds: Mapping[str, float] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool | None = False
    falling: bool = False


@dataclass(frozen=True, kw_only=True)
class BoxPanel:
    """Boxes over timesteps, of one quantity in one or several runs side by side.

    Args:
        timesteps: positions, (S,).
        boxes: run to S times (1 %, 25 %, 50 %, 75 %, 99 %).
        limits: values that are drawn as lines, such as the ends of a grid.
    """

    title: str
    ylabel: str
    timesteps: Sequence[int]
    boxes: Mapping[str, Sequence[Sequence[float]]]
    limits: Sequence[float] = ()

    xlabel = "timestep t"


def save_png(path: Path, rows: Sequence[Sequence[Panel | BoxPanel]], title: str) -> None:
    """Draw rows of panels as PNG; run k has the k-th color. Raises ValueError without panels, or where rows differ."""
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError("a plot needs rows of equally many panels, at least one")
    names = list(dict.fromkeys(name for row in rows for panel in row for name in _series(panel)))
    write_whole(path, picture(rows, names, title, panel_size=(4.6, 2.7), format="png"), checksum=False)


def _series(panel: Panel | BoxPanel) -> list[str]:
    return list(panel.boxes) if isinstance(panel, BoxPanel) else [line.name for line in panel.lines]


def picture(
    rows: Sequence[Sequence[Panel | BoxPanel]],
    names: Sequence[str],
    title: str = "",
    salt: str = "",
    panel_size: tuple[float, float] = (3.3, 2.5),
    **options: Any,
) -> bytes:
    """The file's content; the place of a panel without series stays empty.

    Args:
        rows: of equally many panels.
        names: of all series, in order: it decides their looks.
        title: above all panels.
        salt: another one for every SVG of a page, so that no two share an id.
        panel_size: width and height of a panel in inches, where there are several.
        options: of `Figure.savefig`, such as `format`.
    """
    columns, stream, legend = len(rows[0]), io.BytesIO(), dict[str, Any]()
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a browser has the font, not matplotlib
        size = (5.6, 3.7) if columns * len(rows) == 1 else (panel_size[0] * columns + 0.4, panel_size[1] * len(rows) + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        for panels, line in zip(rows, figure.subplots(len(rows), columns, squeeze=False), strict=True):
            for panel, ax in zip(panels, line, strict=True):
                if isinstance(panel, BoxPanel):
                    _draw_boxes(ax, panel, names, legend)
                else:
                    _draw_lines(ax, panel, names, legend)
                ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, visible=bool(_series(panel)))
        if title:
            figure.suptitle(title)
        if legend:
            wide = max(1, min(len(legend), int(size[0] * 14) // max(8 + len(name) for name in legend)))
            figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=wide)
        figure.savefig(stream, **options)
    return stream.getvalue()


def _draw_boxes(ax: Any, panel: BoxPanel, names: Sequence[str], legend: dict[str, Any]) -> None:
    width = 0.8 / len(panel.boxes)
    for index, (run, boxes) in enumerate(panel.boxes.items()):
        color = COLORS[names.index(run) % len(COLORS)]
        drawn = ax.bxp(
            [dict(zip(("whislo", "q1", "med", "q3", "whishi"), box, strict=True)) for box in boxes],
            positions=[k + (index - (len(panel.boxes) - 1) / 2) * width for k in range(len(boxes))],
            widths=0.85 * width,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": (color, 0.55), "edgecolor": color},
            medianprops={"color": INK},
            whiskerprops={"color": color},
            capprops={"color": color},
        )
        legend.setdefault(run, drawn["boxes"][0])
    for value in panel.limits:
        ax.axhline(value, color=INK, linestyle=":", linewidth=1)
    ax.set_xticks(range(len(panel.timesteps)), [str(t) for t in panel.timesteps])


def _draw_lines(ax: Any, panel: Panel, names: Sequence[str], legend: dict[str, Any]) -> None:
    for line in panel.lines:
        legend.setdefault(line.name, _draw_line(ax, line, names))
    for dash, (name, value) in zip(("--", ":", "-."), panel.bounds.items(), strict=False):
        legend.setdefault(name, ax.axhline(value, color=INK, linestyle=dash, linewidth=1))
    for x, y, text in panel.texts:
        ax.annotate(text, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=7.5)
    if panel.ticks is not None:
        ax.set(xticks=range(len(panel.ticks)), xticklabels=list(panel.ticks), xlim=(-0.5, len(panel.ticks) - 0.5))
        if len(panel.ticks) > MOST_ACROSS:
            ax.tick_params(axis="x", rotation=90)
    if panel.log_x:
        ax.set_xscale("log")
        positions = sorted({x for line in panel.lines for x in line.x})
        if len(positions) <= 8:
            ax.set_xticks(positions, [f"{x:.3g}" for x in positions])
            labels = ax.get_xticklabels()
            room = math.log(positions[-1] / positions[0]) / 12  # two labels that are nearer would lie on one another
            shown = positions[0]
            for x, label in zip(positions[1:], labels[1:], strict=True):
                label.set_visible(math.log(x / shown) > room)
                shown = x if label.get_visible() else shown
            ax.minorticks_off()
    values = [y for line in panel.lines for y in line.y if math.isfinite(y)]
    low, high = min(values, default=0), max(values, default=0)
    if low > 0 and (panel.log_y or (panel.log_y is None and high > 10 * low)):
        ax.set_yscale("log")
        ax.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)),
            major_formatter=lambda value, _: f"{value:g}",
            minor_formatter=NullFormatter(),
        )
    if panel.falling:
        ax.invert_xaxis()


def _draw_line(ax: Any, line: Line, names: Sequence[str]) -> Any:
    """What the legend shows. The second six series differ from the first in their dash."""
    index = 0 if line.ink else names.index(line.name)
    color = INK if line.ink else COLORS[index % len(COLORS)]
    marker = line.marker or ("" if line.error is None else MARKERS[index % len(MARKERS)])
    dash = line.dash or DASHES[index // len(COLORS) % len(DASHES)]
    error = [math.nan] * len(line.x) if line.error is None else line.error
    points = [point for point in zip(line.x, line.y, error, strict=True) if all(map(math.isfinite, point[:2]))]
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    (handle,) = ax.plot(xs, ys, color=color, linestyle=dash, marker=marker, markersize=11 if line.marker else None)
    for x, y, half_width in points if line.error is not None else ():
        if math.isfinite(half_width):
            ax.errorbar(x, y, yerr=half_width, color=color)
        else:
            ax.plot(x, y, marker=marker, markersize=9, color=color, fillstyle="none")
    return handle
