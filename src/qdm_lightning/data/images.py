"""`data=images`: a folder of pictures or an .npz of uint8 (N, H, W, C)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qdm_lightning.base.files import reading
from qdm_lightning.data.cache import cached, listing_key
from qdm_lightning.data.image_files import FORMATS, MODES, channels_first, decode, in_threads, picture_files, resize
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import ImagesConfig, PicturesConfig

log = logging.getLogger(__name__)


class ImagesData(ImageDataModule):
    """The user's own pictures, split by a fixed permutation. Options: the fields of `ImagesConfig`."""

    def __init__(self, **options: Any) -> None:
        self.config = ImagesConfig(**options)
        super().__init__(self.config, channels=self.config.channels, image_size=self.config.image_size)

    def load(self) -> tuple[Tensor, Tensor]:
        """Decode everything. Raises ValueError for a damaged or unfit file, FileNotFoundError where there is no picture."""
        path = Path(str(self.config.path)).expanduser()
        return _from_folder(path, self.config) if path.is_dir() else _from_npz(path, self.config)


def split(count: int, val_fraction: float) -> tuple[list[int], list[int]]:
    """Ascending indices of the images to train on and of those held out, at least one each, a function of the arguments alone.

    Raises:
        ValueError: fewer than two images.
    """
    if count < 2:
        raise ValueError(f"data.path holds {count} picture: at least 5 are needed, 4 to train on and one held out")
    held_out = min(max(1, round(val_fraction * count)), count - 1)
    order = np.random.RandomState(0).permutation(count)  # the legacy generator: numpy promises its stream for good
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


def load_pictures(
    config: PicturesConfig,
    count: int,
    read: Callable[[int], tuple[Image.Image, int]],
    name: Callable[[int], str],
    key: Callable[..., str],
) -> tuple[Tensor, Tensor]:
    """Pictures as (training images, held-out images), (N, C, H, W) uint8, decoded unless the cache has them.

    Args:
        count: of the pictures.
        read: number of a picture to the picture, and how many frames or pages its file has.
        name: number of a picture to what errors call it.
        key: of the cached array, from the numbers of the pictures in its order, and settings by name.

    Raises:
        ValueError: fewer than two pictures, one that is damaged, or of another size where no `image_size` is given.
    """
    train, val = split(count, config.val_fraction)
    order, several = train + val, list[str]()
    edge = config.image_size or read(order[0])[0].width

    def pixels(index: int) -> np.ndarray:
        picture, pages = read(index)
        if pages > 1:
            several.append(name(index))
        return _pixels(picture, edge, config, name(index))

    settings = {"train": len(train), "size": config.image_size, "channels": config.channels, "filter": config.filter}
    shape = (count, config.channels, edge, edge)
    images = cached(config.cache, key(order, **settings), shape, in_threads(pixels, order))
    if several:
        first = min(several)
        log.warning(
            "data.path=%s: of %d files with several frames or pages the first is taken (%s)", config.path, len(several), first
        )
    return images[: len(train)], images[len(train) :]


def _from_folder(folder: Path, config: ImagesConfig) -> tuple[Tensor, Tensor]:
    paths, left_out = picture_files(folder)
    if not paths:
        raise FileNotFoundError(f"data.path={config.path} holds no picture: {', '.join(FORMATS)} are read")
    for why, count in left_out.items():
        log.warning("data.path=%s: %d %s", config.path, count, why)

    def key(order: list[int], **settings: object) -> str:
        files = ((paths[index].relative_to(folder).as_posix(), paths[index]) for index in order)
        return listing_key(files, data="images", **settings)

    return load_pictures(
        config, len(paths), lambda index: decode(paths[index], config.channels), lambda index: str(paths[index]), key
    )


def _from_npz(path: Path, config: ImagesConfig) -> tuple[Tensor, Tensor]:
    source = read_npz(path)
    edge = config.image_size or source.shape[2]

    def pixels(index: int) -> np.ndarray:
        return _pixels(Image.fromarray(source[index]).convert(MODES[config.channels]), edge, config, f"{path}[{index}]")

    train, val = (torch.from_numpy(np.stack([pixels(i) for i in part])) for part in split(len(source), config.val_fraction))
    return train, val


def _pixels(picture: Image.Image, edge: int, config: PicturesConfig, name: str) -> np.ndarray:
    """(C, edge, edge) uint8. Raises ValueError for a picture of another size where no `image_size` is given."""
    if config.image_size is not None:
        picture = resize(picture, edge, config.filter)
    if picture.size != (edge, edge):
        size = f"{picture.width}x{picture.height}"
        raise ValueError(f"{name} is {size}, not {edge}x{edge}: type data.image_size={edge} to crop and resize all pictures")
    return channels_first(picture)


def read_npz(path: Path) -> np.ndarray:
    """The array `images`, or the sole array, of an .npz: (N, H, W, 3) or (N, H, W) uint8.

    Raises:
        ValueError: damaged, no .npz, several arrays and none called `images`, or another shape or dtype.
    """
    wanted = "an .npz of uint8 (N, H, W, C) with C 1 or 3 is wanted, array `images` or the sole array"
    with reading(path, wanted) as stream, np.load(stream, allow_pickle=False) as archive:
        sole = len(archive.files) == 1
        images: np.ndarray = archive[archive.files[0] if sole else "images"]
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3) or not images.size:
        raise ValueError(f"{path} holds {images.dtype} {images.shape}: {wanted}")
    return images
