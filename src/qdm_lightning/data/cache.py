"""Large data sets are decoded once, into a uint8 .npy file that is memory-mapped from then on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock
from torch import Tensor

from qdm_lightning.base.checksums import remove_checked
from qdm_lightning.base.files import atomic_path, reading, remove_leftovers, sha256

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every key: raise it when the same files and settings give other pixels."""


def listing_key(files: Iterable[tuple[str, Path]], **settings: object) -> str:
    """SHA-256 (hexadecimal) over `files`, `settings` and Pillow's version; no file is read.

    A file is its name, inode, size, and two times: of its content (mtime), which archives and copies set, and of its
    inode (ctime), which no program can. So one that was replaced or copied is another one, and is decoded again.

    Raises:
        FileNotFoundError: a file is not there.
    """
    states = ((name, path.stat()) for name, path in files)
    fields = ("st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    listing = ("\0".join(["\n" + name, *(str(getattr(state, field)) for field in fields)]) for name, state in states)
    return sha256([_settings(settings), *listing])


def content_key(contents: Iterable[bytes], **settings: object) -> str:
    """SHA-256 (hexadecimal) over the bytes of files, `settings` and Pillow's version."""
    return sha256(chain([_settings(settings)], chain.from_iterable((f"\n{len(content)}\n", content) for content in contents)))


def _settings(settings: Mapping[str, object]) -> str:
    return json.dumps({"format": FORMAT, "pillow": PIL.__version__, **settings}, sort_keys=True)


def _checked(blocks: Iterable[np.ndarray], shape: tuple[int, int, int, int]) -> Iterator[np.ndarray]:
    """The `blocks` one after another. Raises ValueError unless they make an array of `shape`."""
    done = 0
    for block in blocks:
        done += len(block)
        if done > shape[0]:
            raise ValueError(f"more than the {shape[0]} images announced")
        if block.shape[1:] != shape[1:] or block.dtype != np.uint8:
            raise ValueError(f"images {block.dtype} {block.shape[1:]} where uint8 {shape[1:]} were announced")
        yield block
    if done != shape[0]:
        raise ValueError(f"{done} images where {shape[0]} were announced")


def cached(folder: str | None, key: str, shape: tuple[int, int, int, int], blocks: Iterable[np.ndarray]) -> Tensor:
    """The array under `key`, decoded by `blocks` if it is not there yet, or damaged.

    Of several processes one decodes, the others wait. The file gets its name when it is complete: an interrupted decoding
    leaves no array.

    Args:
        folder: cache directory; None decodes into memory and keeps nothing.
        key: hash of everything that determines the pixels.
        shape: (N, C, H, W).
        blocks: uint8 (n, C, H, W) in order, N images together; only iterated over where the array is not there.

    Returns:
        uint8 (N, C, H, W), memory-mapped copy-on-write: writing to it changes no file.

    Raises:
        ValueError: `blocks` yields other images than `shape` says.
    """
    if not folder:
        memory, done = np.empty(shape, dtype=np.uint8), 0
        for block in _checked(blocks, shape):
            memory[done : done + len(block)] = block
            done += len(block)
        return torch.from_numpy(memory)
    path = Path(folder).expanduser() / f"{key[:32]}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            try:
                return _stored(path, shape)
            except ValueError as error:
                log.warning("%s; it is made again", error)
                remove_checked(path)
        log.info("decoding %d images into %s (once)", shape[0], path)
        remove_leftovers(path)
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for block in _checked(blocks, shape):
                stream.write(np.ascontiguousarray(block).data)
    return _stored(path, shape)


def _stored(path: Path, shape: tuple[int, int, int, int]) -> Tensor:
    """The array of a file. Raises ValueError where it is damaged, or another one."""
    with reading(path):
        stored = np.load(path, mmap_mode="c", allow_pickle=False)
        if stored.shape != shape or stored.dtype != np.uint8:
            raise ValueError(f"it holds {stored.dtype} {stored.shape}, not uint8 {shape}")
    return torch.from_numpy(stored)
