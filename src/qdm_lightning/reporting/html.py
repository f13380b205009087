"""The report as one HTML file: tables, figures and pictures inside, nothing from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from qdm_lightning.display.image_grids import png, read_rows
from qdm_lightning.reporting import tables
from qdm_lightning.reporting.collect import Found
from qdm_lightning.reporting.figures import draw
from qdm_lightning.reporting.panels import (
    Sketch,
    bits_sketch,
    bytes_sketch,
    loss_sketch,
    nem_sketch,
    series,
    steps_sketches,
    trajectory_sketches,
)
from qdm_lightning.reporting.summary import Cell, Group

WIDEST = 1600
"""Pixels; wider strips of samples are scaled down, and it is said."""


def page(groups: Sequence[Group], found: Found) -> str:
    """The whole file. What comes from files is escaped by the template; figures are escaped by matplotlib."""
    names = series(groups)
    cells = tables.all_cells(groups)
    losses, notes = loss_sketch(groups)
    trajectories, more = trajectory_sketches(groups)
    pictures, left_out = samples(cells)
    salt = iter(range(1000))

    def figure(sketch: Sketch) -> dict[str, Any]:
        number = next(salt)
        description = f"{sketch.title}. {sketch.caption} The numbers are in the tables."
        return {
            "title": sketch.title,
            "caption": sketch.caption,
            "wide": len(sketch.panels) * len(sketch.panels[0]) > 1,
            "svg": Markup(draw(sketch.panels, names, description, f"figure {number}")),
        }

    context = {
        "groups": [_section(group, groups, figure) for group in groups],
        "several": len(groups) > 1,
        "runs": len(found.runs),
        "cells": len(cells),
        "seeds": sorted({run.seed for run in found.runs}),
        "unfinished": found.unfinished,
        "notes": [*found.notes, *notes, *more, *left_out],
        "cost": tables.cost_table(cells),
        "steps": list(map(figure, steps_sketches(groups))),
        "training": [figure(losses)] if losses else [],
        "errors": [figure(sketch) for sketch in (*trajectories, nem_sketch(cells)) if sketch],
        "samples": pictures,
        "settings": tables.settings_table(cells),
        "common": tables.common_settings(found.runs),
        "every": tables.runs_table(groups),
        "formulas": tables.FORMULAS,
        "asset": lambda name: Markup(_asset(name)),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["sortable"] = _sortable
    return environment.from_string(_asset("report.html.j2")).render(context)


def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text("utf-8")


def _sortable(entry: tables.Entry) -> str:
    """What JavaScript sorts a cell by: a number where it is one."""
    return "" if entry.number is None or not math.isfinite(entry.number) else repr(float(entry.number))


def _section(group: Group, groups: Sequence[Group], figure: Any) -> Mapping[str, Any]:
    differing = tables.protocol_differences(group, groups)
    distances = [tables.measure_table(group, name) for name in group.measures if name in group.distances]
    others = [tables.measure_table(group, name) for name in group.measures if name not in group.distances]
    sketches = [make(group, name) for name in group.distances for make in (bits_sketch, bytes_sketch)]
    return {
        "name": group.name,
        "title": group.title,
        "protocol": [(name, str(value), name in differing) for name, value in group.protocol.items()],
        "surroundings": tables.surroundings(group),
        "distances": distances,
        "others": others,
        "bounds": tables.reference_table(group),
        "figures": [figure(sketch) for sketch in sketches if sketch],
        "baselines": list(dict.fromkeys(cell.label for cell in group.baselines.values())),
    }


def samples(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], list[str]]:
    """Images of one seed below one another: the teacher's, then each cell's student; and notes on what could not be read.

    Each run's `samples.png` is cut into its rows. A cell whose teacher drew other images gets them above its own.
    """
    seeds = sorted({seed for cell in cells for seed in cell.results})
    shown, notes = [], []
    for seed in seeds:
        rows: list[dict[str, str]] = []
        teacher: bytes | None = None
        for cell in cells:
            result = cell.results.get(seed)
            if result is None:
                continue
            try:
                strips = [
                    _strip(image) for image in read_rows(result.run.folder / "samples.png", 2 if result.run.student else 1)
                ]
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as a grid of samples"
                notes.append(f"{result.run.name}/samples.png {reason}: left out of the samples")
                continue
            if strips[0] != teacher:
                which = "teacher" if teacher is None else f"teacher of {cell.label}"
                teacher = strips[0]
                rows.append(_picture(which, teacher, f"Samples of the {which}, seed {seed}"))
            if len(strips) > 1:
                rows.append(_picture(cell.label, strips[1], f"Samples of {cell.label}, seed {seed}, same noise as its teacher"))
        if rows:
            shown.append({"seed": seed, "rows": rows})
    return shown, notes


def _strip(image: Image.Image) -> bytes:
    if image.width > WIDEST:
        image = image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))), Image.Resampling.LANCZOS)
    return png(image)


def _picture(label: str, content: bytes, alt: str) -> dict[str, str]:
    return {"label": label, "alt": alt, "uri": "data:image/png;base64," + base64.b64encode(content).decode("ascii")}
