"""A run knows the images that it is made with."""

import numpy as np
import pytest
from PIL import Image

from qdm_lightning.cli.build import build
from qdm_lightning.training.experiment import DATA


@pytest.fixture
def experiment(composed, tmp_path):
    """`experiment(folder)`: a run in one folder, with the pictures of `folder`."""

    def make(folder):
        typed = ["data=images", f"data.path={folder}", "data.channels=1", "data.image_size=8", "data.cache=null"]
        made = build(composed(*typed, "trainer=cpu", "logger=none"))
        made.run_dir = tmp_path / "run"
        return made

    return make


def pictures(folder, shade):
    folder.mkdir()
    for index in range(6):
        Image.fromarray(np.full((8, 8), shade + index, np.uint8)).save(folder / f"{index}.png")
    return folder


def test_other_images_of_the_same_names_are_told(experiment, tmp_path):
    dark, light, moved = (pictures(tmp_path / name, shade) for name, shade in (("dark", 0), ("light", 200), ("moved", 0)))
    first = experiment(dark)
    first.load_data()
    assert not (first.run_dir / DATA).exists()
    first.keep_data()
    for same in (dark, moved):
        experiment(same).load_data()
    with pytest.raises(ValueError, match=rf"the images of data\.path={light} are not those that .*run was made with"):
        experiment(light).load_data()
