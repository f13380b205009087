"""Grids: every pixel where it belongs."""

import numpy as np
import pytest
import torch
from PIL import Image

from qdm_lightning.display.image_grids import GAP, MARGIN, enlargement, save_grid


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "count", "columns"), [(8, 3, 16), (8, 5, 2), (64, 2, 2), (24, 1, 4)])
def test_every_pixel(channels, size, count, columns, tmp_path):
    rows = [random_images(count, channels, size, size), 255 - random_images(count, channels, size, size)]
    save_grid(tmp_path / "deep" / "grid.png", rows, ["teacher", "student"], columns)
    grid = np.array(Image.open(tmp_path / "deep" / "grid.png"))
    factor = enlargement(size, size)
    edge, height = size * factor, MARGIN + size * factor + GAP
    across = min(count, columns)
    assert grid.shape == (2 * -(-count // columns) * height, GAP + across * (edge + GAP), 3)
    for index in range(count):
        block, column = divmod(index, columns)
        left = GAP + column * (edge + GAP)
        for number, row in enumerate(rows):
            top = (2 * block + number) * height + MARGIN
            tile = grid[top : top + edge : factor, left : left + edge : factor]
            expected = row[index].permute(1, 2, 0).expand(-1, -1, 3).numpy()
            assert np.array_equal(tile, expected)
            assert np.array_equal(grid[top + factor - 1 : top + edge : factor, left : left + edge : factor], expected)


def test_labels_are_drawn(tmp_path):
    save_grid(tmp_path / "grid.png", [random_images(4, 1, 8, 8)], ["teacher"])
    margin = np.array(Image.open(tmp_path / "grid.png"))[:MARGIN]
    assert margin.min() < 128


def test_bytes_do_not_change_and_no_other_file_is_left(tmp_path):
    for _ in range(2):
        save_grid(tmp_path / "grid.png", [random_images(2, 1, 8, 8)], ["teacher"])
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        ([], []),
        ([random_images(2, 1, 8, 8)], []),
        ([random_images(0, 1, 8, 8)], ["a"]),
        ([random_images(2, 2, 8, 8)], ["a"]),
        ([random_images(2, 1, 8, 8).float()], ["a"]),
        ([random_images(2, 1, 8, 8), random_images(3, 1, 8, 8)], ["a", "b"]),
        ([random_images(1, 8, 8)], ["a"]),
    ],
)
def test_what_is_no_grid(rows, labels, tmp_path):
    with pytest.raises(ValueError, match="a grid needs"):
        save_grid(tmp_path / "grid.png", rows, labels)
    assert list(tmp_path.iterdir()) == []
