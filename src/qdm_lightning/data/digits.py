"""`data=digits`: UCI's handwritten digits, embedded in the package (CC BY 4.0, see `assets/LICENSE.digits.txt`)."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import DigitsConfig


def load_digits() -> tuple[Tensor, Tensor]:
    """The fixed split: (1500, 1, 8, 8) images to train on and (297, 1, 8, 8) held out, uint8, in the order of the source."""
    train, val = _split("images")
    return train[:, None], val[:, None]


def _split(name: str) -> tuple[Tensor, Tensor]:
    """An array of the embedded file: the part of the 1,500 digits to train on, and of those held out."""
    with as_file(files("qdm_lightning.data") / "assets" / "digits.npz") as path, np.load(path, allow_pickle=False) as archive:
        values, held_out = archive[name], archive["held_out"]
    val = np.isin(np.arange(len(values)), held_out)
    return torch.from_numpy(values[~val]), torch.from_numpy(values[val])


class DigitsData(ImageDataModule):
    """1,500 digits to train on and 297 held out, 1x8x8. Options: the fields of `DigitsConfig`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(DigitsConfig(**options), channels=1, image_size=8)

    def load(self) -> tuple[Tensor, Tensor]:
        """The embedded digits, see `load_digits`."""
        return load_digits()

    def load_labels(self) -> tuple[Tensor, Tensor]:
        """Which digit each is, 0 to 9."""
        train, val = _split("labels")
        return train.long(), val.long()
