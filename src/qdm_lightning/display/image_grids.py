"""Grids of sample images as PNG."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qdm_lightning.base.files import reading, write_whole

if TYPE_CHECKING:  # the report reads pictures and waits for no torch
    from torch import Tensor

TILE = 64
"""Smallest edge of an image in a grid, in pixels: smaller images are enlarged by a whole factor, each pixel a square."""

GAP, MARGIN, COLUMNS = 4, 18, 16


def enlargement(height: int, width: int) -> int:
    """Whole factor that brings the longer edge to `TILE` pixels or more.

    >>> enlargement(8, 8), enlargement(24, 24), enlargement(256, 256)
    (8, 3, 1)
    """
    return max(1, -(-TILE // max(height, width)))


def save_grid(path: Path, rows: Sequence[Tensor], labels: Sequence[str], columns: int = COLUMNS) -> None:
    """Write rows of images above one another, so that a column shows one seed: teacher above student.

    More than `columns` images a row continue in further blocks below.

    Args:
        path: PNG to write; its folder is created.
        rows: each (N, C, H, W) uint8, C 1 or 3, all of one shape.
        labels: one a row, drawn above it.
        columns: images side by side, at most.

    Raises:
        ValueError: no image, rows of different shape, not uint8, or not as many labels as rows.
    """
    if not rows or len(rows) != len(labels):
        raise ValueError(f"a grid needs rows and a label for each: got {len(rows)} rows, {len(labels)} labels")
    shape = rows[0].shape
    for row in rows:
        if row.shape != shape or str(row.dtype) != "torch.uint8" or row.dim() != 4 or shape[0] == 0 or shape[1] not in (1, 3):
            raise ValueError(f"a grid needs uint8 rows (N, 1 or 3, H, W) of one shape: got {tuple(row.shape)} {row.dtype}")
    factor = enlargement(shape[2], shape[3])
    strips = [
        _strip(row[start : start + columns], label, factor, min(columns, shape[0]))
        for start in range(0, shape[0], columns)
        for row, label in zip(rows, labels, strict=True)
    ]
    write_whole(path, png(Image.fromarray(np.concatenate(strips))), checksum=False)


def _strip(images: Tensor, label: str, factor: int, columns: int) -> np.ndarray:
    """One row of the grid below its label: (MARGIN + H' + GAP, width, 3) uint8."""
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy().repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = pixels.shape[1:3]
    strip = Image.new("RGB", (GAP + columns * (width + GAP), MARGIN + height + GAP), "white")
    ImageDraw.Draw(strip).text((GAP, 3), label, fill="black", font=ImageFont.load_default(12))
    for index, picture in enumerate(pixels):
        strip.paste(Image.fromarray(picture), (GAP + index * (width + GAP), MARGIN))
    return np.array(strip)


def png(image: Image.Image) -> bytes:
    """The file's content."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def read_rows(path: Path, count: int) -> list[Image.Image]:
    """The rows of a grid by `save_grid` without their labels, where each is one strip (at most `COLUMNS` images a row).

    Args:
        path: the PNG.
        count: rows that it holds, such as 2 for teacher above student.

    Raises:
        FileNotFoundError: no file.
        ValueError: it is damaged or no picture, or its height does not divide into `count` rows.
    """
    with reading(path) as stream:
        check_png(stream)
        grid = Image.open(stream).convert("RGB")
    height, rest = divmod(grid.height, count)
    if rest or height <= MARGIN + GAP:
        raise ValueError(f"{path} is no grid of {count} rows: it is {grid.height} pixels high")
    return [grid.crop((0, k * height + MARGIN, grid.width, (k + 1) * height - GAP)) for k in range(count)]


def check_png(stream: BinaryIO) -> None:
    """Compare the checksums of a PNG's chunks, which Pillow does not for the pixels. The stream is at its beginning afterwards.

    Raises:
        ValueError: a byte is not what was written, or the file does not end where it should.
    """
    kind, whole = b"", stream.read(8) == b"\x89PNG\r\n\x1a\n"
    while whole and kind != b"IEND":
        length = stream.read(4)
        chunk = stream.read(int.from_bytes(length, "big") + 4)
        kind, whole = chunk[:4], len(length) == 4 and zlib.crc32(chunk) == int.from_bytes(stream.read(4), "big")
    if not whole or stream.read(1):
        raise ValueError("it is no PNG, or its checksums are wrong")
    stream.seek(0)
