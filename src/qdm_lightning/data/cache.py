"""Large data sets are decoded once, into a uint8 .npy file that is memory-mapped from then on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every key: raise it when the same files and settings give other pixels."""

Item = TypeVar("Item")


def listing_key(files: Iterable[tuple[str, Path]], **settings: object) -> str:
    """SHA-256 (hexadecimal) over name, size and time of change of `files` and over `settings`; nothing is read.

    Raises:
        FileNotFoundError: a file is not there.
    """
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode())
    for name, path in files:
        state = path.stat()
        digest.update(f"\n{name}\0{state.st_size}\0{state.st_mtime_ns}".encode())
    return digest.hexdigest()


def in_threads(make: Callable[[Item], np.ndarray], items: Sequence[Item], chunk: int = 512) -> Iterator[np.ndarray]:
    """Yield `make(item)` (C, H, W) of all items in order, in stacks (n, C, H, W), n at most `chunk`; threads share the work."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for begin in range(0, len(items), chunk):
            yield np.stack(list(pool.map(make, items[begin : begin + chunk])))


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


def cached(
    folder: Path | None, key: str, shape: tuple[int, int, int, int], blocks: Callable[[], Iterable[np.ndarray]]
) -> Tensor:
    """The array under `key`, decoded by `blocks` if it is not there yet; of several processes one decodes, the others wait.

    The file is written beside and renamed when it is complete: an interrupted decoding leaves no array.

    Args:
        folder: cache directory; None decodes into memory and keeps nothing.
        key: hash of everything that determines the pixels.
        shape: (N, C, H, W).
        blocks: yields uint8 (n, C, H, W) in order, N images together.

    Returns:
        uint8 (N, C, H, W), memory-mapped copy-on-write: writing to it changes no file.

    Raises:
        ValueError: `blocks` yields another number of images, or the stored array is damaged.
    """
    if folder is None:
        memory = np.empty(shape, dtype=np.uint8)
        _fill(memory, blocks())
        return torch.from_numpy(memory)
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key[:32]}.npy"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            log.info("decoding %d images into %s (once)", shape[0], path)
            _write(path, shape, blocks)
    try:
        stored = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"the decoded images in {path} are damaged ({error}): delete that file, it will be made again"
        ) from error
    if stored.shape != shape or stored.dtype != np.uint8:
        raise ValueError(
            f"{path} holds {stored.dtype} {stored.shape}, not uint8 {shape}: delete that file, it will be made again"
        )
    return torch.from_numpy(stored)


def _write(path: Path, shape: tuple[int, int, int, int], blocks: Callable[[], Iterable[np.ndarray]]) -> None:
    beside = path.with_suffix(".part")
    try:
        array = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=shape)
        _fill(array, blocks())
        array.flush()
        del array
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
