"""The report as one HTML file: tables, figures and pictures inside, nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
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
    names, cells = series(groups), all_cells(groups)
    notes, salt = list(contents.notes), count()

    def svg(sketch: Sketch) -> Markup:
        description = f"{sketch.title}. {sketch.caption} The numbers are in the tables."
        return Markup(inline_svg(sketch.panels, names, description, f"figure {next(salt)}"))

    context = {
        "groups": [_section(group, groups) for group in groups],
        "several": len(groups) > 1,
        "runs": len(contents.runs),
        "cells": len(cells),
        "seeds": sorted({run.seed for run in contents.runs}),
        "unfinished": contents.unfinished,
        "notes": notes,
        "cost": tables.cost_table(cells),
        "steps": steps_sketches(groups),
        "training": list(filter(None, [loss_sketch(groups, notes)])),
        "errors": list(filter(None, [*trajectory_sketches(groups, notes), nem_sketch(cells)])),
        "samples": list(samples(cells, notes)),
        "settings": tables.settings_table(cells),
        "common": tables.common_settings(contents.runs),
        "every": tables.runs_table(groups),
        "formulas": tables.FORMULAS,
        "svg": svg,
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


def _section(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    differing = tables.protocol_differences(group, groups)
    sketches = (make(group, name) for name in group.distances for make in (bits_sketch, bytes_sketch))
    return {
        "name": group.name,
        "title": group.title,
        "protocol": [(name, str(value), name in differing) for name, value in group.protocol.items()],
        "surroundings": tables.surroundings(group),
        "distances": [tables.measure_table(group, name) for name in group.distances],
        "others": [tables.measure_table(group, name) for name in group.measures if name not in group.distances],
        "bounds": list(
            filter(None, [*(tables.excess_table(group, name) for name in group.distances), tables.reference_table(group)])
        ),
        "figures": list(filter(None, sketches)),
        "baselines": bool(group.baselines),
    }


def samples(cells: Sequence[Cell], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Images of one seed below one another: the teacher's, then each cell's student. What cannot be read is noted.

    Each run's `samples.png` is cut into its rows. A cell whose teacher drew other images gets them above its own.
    """
    for seed in sorted({seed for cell in cells for seed in cell.results}):
        rows: list[dict[str, str]] = []
        teacher: bytes | None = None
        for cell, run in ((cell, cell.results[seed].run) for cell in cells if seed in cell.results):
            try:
                first, *students = map(_strip, read_rows(run.folder / "samples.png", 2 if run.student else 1))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as a grid of samples"
                notes.append(f"{run.name}/samples.png {reason}: left out of the samples")
                continue
            if first != teacher:
                which = "teacher" if teacher is None else f"teacher of {cell.label}"
                rows.append(_picture(which, first, f"Samples of the {which}, seed {seed}"))
            teacher = first
            alt = f"Samples of {cell.label}, seed {seed}, same noise as its teacher"
            rows += [_picture(cell.label, student, alt) for student in students]
        if rows:
            yield {"seed": seed, "rows": rows}


def _strip(image: Image.Image) -> bytes:
    image.thumbnail((WIDEST, image.height), Image.Resampling.LANCZOS, reducing_gap=None)
    return png(image)


def _picture(label: str, content: bytes, alt: str) -> dict[str, str]:
    return {"label": label, "alt": alt, "uri": "data:image/png;base64," + base64.b64encode(content).decode("ascii")}
