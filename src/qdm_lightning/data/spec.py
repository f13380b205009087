"""Settings of the data sets (config group `data`). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qdm_lightning.checks import at_least, between, one_of

FILTERS = ("lanczos", "area", "bicubic", "bilinear")
"""Resampling filters of a size change; each is antialiased when it shrinks. `area` averages the pixels covered."""


@dataclass(kw_only=True)
class DigitsConfig:
    """`data=digits`: the 1,797 handwritten 8x8 digits that ship with the package, 1,500 to train on and 297 held out.

    Args:
        batch_size: images of one training step, over all ranks together.
        flip: mirror images at random in training. Off: a mirrored digit is no digit.

    Raises:
        ValueError: `batch_size` below 1.
    """

    _target_: str = "qdm_lightning.data.digits.DigitsData"
    batch_size: int = 64
    flip: bool = False

    def __post_init__(self) -> None:
        at_least("data.batch_size", self.batch_size, 1)


@dataclass(kw_only=True)
class ImagesConfig:
    """`data=images`: the user's own pictures.

    Args:
        path: a folder (every picture below it that Pillow reads, in sorted order) or an .npz of uint8 (N, H, W, C), array
            `images` or the sole array.
        image_size: edge length in pixels; pictures of another size are cropped to the central square and resized. None
            takes them as they are: squares of one size.
        channels: 3 (RGB) or 1 (grey).
        filter: resampling of the size change, one of `FILTERS`.
        val_fraction: share of the pictures that is held out, the same ones on every run.
        batch_size: images of one training step, over all ranks together.
        flip: mirror images at random in training.

    Raises:
        ValueError: no path, or a value outside its range.
        FileNotFoundError: nothing exists at `path`.
    """

    _target_: str = "qdm_lightning.data.images.ImagesData"
    path: str | None = None
    image_size: int | None = None
    channels: int = 3
    filter: str = "lanczos"
    val_fraction: float = 0.1
    batch_size: int = 64
    flip: bool = True

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data=images needs pictures: type data.path=<folder of pictures, or .npz of uint8 (N, H, W, C)>")
        if not Path(self.path).expanduser().exists():
            raise FileNotFoundError(
                f"data.path={self.path}: nothing there; give a folder of pictures or an .npz of uint8 (N, H, W, C)"
            )
        if self.image_size is not None:
            at_least("data.image_size", self.image_size, 1)
        one_of("data.channels", self.channels, (3, 1))
        one_of("data.filter", self.filter, FILTERS)
        between("data.val_fraction", self.val_fraction, 0.0, 0.5)
        at_least("data.batch_size", self.batch_size, 1)
