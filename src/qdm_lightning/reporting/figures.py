"""Figures of the report as inline SVG: text in `currentColor`, series in CSS variables: light and dark both fit."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from qdm_lightning.display.plots import COLORS

INK = "#010203"
"""Stands for `currentColor` while matplotlib draws."""

MARKERS, DASHES = "osD^vP", ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Line:
    """A series of a panel.

    Args:
        name: as in the legend; the same name has the same look in every figure.
        x, y: of the points; a point that is not finite is left out.
        error: half widths of intervals, NaN for none: such a point gets a ring. None draws no markers.
        ink: drawn dashed in the color of the text instead: a bound, not a series.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    ink: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes: lines, texts beside points, and horizontal lines that bound the values.

    Args:
        ticks: names of the positions 0, 1, ... of x; None leaves numbers.
        texts: (x, y, text).
        bounds: name to value, drawn across.
        joined: whether points of a series are joined.
        stars: name to (x, y): single points in the ink.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    ticks: Sequence[str] | None = None
    texts: Sequence[tuple[float, float, str]] = ()
    bounds: Mapping[str, float] | None = None
    stars: Mapping[str, tuple[float, float]] | None = None
    joined: bool = True
    log_x: bool = False
    log_y: bool = False
    falling: bool = False


def draw(panels: Sequence[Sequence[Panel]], names: Sequence[str], description: str, salt: str) -> str:
    """The `<svg>` of rows of equally many panels; the place of one without lines stays empty.

    Args:
        names: of all series of the report, in order: it decides their looks.
        description: for those who do not see it.
        salt: another one for every figure of a page, so that no two share an id.
    """
    columns, rows = len(panels[0]), len(panels)
    with _style(salt):
        size = (5.6, 3.7) if columns * rows == 1 else (3.3 * columns + 0.4, 2.5 * rows + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        handles: dict[str, Any] = {}
        for line, row in zip(panels, figure.subplots(rows, columns, squeeze=False), strict=True):
            for panel, ax in zip(line, row, strict=True):
                if panel.lines:
                    _panel(ax, panel, names, handles)
                else:
                    ax.set_axis_off()
        if handles:
            wide = max(1, min(len(handles), int(size[0] * 14) // max(8 + len(name) for name in handles)))
            figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=wide, frameon=False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(stream.getvalue(), description)


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Settings of matplotlib for one figure; text from files is text, no formula, whatever its signs."""
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 9}
    settings |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "legend.fontsize": 8.5}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has the font, not matplotlib
        yield


def _look(name: str, names: Sequence[str]) -> tuple[str, str, str]:
    """Color, marker and dash; the second six series differ from the first in their dash."""
    index = list(names).index(name)
    return (
        COLORS[index % len(COLORS)],
        MARKERS[index % len(MARKERS)],
        DASHES[index // len(COLORS) % len(DASHES)],
    )


def _panel(ax: Any, panel: Panel, names: Sequence[str], handles: dict[str, Any]) -> None:
    for line in panel.lines:
        color, marker, dash = (INK, "", "--") if line.ink else _look(line.name, names)
        points = [k for k, (x, y) in enumerate(zip(line.x, line.y, strict=True)) if math.isfinite(x) and math.isfinite(y)]
        x, y = [line.x[k] for k in points], [line.y[k] for k in points]
        style = {"color": color, "linestyle": dash if panel.joined else "none"}
        if line.error is None:
            (handle,) = ax.plot(x, y, linewidth=1.0, alpha=0.8, **style)
        else:
            (handle,) = ax.plot(x, y, linewidth=1.3, marker=marker, markersize=5.5, **style)
            for k, px, py in zip(points, x, y, strict=True):
                if math.isfinite(line.error[k]):
                    ax.errorbar(px, py, yerr=line.error[k], color=color, capsize=3, linewidth=1.3)
                else:
                    ax.plot(px, py, marker=marker, markersize=9, color=color, fillstyle="none", linestyle="none")
        handles.setdefault(line.name, handle)
    for dashes, (name, value) in zip(("--", ":", "-."), (panel.bounds or {}).items(), strict=False):
        handles.setdefault(name, ax.axhline(value, color=INK, linestyle=dashes, linewidth=1))
    for name, (px, py) in (panel.stars or {}).items():
        handles.setdefault(name, ax.plot(px, py, marker="*", markersize=11, color=INK, linestyle="none")[0])
    for px, py, text in panel.texts:
        ax.annotate(text, (px, py), xytext=(6, 5), textcoords="offset points", fontsize=7.5)
    if panel.ticks is not None:
        ax.set_xticks(range(len(panel.ticks)), list(panel.ticks))
        ax.set_xlim(-0.5, len(panel.ticks) - 0.5)
    _axes(ax, panel)


def _axes(ax: Any, panel: Panel) -> None:
    values = [y for line in panel.lines for y in line.y if math.isfinite(y)]
    if panel.log_x:
        ax.set_xscale("log")
        positions = sorted({x for line in panel.lines for x in line.x} | {x for x, _ in (panel.stars or {}).values()})
        if len(positions) <= 8:
            ax.set_xticks(positions, [f"{x:.3g}" for x in positions])
            ax.minorticks_off()
    if panel.log_y and values and min(values) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    if panel.falling:
        ax.invert_xaxis()
    ax.set_title(panel.title)
    ax.set_xlabel(panel.xlabel)
    ax.set_ylabel(panel.ylabel)
    ax.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    ax.set_axisbelow(True)


def _inline(svg: str, description: str) -> str:
    """Matplotlib's file as an element: no prologue, no metadata, ids only where they are pointed at, colors of the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", body)
    body = body.replace(INK, "currentColor")
    for index, color in enumerate(COLORS):
        body = body.replace(color, f"var(--series-{index})")
    width = re.search(r'viewBox="0 0 ([\d.]+)', body)
    assert width is not None
    points = float(width[1])
    style = f"min-width: {min(points * 1.1, 620):.0f}px; max-width: {points * 1.75:.0f}px"
    head = f'role="img" aria-label="{html.escape(description)}" style="{style}"'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda match: f"<svg {match[1]} {head}>", body, count=1)
