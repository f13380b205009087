"""Files of a fixed number of images or features each: whole or absent, checksummed, the same whoever wrote them.

A chunk is known by its seeds, not by its position, so that any evaluation that needs the same images finds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdm_lightning.base.files import atomic_path, reading, remove_leftovers, sha256


@dataclass(frozen=True)
class Chunk:
    """Arrays by name, each with one row a seed, and plain data about them all."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


@dataclass(frozen=True)
class ChunkFolder:
    """Chunks of one kind.

    Args:
        path: folder.
        key: hash of what made them; a file with another one is damaged.
    """

    path: Path
    key: str

    def file(self, seeds: Sequence[int]) -> Path:
        """File of the chunk with these seeds."""
        return self.path / f"{seeds[0]:010d}-{seeds_hash(seeds)[:12]}.npz"

    def write(self, seeds: Sequence[int], arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Write a chunk, whole or not at all. Each array has one row a seed; `meta` is plain data."""
        for name, array in arrays.items():
            if len(array) != len(seeds):
                raise ValueError(f"chunk of {len(seeds)} seeds: {name} has {len(array)} rows")
        text = json.dumps({"key": self.key, **meta}, sort_keys=True)
        rows = {"seeds": np.array(seeds, dtype=np.int64), **arrays}
        with atomic_path(self.file(seeds)) as part, part.open("wb") as stream:
            np.savez(stream, **rows, meta=np.array(text), sha256=np.array(_digest(rows, text)))  # type: ignore[arg-type]

    def read(self, seeds: Sequence[int]) -> Chunk | None:
        """The chunk, None where it is absent.

        Raises:
            ValueError: the file cannot be read, its checksum is wrong, or it is of another kind.
        """
        path = self.file(seeds)
        if not path.exists():
            return None
        with reading(path) as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
            text, digest = str(arrays.pop("meta")[()]), str(arrays.pop("sha256")[()])
            meta = json.loads(text)
            if digest != _digest(arrays, text) or meta.get("key") != self.key or arrays.pop("seeds").tolist() != list(seeds):
                raise ValueError("its checksum, or what it says it is, is wrong")
        return Chunk(arrays, meta)

    def sweep(self) -> None:
        """Remove what killed processes left half-written."""
        remove_leftovers(self.path / "*", locked=False)


def seeds_hash(seeds: Sequence[int]) -> str:
    """SHA-256 (hexadecimal) of a list of seeds."""
    return sha256([np.array(seeds, dtype="<i8")])


def _digest(arrays: Mapping[str, np.ndarray], text: str) -> str:
    named = [(f"{name}\0{array.dtype.str}\0{array.shape}\0", array) for name, array in sorted(arrays.items())]
    return sha256([text, *(piece for head, array in named for piece in (head, np.ascontiguousarray(array).data))])
