"""`data=imagenet64`: ImageNet at 64x64 in the .npz batches of Chrabaszcz et al. 2017 (arXiv 1707.08819)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdm_lightning.base.archives import array_headers
from qdm_lightning.base.files import reading
from qdm_lightning.data.cache import cached, listing_key
from qdm_lightning.data.downloads import OTHER_FILES, require
from qdm_lightning.data.image_files import resized
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import ImageNet64Config

TRAIN_FILES = tuple(f"train_data_batch_{i}.npz" for i in range(1, 11))
VAL_FILES = ("val_data.npz",)
TRAIN_IMAGES = 1_281_167
VAL_IMAGES = 50_000
GET = (
    "get the 64x64 batches from https://image-net.org/download-images.php "
    "(log in; Imagenet64_train_part1.zip, _part2.zip and Imagenet64_val.zip)"
)


class ImageNet64Data(ImageDataModule):
    """1,281,167 images to train on, the 50,000 of the validation set held out. Options: the fields of `ImageNet64Config`."""

    def __init__(self, **options: Any) -> None:
        self.config = ImageNet64Config(**options)
        super().__init__(self.config, channels=3, image_size=self.config.image_size)

    def load(self) -> tuple[Tensor, Tensor]:
        """Read all batches, once. Raises FileNotFoundError for a missing and ValueError for a damaged file."""
        root = Path(self.config.root).expanduser()
        for name in TRAIN_FILES + VAL_FILES:
            require(root / name, f"{GET} and unpack them in {root} (data.root)")
        train = self._read([root / name for name in TRAIN_FILES], TRAIN_IMAGES)
        return train, self._read([root / name for name in VAL_FILES], VAL_IMAGES)

    def load_labels(self) -> tuple[Tensor, Tensor]:
        """Classes 0 to 999: the files' own numbers, which begin at 1, less 1, or their places in the order of `data.synsets`.

        Raises:
            FileNotFoundError, ValueError: a file that is missing or damaged.
        """
        root, synsets = Path(self.config.root).expanduser(), self.config.synsets
        train, val = (torch.cat([read_labels(root / name) for name in names]) for names in (TRAIN_FILES, VAL_FILES))
        if synsets is None:
            return train, val
        place = read_synsets(Path(synsets).expanduser())
        return place[train], place[val]

    def _read(self, paths: Sequence[Path], expected: int) -> Tensor:
        config, size = self.config, self.config.image_size
        count = sum(count_images(path) for path in paths)
        if config.verify and count != expected:
            which = f"{paths[0].parent}: {paths[0].name} to {paths[-1].name}"
            raise ValueError(f"{which} hold {count} images, not {expected}; {GET} {OTHER_FILES}")
        filter = config.filter if size != 64 else None
        key = listing_key([(path.name, path) for path in paths], data="imagenet64", size=size, filter=filter)
        blocks = (block for path in paths for block in resized(read_batch(path), size, config.filter))
        return cached(config.cache, key, (count, 3, size, size), blocks)


def count_images(path: Path) -> int:
    """Number of images of one batch, from the headers of its arrays: no image is read, and no memory is taken.

    Raises:
        ValueError: damaged, or not uint8 (N, 12288) `data` with N `labels`, or more images than ImageNet has.
    """
    with reading(path, GET) as stream:
        headers = array_headers(stream)
        labels, data = headers["labels"], headers["data"]
        if data.kind != "u1" or len(data.shape) != 2 or data.shape[1] != 3 * 64 * 64 or data.shape[:1] != labels.shape:
            raise ValueError(f"it holds `data` {data.kind} {data.shape}, not uint8 (N, 12288) with N labels")
        if data.shape[0] > TRAIN_IMAGES:
            raise ValueError(f"it says that it holds {data.shape[0]} images, and all of ImageNet are {TRAIN_IMAGES}")
    return data.shape[0]


def read_labels(path: Path) -> Tensor:
    """Classes (N,) int64, 0 to 999, of one batch. Raises ValueError where it is damaged, or its labels are not 1 to 1000."""
    with reading(path, GET) as stream, np.load(stream, allow_pickle=False) as archive:
        labels = torch.from_numpy(archive["labels"].astype(np.int64)) - 1
        if labels.ndim != 1 or not ((labels >= 0) & (labels < 1000)).all():
            raise ValueError("its `labels` are not N numbers from 1 to 1000")
    return labels


def read_synsets(path: Path) -> Tensor:
    """Place (1000,) of each class, in the files' order, in that of the WordNet ids; from lines `n02119789 1 kit_fox`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such lines for the classes 1 to 1000.
    """
    require(path, "data.synsets is map_clsloc.txt of ImageNet's development kit")
    with reading(path, "lines such as `n02119789 1 kit_fox` are wanted, a class each") as stream:
        rows = [line.split() for line in stream.read().decode().splitlines() if line.strip()]
        numbered = {int(row[1]): row[0] for row in rows}
        if len(rows) != 1000 or sorted(numbered) != list(range(1, 1001)) or len(set(numbered.values())) != 1000:
            raise ValueError("it has not one line for each of the classes 1 to 1000")
    ordered = {wnid: place for place, wnid in enumerate(sorted(numbered.values()))}
    return torch.tensor([ordered[numbered[number]] for number in range(1, 1001)])


def read_batch(path: Path) -> np.ndarray:
    """Images (N, 3, 64, 64) uint8 of one batch, whose `data` is (N, 12288) uint8, channel by channel, row by row.

    Raises:
        ValueError: as `count_images`.
    """
    count_images(path)
    with reading(path, GET) as stream, np.load(stream, allow_pickle=False) as archive:
        data: np.ndarray = archive["data"]
    return data.reshape(-1, 3, 64, 64)
