"""Large data sets are decoded once, into a uint8 .npy file that is memory-mapped from then on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock
from torch import Tensor

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
    return sha256([json.dumps({"format": FORMAT, "pillow": PIL.__version__, **settings}, sort_keys=True), *listing])


def _fill(array: np.ndarray, blocks: Iterable[np.ndarray]) -> None:
    """Write `blocks` one after another. Raises ValueError unless they fill `array` exactly."""
    done = 0
    for block in blocks:
        if done + len(block) > len(array):
            raise ValueError(f"more than the {len(array)} images announced")
        array[done : done + len(block)] = block
        done += len(block)
    if done != len(array):
        raise ValueError(f"{done} images where {len(array)} were announced")


def cached(folder: str | None, key: str, shape: tuple[int, int, int, int], blocks: Iterable[np.ndarray]) -> Tensor:
    """The array under `key`, decoded by `blocks` if it is not there yet; of several processes one decodes, the others wait.

    The file gets its name when it is complete: an interrupted decoding leaves no array.

    Args:
        folder: cache directory; None decodes into memory and keeps nothing.
        key: hash of everything that determines the pixels.
        shape: (N, C, H, W).
        blocks: uint8 (n, C, H, W) in order, N images together; only iterated over where the array is not there.

    Returns:
        uint8 (N, C, H, W), memory-mapped copy-on-write: writing to it changes no file.

    Raises:
        ValueError: `blocks` yields another number of images, or the stored array is damaged.
    """
    if not folder:
        memory = np.empty(shape, dtype=np.uint8)
        _fill(memory, blocks)
        return torch.from_numpy(memory)
    path = Path(folder).expanduser() / f"{key[:32]}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            log.info("decoding %d images into %s (once)", shape[0], path)
            remove_leftovers(path)
            with atomic_path(path) as temporary:
                array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
                _fill(array, blocks)
                array.flush()
    with reading(path, "delete that file, it will be made again"):
        stored = np.load(path, mmap_mode="c", allow_pickle=False)
        if stored.shape != shape or stored.dtype != np.uint8:
            raise ValueError(f"it holds {stored.dtype} {stored.shape}, not uint8 {shape}")
    return torch.from_numpy(stored)
