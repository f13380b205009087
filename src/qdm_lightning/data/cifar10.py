"""`data=cifar10`: CIFAR-10 in the files that torchvision downloads, checked against its MD5 sums."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

from qdm_lightning.base.files import reading
from qdm_lightning.data.downloads import download, require
from qdm_lightning.data.image_files import resized
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import Cifar10Config

_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


WANTED = f"a batch of {CIFAR10.url} is wanted"


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, strings, lists and dicts, and refuses everything else: a pickle can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return super().find_class(module, name)


class Cifar10Data(ImageDataModule):
    """50,000 images to train on, the 10,000 test images held out, 3x32x32. Options: the fields of `Cifar10Config`."""

    def __init__(self, **options: Any) -> None:
        self.config = Cifar10Config(**options)
        super().__init__(self.config, channels=3, image_size=self.config.image_size)

    def load(self) -> tuple[Tensor, Tensor]:
        """Check and read all batches. Raises FileNotFoundError for a missing and ValueError for a damaged file."""
        root = Path(self.config.root).expanduser()
        if self.config.download:
            otherwise = f"get {CIFAR10.url} by other means and unpack it in {root}"
            download("cifar10", root, lambda: CIFAR10(root, download=True), otherwise)
        how = f"type data.download=true, or unpack {CIFAR10.url} in {root} (data.root)"
        for name, md5 in CIFAR10.train_list + CIFAR10.test_list:
            require(root / CIFAR10.base_folder / name, how, md5 if self.config.verify else None)
        return self._read(root, CIFAR10.train_list), self._read(root, CIFAR10.test_list)

    def load_labels(self) -> tuple[Tensor, Tensor]:
        """Classes 0 to 9, in the order of `batches.meta`. Raises ValueError for a damaged file."""
        folder = Path(self.config.root).expanduser() / CIFAR10.base_folder
        train, val = (
            torch.cat([read_labels(folder / name) for name, _ in listed]) for listed in (CIFAR10.train_list, CIFAR10.test_list)
        )
        return train, val

    def _read(self, root: Path, listed: Sequence[Sequence[str]]) -> Tensor:
        """Images (N, 3, size, size) uint8 of the batch files in `listed` (name, MD5 sum), in order."""
        images = np.concatenate([read_batch(root / CIFAR10.base_folder / name) for name, _ in listed])
        return torch.from_numpy(np.concatenate(list(resized(images, self.config.image_size, self.config.filter))))


def read_batch(path: Path) -> np.ndarray:
    """Images (N, 3, 32, 32) uint8 of one pickled batch: a dict whose `data` is (N, 3072) uint8, channel by channel, row by row.

    Raises:
        ValueError: the file is no such batch, or its pickle asks for anything but arrays.
    """
    with reading(path, WANTED) as stream:
        data = _ArrayUnpickler(stream, encoding="latin1").load()["data"]
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072 or not len(data):
            raise ValueError("it holds no array `data` of uint8 (N, 3072)")
    return data.reshape(-1, 3, 32, 32)


def read_labels(path: Path) -> Tensor:
    """Classes (N,) int64 of one pickled batch, its `labels`. Raises ValueError as `read_batch`."""
    with reading(path, WANTED) as stream:
        labels = _ArrayUnpickler(stream, encoding="latin1").load()["labels"]
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise ValueError("it holds no list `labels` of numbers")
    return torch.tensor(labels, dtype=torch.int64)
