"""Figures as SVG: what is drawn, and what is left out."""

from qdm_lightning.reporting.figures import Line, Panel, draw


def test_a_panel_without_lines_leaves_its_place_empty():
    full = Panel(title="w4a4, loss", xlabel="step", ylabel="loss", lines=[Line("NeM", [1.0, 2.0], [0.5, 0.4])])
    empty = Panel(title="w3a3, loss", xlabel="step", ylabel="loss", lines=[])
    svg = draw([[full, empty]], ["NeM"], "losses", "a")
    assert "w4a4, loss" in svg
    assert "w3a3, loss" not in svg
    assert svg.count(">loss<") == 1  # the label of the one axis
