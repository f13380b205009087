"""The teacher's images: drawn once for the same teacher, seeds and sampler, and again for anything else."""

from pathlib import Path

import pytest
import torch

from qdm_lightning.cli.build import build
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.training.run import Run

SMALL = [
    "model.block_out_channels=[8,16]",
    "model.norm_num_groups=4",
    "sampler.steps=2",
    "num_samples=8",
    "trainer.accelerator=cpu",
    "logger=none",
]


class Told:
    """A progress that keeps what it is told."""

    def __init__(self):
        self.lines, self.drawn = [], 0

    def say(self, line):
        self.lines.append(line)

    def stage(self, name, total, unit):
        self.drawn += 1
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def advance(self, steps):
        pass


@pytest.fixture
def drawn(composed, tmp_path):
    """`drawn(*overrides, weights_seed=0)`: the images, and what the progress was told."""

    def draw(*overrides, weights_seed=0):
        experiment = build(composed(*SMALL, *overrides, f"paths.cache={tmp_path}"))
        experiment.data.setup()
        torch.manual_seed(weights_seed)
        unet = experiment.build_model().to(memory_format=torch.channels_last)
        teacher = Denoiser(unet).requires_grad_(False).eval()
        told = Told()
        return Run(experiment, told, []).teachers_images(teacher), told

    return draw


def files(folder: Path) -> list[Path]:
    return sorted((folder / "teacher_images").glob("[!.]*.safetensors"))


def test_drawn_once(drawn, tmp_path):
    images, told = drawn()
    assert (told.drawn, told.lines) == (1, [])
    again, told = drawn()
    assert torch.equal(images, again)
    assert told.drawn == 0
    assert str(files(tmp_path)[0]) in told.lines[0]
    quantized_otherwise, told = drawn("quant=w2a2", "taq=off")
    assert torch.equal(images, quantized_otherwise)
    assert told.drawn == 0


@pytest.mark.parametrize(
    "change",
    ["seed=1", "num_samples=9", "sampler.steps=3", "sampler.batch_size=4", "model.norm_num_groups=2", "model.norm_eps=0.1"],
)
def test_drawn_again_for_other_settings(drawn, change):
    images, _ = drawn()
    other, told = drawn(change)
    assert told.drawn == 1
    assert change == "sampler.batch_size=4" or not torch.equal(images, other)


def test_drawn_again_for_other_weights(drawn):
    images, _ = drawn()
    other, told = drawn(weights_seed=1)
    assert told.drawn == 1
    assert not torch.equal(images, other)


@pytest.mark.parametrize("damage", ["cut", "turned", "another"])
def test_a_damaged_file_is_drawn_again(drawn, tmp_path, damage):
    images, _ = drawn()
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    if damage == "turned":
        content[-1] ^= 1
    file.write_bytes({"cut": content[:-1], "turned": content, "another": b"no tensors"}[damage])
    again, told = drawn()
    assert torch.equal(images, again)
    assert told.drawn == 1
    assert "is damaged" in told.lines[0]
    assert drawn()[1].drawn == 0
