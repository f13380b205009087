"""From picture files to uint8 arrays of one size. Pillow does the decoding and the resampling."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
MODES = {1: "L", 3: "RGB"}
"""Pillow's mode by number of channels."""

Item = TypeVar("Item")

_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def picture_files(folder: Path) -> list[Path]:
    """Every file below `folder` whose ending names a format that Pillow reads, sorted by path; hidden ones are left out."""
    endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    return [folder / path for path in sorted(p for p in paths if not any(part.startswith(".") for part in p.parts))]


def decode(path: Path, channels: int) -> Image.Image:
    """Decode one picture completely, upright (EXIF), as gray (1 channel) or RGB (3); transparency is composed onto white.

    Raises:
        ValueError: the file is damaged, is no picture, or holds more than 8 bits a channel.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or no picture: {error}; replace it or take it out of the folder") from error
    if picture.mode in _DEEP:
        raise ValueError(f"{path} has more than 8 bits a channel (mode {picture.mode}): save it with 8 bits a channel")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert(MODES[channels])


def resize(picture: Image.Image, size: int, filter: str) -> Image.Image:
    """The central square of `picture`, resampled to (size, size) by `filter`; a picture of that size comes back as it is."""
    if picture.size == (size, size):
        return picture
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return picture.resize((size, size), RESAMPLING[filter], box=(left, top, left + edge, top + edge))


def channels_first(picture: Image.Image) -> np.ndarray:
    """(C, H, W) uint8 of a gray or RGB picture."""
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def in_threads(make: Callable[[Item], np.ndarray], items: Sequence[Item], chunk: int = 512) -> Iterator[np.ndarray]:
    """Yield `make(item)` (C, H, W) of all items in order, in stacks (n, C, H, W), n at most `chunk`; threads share the work."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for begin in range(0, len(items), chunk):
            yield np.stack(list(pool.map(make, items[begin : begin + chunk])))


def resized(images: np.ndarray, size: int, filter: str) -> Iterator[np.ndarray]:
    """Yield `images` (N, 3, H, W) uint8 at (size, size) in stacks; those of that size come back as they are."""
    if images.shape[-2:] == (size, size):
        yield images
    else:
        pixels = list(images.transpose(0, 2, 3, 1))
        yield from in_threads(lambda p: channels_first(resize(Image.fromarray(p), size, filter)), pixels)
