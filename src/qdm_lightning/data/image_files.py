"""From picture files to uint8 arrays of one size. Pillow does the decoding and the resampling."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from qdm_lightning.base.checks import first_line

RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
MODES = {1: "L", 3: "RGB"}
"""Pillow's mode by number of channels."""

Image.init()
FORMATS = tuple(name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN)
"""Pillow's names of what is read: formats of pictures that are decoded here. Others can start programs (EPS: Ghostscript)."""

MOST_PIXELS = int(Image.MAX_IMAGE_PIXELS or 0)
"""Of one picture: where Pillow sees a decompression bomb."""

warnings.simplefilter("error", Image.DecompressionBombWarning)  # once, as threads share the filters

Item = TypeVar("Item")

_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def picture_files(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Files below `folder` whose endings name one of `FORMATS`, sorted by path, and how many others there are, by why they are
    left out.

    Linked folders are followed after all others, in the order of their paths; none is read twice, so that a loop ends.
    """
    endings = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    found, left_out, seen, links = list[Path](), Counter[str](), set[Path](), [folder]
    while links:
        for place, folders, files in os.walk(links.pop(0)):
            real = Path(place).resolve()
            if real in seen:
                left_out["linked folders are read already under another name"] += 1
                folders.clear()
                continue
            seen.add(real)
            hidden = [name for name in folders if name.startswith(".")]
            linked = [Path(place, name) for name in folders if name not in hidden and Path(place, name).is_symlink()]
            folders[:] = [name for name in folders if name not in hidden]
            links = sorted([*links, *linked])
            left_out["folders are hidden and left out"] += len(hidden)
            for path in (Path(place, name) for name in files):
                if path.name.startswith(".") or path.suffix.lower() not in endings:
                    left_out["files are hidden or no pictures and are left out"] += 1
                elif not path.is_file():
                    left_out["links lead nowhere and are left out"] += 1
                else:
                    found.append(path.relative_to(folder))
    return [folder / path for path in sorted(found)], {why: count for why, count in left_out.items() if count}


def decode(path: Path | str, channels: int, content: bytes | None = None) -> tuple[Image.Image, int]:
    """Decode one picture completely, upright (EXIF), as gray (1 channel) or RGB (3); transparency is composed onto white.

    Args:
        path: the file, or what errors name where its `content` is given.
        channels: 1 or 3.
        content: bytes of the file; None reads it.

    Returns:
        The picture, the first where the file has several frames or pages, and how many it has.

    Raises:
        ValueError: the file is damaged, is no picture, has more than `MOST_PIXELS` or more than 8 bits a channel.
    """
    try:
        with Image.open(path if content is None else BytesIO(content), formats=FORMATS) as opened:
            pages = getattr(opened, "n_frames", 1)
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} has more than {MOST_PIXELS:,} pixels: make it smaller or take it out") from error
    except Exception as error:  # each decoder has its own
        raise ValueError(f"{path} is damaged or no picture: {first_line(error)}; replace it or take it out") from error
    if picture.mode in _DEEP:
        raise ValueError(f"{path} has more than 8 bits a channel (mode {picture.mode}): save it with 8 bits a channel")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert(MODES[channels]), pages


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
