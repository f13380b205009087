"""Figures as SVG: what is drawn, and what is left out."""

from qdm_lightning.display.plots import COLORS, INK, Line, Panel
from qdm_lightning.reporting.figures import inline_svg


def test_a_panel_without_lines_leaves_its_place_empty():
    full = Panel(title="w4a4, loss", xlabel="step", ylabel="loss", lines=[Line("NeM", [1.0, 2.0], [0.5, 0.4])])
    empty = Panel(title="w3a3, loss", xlabel="step", ylabel="loss", lines=[])
    svg = inline_svg([[full, empty]], ["NeM"], "losses", "a")
    assert "w4a4, loss" in svg
    assert "w3a3, loss" not in svg
    assert svg.count(">loss<") == 1  # the label of the one axis


def test_colors_are_the_pages():
    line = Line("NeM", [1.0, 2.0, 3.0], [0.5, 0.4, 0.3], error=[0.1, float("nan"), 0.1])
    svg = inline_svg([[Panel(title="a", xlabel="x", ylabel="y", lines=[line])]], ["none", "NeM"], "a & b", "a")
    assert "var(--series-1)" in svg
    assert "currentColor" in svg
    assert not any(color in svg for color in (INK, *COLORS))
    assert 'aria-label="a &amp; b"' in svg
