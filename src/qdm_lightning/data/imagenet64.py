"""`data=imagenet64`: ImageNet at 64x64 in the .npz batches of Chrabaszcz et al. 2017 (arXiv 1707.08819)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image
from torch import Tensor

from qdm_lightning.data.cache import cached, in_threads, listing_key
from qdm_lightning.data.image_files import channels_first, resize
from qdm_lightning.data.integrity import require
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import ImageNet64Config

TRAIN_FILES = tuple(f"train_data_batch_{i}.npz" for i in range(1, 11))
VAL_FILES = ("val_data.npz",)
TRAIN_IMAGES = 1_281_167
VAL_IMAGES = 50_000
PAGE = "https://image-net.org/download-images.php (log in; Imagenet64_train_part1.zip, _part2.zip and Imagenet64_val.zip)"


class ImageNet64Data(ImageDataModule):
    """1,281,167 images to train on, the 50,000 of the validation set held out. Options: the fields of `ImageNet64Config`."""

    def __init__(self, **options: Any) -> None:
        self.config = ImageNet64Config(**options)
        config = self.config
        super().__init__(batch_size=config.batch_size, flip=config.flip, channels=3, image_size=config.image_size)

    def load(self) -> tuple[Tensor, Tensor]:
        """Read all batches, once. Raises FileNotFoundError for a missing and ValueError for a damaged file."""
        root = Path(self.config.root).expanduser()
        for name in TRAIN_FILES + VAL_FILES:
            require(root / name, _how_to_get(root))
        train = self._cached_images([root / name for name in TRAIN_FILES], TRAIN_IMAGES)
        return train, self._cached_images([root / name for name in VAL_FILES], VAL_IMAGES)

    def _cached_images(self, paths: Sequence[Path], expected: int) -> Tensor:
        config, size = self.config, self.config.image_size
        settings = {
            "data": "imagenet64",
            "size": size,
            "filter": config.filter if size != 64 else None,
            "pillow": PIL.__version__,
        }
        key = listing_key([(path.name, path) for path in paths], **settings)
        count = sum(count_images(path) for path in paths)
        if config.verify and count != expected:
            raise ValueError(
                f"{paths[0].parent}: {paths[0].name} to {paths[-1].name} hold {count} images, not {expected}; "
                f"{_how_to_get(paths[0].parent)} "
                "(data.verify=false accepts other files of this format)"
            )
        return cached(Path(config.cache) if config.cache else None, key, (count, 3, size, size), lambda: self._blocks(paths))

    def _blocks(self, paths: Sequence[Path]) -> Iterator[np.ndarray]:
        size, filter = self.config.image_size, self.config.filter
        for path in paths:
            images = read_batch(path)
            if size == 64:
                yield images
            else:
                pixels = list(images.transpose(0, 2, 3, 1))
                yield from in_threads(lambda p: channels_first(resize(Image.fromarray(p), size, filter)), pixels)


def _how_to_get(root: Path) -> str:
    return f"get the 64x64 batches from {PAGE} and unpack them in {root} (data.root)"


def _array(path: Path, name: str) -> np.ndarray:
    """Array `name` of an .npz, its CRC checked by zipfile. Raises ValueError if it is damaged or not there."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            array: np.ndarray = archive[name]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no ImageNet batch ({error}): {_how_to_get(path.parent)}") from error
    return array


def count_images(path: Path) -> int:
    """Number of images of one batch, from its `labels`; the images are not read. Raises ValueError if it is damaged."""
    return len(_array(path, "labels"))


def read_batch(path: Path) -> np.ndarray:
    """Images (N, 3, 64, 64) uint8 of one batch, whose `data` is (N, 12288) uint8, channel by channel, row by row.

    Raises:
        ValueError: damaged, or no such array, or not as many images as labels.
    """
    data = _array(path, "data")
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 64 * 64 or len(data) != count_images(path):
        raise ValueError(
            f"{path} holds `data` {data.dtype} {data.shape}, not uint8 (N, 12288) with N labels: {_how_to_get(path.parent)}"
        )
    return data.reshape(-1, 3, 64, 64)
