"""Plots: every series in its color, whatever the panel; the page and the pictures have one palette."""

from pathlib import Path

import pytest
from PIL import Image

import qdm_lightning.reporting
from qdm_lightning.display.plots import COLORS, INK, BoxPanel, Line, Panel, picture, save_png

BOX = [-1.0, -0.5, 0.0, 0.5, 1.0]


def colors(path):
    with Image.open(path) as image:
        return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in image.convert("RGB").get_flattened_data()}


def curve(*lines, **options):
    return Panel(title="mse", xlabel="t", ylabel="mse", lines=lines, **options)


def test_boxes_of_two_runs(tmp_path):
    panel = BoxPanel(title="conv", ylabel="x", timesteps=[0, 999], boxes={"a": [BOX, BOX], "b": [BOX, BOX]}, limits=[0, 15])
    save_png(tmp_path / "new" / "boxes.png", [[panel, panel]], "title")
    svg = picture([[panel, panel]], ["a", "b"], format="svg").decode()
    assert [color for color in (*COLORS, INK) if color in svg] == [COLORS[0], COLORS[1], INK]
    assert INK in colors(tmp_path / "new" / "boxes.png")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["boxes.png"]


def test_lines(tmp_path):
    dashed = curve(Line("a", [900, 0], [0.1, 0.2]), Line("a", [900, 0], [0.1, 0.1], dash="--"), log_y=True, falling=True)
    from_zero = curve(Line("b", [900, 0], [0.0, 0.2]), log_y=True)
    save_png(tmp_path / "curves.png", [[dashed, from_zero]], "title")
    assert {COLORS[0], COLORS[1]} <= colors(tmp_path / "curves.png")
    assert COLORS[2] not in colors(tmp_path / "curves.png")


def test_a_series_looks_the_same_in_every_plot_and_the_seventh_differs_from_the_first():
    names = [f"run {k}" for k in range(7)]
    alone = picture([[curve(Line("run 3", [0, 1], [1, 2]))]], names, format="svg").decode()
    assert [color for color in COLORS if color in alone] == [COLORS[3]]
    first, seventh = (
        picture([[curve(Line(name, [0, 1], [1, 2]))]], names, format="svg").decode() for name in ("run 0", "run 6")
    )
    assert COLORS[0] in first
    assert COLORS[0] in seventh
    assert ("stroke-dasharray" in first, "stroke-dasharray" in seventh) == (False, True)


def test_sizes_that_lie_close_share_a_label():
    svg = picture([[curve(Line("a", [0.24, 0.251, 1.85], [3, 2, 1]), log_x=True)]], ["a"], format="svg").decode()
    assert [f">{text}<" in svg for text in ("0.24", "0.251", "1.85")] == [True, False, True]


def test_nothing_to_draw(tmp_path):
    panel = BoxPanel(title="a", ylabel="x", timesteps=[0], boxes={"a": [BOX]})
    for rows in ([], [[]], [[panel], [panel, panel]]):
        with pytest.raises(ValueError, match="equally many panels"):
            save_png(tmp_path / "a.png", rows, "title")
    assert not list(tmp_path.iterdir())


def test_the_page_in_light_has_the_colors_of_the_pictures():
    css = (Path(qdm_lightning.reporting.__path__[0]) / "assets" / "report.css").read_text("utf-8")
    for index, color in enumerate(COLORS):
        assert css.index(f"--series-{index}: {color};") < css.index("prefers-color-scheme: dark")
