import pytest
from PIL import Image

from qdm_lightning.display.plots import COLORS, BoxPanel, CurvePanel, save_boxes, save_curves

BOX = [-1.0, -0.5, 0.0, 0.5, 1.0]


def colors(path):
    with Image.open(path) as picture:
        return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in picture.convert("RGB").get_flattened_data()}


def test_boxes_of_two_runs(tmp_path):
    panel = BoxPanel(title="conv", ylabel="x", timesteps=[0, 999], boxes={"a": [BOX, BOX], "b": [BOX, BOX]}, limits=[0, 15])
    save_boxes(tmp_path / "new" / "boxes.png", [[panel, panel]], "title")
    assert {COLORS[0], COLORS[1]} <= colors(tmp_path / "new" / "boxes.png")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["boxes.png"]


def test_curves(tmp_path):
    panels = [
        CurvePanel(
            title="mse", ylabel="mse", curves={"a": ([900, 0], [0.1, 0.2])}, dashed={"a": ([900, 0], [0.1, 0.1])}, log=True
        ),
        CurvePanel(title="from zero", ylabel="mse", curves={"b": ([900, 0], [0.0, 0.2])}, log=True),
    ]
    save_curves(tmp_path / "curves.png", panels, "title")
    assert {COLORS[0], COLORS[1]} <= colors(tmp_path / "curves.png")


def test_nothing_to_draw(tmp_path):
    panel = BoxPanel(title="a", ylabel="x", timesteps=[0], boxes={"a": [BOX]})
    for rows in ([], [[]], [[panel], [panel, panel]]):
        with pytest.raises(ValueError, match="equally many panels"):
            save_boxes(tmp_path / "a.png", rows, "title")
    with pytest.raises(ValueError, match="at least one panel"):
        save_curves(tmp_path / "a.png", [], "title")
    assert not list(tmp_path.iterdir())
