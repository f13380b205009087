"""`data=digits`: UCI's handwritten digits, embedded in the package (CC BY 4.0, see `assets/LICENSE.digits.txt`)."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import DigitsConfig


def load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The fixed split ((train images, labels), (held-out images, labels)).

    Returns:
        Images (1500 | 297, 1, 8, 8) uint8 in 0..255, labels (1500 | 297,) int64 in 0..9, in the order of the source.
    """
    with as_file(files("qdm_lightning.data") / "assets" / "digits.npz") as path, np.load(path, allow_pickle=False) as archive:
        images, labels, held_out = archive["images"], archive["labels"], archive["held_out"]
    val = np.zeros(len(images), dtype=bool)
    val[held_out] = True

    def part(mask: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(images[mask][:, None]), torch.from_numpy(labels[mask].astype(np.int64))

    return part(~val), part(val)


class DigitsData(ImageDataModule):
    """1,500 digits to train on and 297 held out, 1x8x8. Options: the fields of `DigitsConfig`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(DigitsConfig(**options), channels=1, image_size=8)

    def load(self) -> tuple[Tensor, Tensor]:
        """The embedded digits: (1500, 1, 8, 8) and (297, 1, 8, 8) uint8."""
        (train, _), (val, _) = load_digits()
        return train, val
