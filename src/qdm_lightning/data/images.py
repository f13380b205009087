"""`data=images`: a folder of pictures or an .npz of uint8 (N, H, W, C)."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.pictures import MODES, channels_first, decode, picture_files, resize
from qdm_lightning.data.spec import ImagesConfig

log = logging.getLogger(__name__)


class ImagesData(ImageDataModule):
    """The user's own pictures, split by a fixed permutation. Options: the fields of `ImagesConfig`."""

    def __init__(self, **options: Any) -> None:
        self.config = ImagesConfig(**options)
        config = self.config
        super().__init__(batch_size=config.batch_size, flip=config.flip, channels=config.channels, image_size=config.image_size)

    def load(self) -> tuple[Tensor, Tensor]:
        """Decode everything. Raises ValueError for a damaged or unfit file, FileNotFoundError where there is no picture."""
        path = Path(str(self.config.path)).expanduser()
        pictures = _from_folder(path, self.config) if path.is_dir() else _from_npz(path, self.config)
        return split(torch.from_numpy(_stack(pictures, self.config.image_size)), self.config.val_fraction)


def split(images: Tensor, val_fraction: float) -> tuple[Tensor, Tensor]:
    """Part `images` into (train, held out), at least one each, by a permutation that depends on their number alone.

    Raises:
        ValueError: fewer than two images.
    """
    count = len(images)
    if count < 2:
        raise ValueError(f"data.path holds {count} picture: at least 2 are needed, one to train on and one held out")
    held_out = min(max(1, round(val_fraction * count)), count - 1)
    order = np.random.RandomState(0).permutation(count)  # the legacy generator: numpy promises its stream for good
    return images[torch.from_numpy(np.sort(order[held_out:]))], images[torch.from_numpy(np.sort(order[:held_out]))]


def _from_folder(folder: Path, config: ImagesConfig) -> Iterator[tuple[str, Image.Image]]:
    paths = picture_files(folder)
    if not paths:
        raise FileNotFoundError(f"data.path={config.path} holds no picture that Pillow reads (png, jpg, webp, bmp, tif, ...)")
    others = sum(path.is_file() for path in folder.rglob("*")) - len(paths)
    if others:
        log.warning("data.path=%s: %d files are hidden or no pictures and are left out", config.path, others)
    for path in paths:
        picture = decode(path, config.channels, str(path))
        yield str(path), picture if config.image_size is None else resize(picture, config.image_size, config.filter)


def _from_npz(path: Path, config: ImagesConfig) -> Iterator[tuple[str, Image.Image]]:
    for index, pixels in enumerate(read_npz(path)):
        picture = Image.fromarray(pixels).convert(MODES[config.channels])
        yield f"{path}[{index}]", picture if config.image_size is None else resize(picture, config.image_size, config.filter)


def read_npz(path: Path) -> np.ndarray:
    """The array `images`, or the sole array, of an .npz: (N, H, W, 3) or (N, H, W) uint8.

    Raises:
        ValueError: damaged, no .npz, several arrays and none called `images`, or another shape or dtype.
    """
    wanted = "an .npz of uint8 (N, H, W, C) with C 1 or 3 is wanted, array `images` or the sole array"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            names = archive.files if isinstance(archive, np.lib.npyio.NpzFile) else []
            if "images" not in names and len(names) != 1:
                raise ValueError(f"it holds the arrays {', '.join(names) or '(none)'}")
            images: np.ndarray = archive["images" if "images" in names else names[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data.path={path} cannot be read ({error}): {wanted}") from error
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3) or not images.size:
        raise ValueError(f"data.path={path} holds {images.dtype} {images.shape}: {wanted}")
    return images


def _stack(pictures: Iterator[tuple[str, Image.Image]], image_size: int | None) -> np.ndarray:
    """(N, C, H, W) uint8. Raises ValueError where the pictures are not squares of one size."""
    arrays, edge = [], image_size
    for name, picture in pictures:
        edge = picture.width if edge is None else edge
        if picture.size != (edge, edge):
            width, height = picture.size
            raise ValueError(
                f"{name} is {width}x{height}, not {edge}x{edge}: type data.image_size={edge} to crop and resize all"
            )
        arrays.append(channels_first(picture))
    return np.stack(arrays)
