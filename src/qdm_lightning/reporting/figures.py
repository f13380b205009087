"""Figures of the report as inline SVG: text in `currentColor`, series in CSS variables: light and dark both fit."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from qdm_lightning.display.plots import COLORS, INK, Panel, picture


def inline_svg(panels: Sequence[Sequence[Panel]], names: Sequence[str], description: str, salt: str) -> str:
    """The `<svg>` of rows of equally many panels: no prologue, no metadata, ids only where they are pointed at.

    Args:
        panels: rows of panels; the place of one without lines stays empty.
        names: of all series of the report, in order: it decides their looks.
        description: for those who do not see it.
        salt: another one for every figure of a page, so that no two share an id.
    """
    unnamed = {"Date": None, "Creator": None}
    svg = picture(panels, names, salt=salt, format="svg", transparent=True, metadata=unnamed).decode("utf-8")
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", body)
    for color, variable in ((INK, "currentColor"), *((color, f"var(--series-{k})") for k, color in enumerate(COLORS))):
        body = body.replace(color, variable)
    points = float(re.findall(r'viewBox="0 0 ([\d.]+)', body)[0])
    style = f"min-width: {min(points * 1.1, 620):.0f}px; max-width: {points * 1.75:.0f}px"
    head = f'role="img" aria-label="{html.escape(description)}" style="{style}"'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda match: f"<svg {match[1]} {head}>", body, count=1)
