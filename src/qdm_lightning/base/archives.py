"""Zip archives (.npz, checkpoints): a few bytes can stand for terabytes, so sizes are checked before memory is taken."""

from __future__ import annotations

import ast
import math
import re
import zipfile
from dataclasses import dataclass
from typing import IO, BinaryIO

SMALL = 2**30
"""Bytes that any archive may unpack to."""

RATIO = 100
"""Beyond `SMALL`: how many times its own size an archive may unpack to. Pictures and weights never come near."""


@dataclass(frozen=True)
class Header:
    """What an array says of itself: kind and bytes of an item, such as `u1`, and its shape."""

    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.kind[1:] or 1) * (4 if self.kind[0] == "U" else 1)


def check_sizes(stream: BinaryIO) -> None:
    """Check that a zip archive unpacks to what its size can hold, and that each array in it has the bytes that its header says.

    Anything but a zip archive passes. The stream is at its beginning afterwards.

    Raises:
        ValueError: a bomb, or an array that promises more or less than is there.
        zipfile.BadZipFile, OSError: damaged.
    """
    if stream.read(4) == b"PK\x03\x04":
        array_headers(stream)
    stream.seek(0)


def array_headers(stream: BinaryIO) -> dict[str, Header]:
    """Headers of the arrays in an .npz, by name. Raises what `check_sizes` raises."""
    size, headers = stream.seek(0, 2), dict[str, Header]()
    with zipfile.ZipFile(stream) as archive:
        total = sum(member.file_size for member in archive.infolist())
        if total > max(SMALL, RATIO * size):
            raise ValueError(f"it would unpack to {total:,} bytes from {size:,}, which no data do")
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as content:
                    headers[name], begin = _header(name, content)
                promised, there = headers[name].nbytes, member.file_size - begin
                if promised != there:
                    raise ValueError(f"{name} promises {promised:,} bytes in its header and holds {there:,}")
    stream.seek(0)
    return headers


def _header(name: str, stream: IO[bytes]) -> tuple[Header, int]:
    """Header of an array in NumPy's format (NEP 1), and where its bytes begin."""
    begin = stream.read(8)
    if begin[:6] != b"\x93NUMPY":
        raise ValueError(f"{name} is no array")
    width = 2 if begin[6] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    said = ast.literal_eval(stream.read(min(length, 2**16)).decode("latin-1"))
    kind = re.fullmatch(r"[<>|=]?([a-zA-Z]\d*)", str(said["descr"]))
    if kind is None or kind[1][0] == "O":
        raise ValueError(f"{name} is no array of numbers or text")
    return Header(kind[1], tuple(map(int, said["shape"]))), 8 + width + length
