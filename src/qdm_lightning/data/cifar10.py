"""`data=cifar10`: CIFAR-10 in the files that torchvision downloads, checked against its MD5 sums."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

from qdm_lightning.data.image_files import channels_first, resize
from qdm_lightning.data.integrity import require, require_md5
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import Cifar10Config

_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


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
        config = self.config
        super().__init__(batch_size=config.batch_size, flip=config.flip, channels=3, image_size=config.image_size)

    def load(self) -> tuple[Tensor, Tensor]:
        """Check and read all batches. Raises FileNotFoundError for a missing and ValueError for a damaged file."""
        root = Path(self.config.root).expanduser()
        if self.config.download:
            _download(root)
        folder = root / CIFAR10.base_folder
        train = _read(folder, CIFAR10.train_list, self.config)
        return train, _read(folder, CIFAR10.test_list, self.config)


def _how_to_get(folder: Path) -> str:
    return f"type data.download=true, or unpack {CIFAR10.url} in {folder.parent} (data.root)"


def _download(root: Path) -> None:
    """Let torchvision fetch, check and unpack the archive unless its files are there. Raises FileNotFoundError."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / "cifar10.lock"):
            CIFAR10(root, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"CIFAR-10 could not be downloaded to {root} ({error}): get {CIFAR10.url} by other means and unpack it in {root}"
        ) from error


def _read(folder: Path, listed: Sequence[Sequence[str]], config: Cifar10Config) -> Tensor:
    """Images (N, 3, size, size) uint8 of the batch files in `listed` (name, MD5 sum), in order."""
    how = _how_to_get(folder)
    for name, _ in listed:
        require(folder / name, how)
    batches = []
    for name, md5 in listed:
        if config.verify:
            require_md5(folder / name, md5, how)
        batches.append(read_batch(folder / name))
    images = np.concatenate(batches)
    if config.image_size != 32:
        pictures = (Image.fromarray(pixels) for pixels in images.transpose(0, 2, 3, 1))
        images = np.stack([channels_first(resize(picture, config.image_size, config.filter)) for picture in pictures])
    return torch.from_numpy(images)


def read_batch(path: Path) -> np.ndarray:
    """Images (N, 3, 32, 32) uint8 of one pickled batch: a dict whose `data` is (N, 3072) uint8, channel by channel, row by row.

    Raises:
        ValueError: the file is no such batch, or its pickle asks for anything but arrays.
    """
    try:
        with path.open("rb") as stream:
            entry = _ArrayUnpickler(stream, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(f"{path} is damaged or no CIFAR-10 batch: {error}; {_how_to_get(path.parent)}") from error
    data = entry.get("data") if isinstance(entry, dict) else None
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072 or not len(data):
        raise ValueError(
            f"{path} is no CIFAR-10 batch: it holds no array `data` of uint8 (N, 3072); {_how_to_get(path.parent)}"
        )
    return data.reshape(-1, 3, 32, 32)
