"""The report as one HTML file: tables, figures and pictures inside, nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from qdm_lightning.display.image_grids import png, read_rows
from qdm_lightning.reporting import tables
from qdm_lightning.reporting.collect import Contents
from qdm_lightning.reporting.figures import inline_svg
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
from qdm_lightning.reporting.summary import Cell, Group, all_cells

ASSETS = Path(__file__).parent / "assets"

WIDEST = 1600
"""Pixels; wider strips of samples are scaled down."""


def page(groups: Sequence[Group], contents: Contents) -> str:
    """The whole file. What comes from files is escaped by the template; figures are escaped by matplotlib."""
    names = series(groups)
    cells = all_cells(groups)
    losses, notes = loss_sketch(groups)
    trajectories, more = trajectory_sketches(groups)
    pictures, left_out = samples(cells)
    salt = count()

    def figure(sketch: Sketch) -> dict[str, Any]:
        description = f"{sketch.title}. {sketch.caption} The numbers are in the tables."
        return {
            "title": sketch.title,
            "caption": sketch.caption,
            "wide": len(sketch.panels) * len(sketch.panels[0]) > 1,
            "svg": Markup(inline_svg(sketch.panels, names, description, f"figure {next(salt)}")),
        }

    context = {
        "groups": [_section(group, groups, figure) for group in groups],
        "several": len(groups) > 1,
        "runs": len(contents.runs),
        "cells": len(cells),
        "seeds": sorted({run.seed for run in contents.runs}),
        "unfinished": contents.unfinished,
        "notes": [*contents.notes, *notes, *more, *left_out],
        "cost": tables.cost_table(cells),
        "steps": list(map(figure, steps_sketches(groups))),
        "training": [figure(losses)] if losses else [],
        "errors": [figure(sketch) for sketch in (*trajectories, nem_sketch(cells)) if sketch],
        "samples": pictures,
        "settings": tables.settings_table(cells),
        "common": tables.common_settings(contents.runs),
        "every": tables.runs_table(groups),
        "formulas": tables.FORMULAS,
        "asset": lambda name: Markup((ASSETS / name).read_text("utf-8")),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(context)


def _section(group: Group, groups: Sequence[Group], figure: Callable[[Sketch], dict[str, Any]]) -> dict[str, Any]:
    differing = tables.protocol_differences(group, groups)
    sketches = [make(group, name) for name in group.distances for make in (bits_sketch, bytes_sketch)]
    return {
        "name": group.name,
        "title": group.title,
        "protocol": [(name, str(value), name in differing) for name, value in group.protocol.items()],
        "surroundings": tables.surroundings(group),
        "distances": [tables.measure_table(group, name) for name in group.distances],
        "others": [tables.measure_table(group, name) for name in group.measures if name not in group.distances],
        "bounds": tables.reference_table(group),
        "figures": [figure(sketch) for sketch in sketches if sketch],
        "baselines": bool(group.baselines),
    }


def samples(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], list[str]]:
    """Images of one seed below one another: the teacher's, then each cell's student; and notes on what could not be read.

    Each run's `samples.png` is cut into its rows. A cell whose teacher drew other images gets them above its own.
    """
    shown, notes = [], []
    for seed in sorted({seed for cell in cells for seed in cell.results}):
        rows: list[dict[str, str]] = []
        teacher: bytes | None = None
        for cell, run in ((cell, cell.results[seed].run) for cell in cells if seed in cell.results):
            try:
                strips = [_strip(image) for image in read_rows(run.folder / "samples.png", 2 if run.student else 1)]
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as a grid of samples"
                notes.append(f"{run.name}/samples.png {reason}: left out of the samples")
                continue
            if strips[0] != teacher:
                which = "teacher" if teacher is None else f"teacher of {cell.label}"
                teacher = strips[0]
                rows.append(_picture(which, teacher, f"Samples of the {which}, seed {seed}"))
            if run.student:
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
