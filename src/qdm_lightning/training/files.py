"""Files that are either whole or absent: written beside, synced, renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; after the block it is synced and renamed to `path`, or removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`; after the block its files are synced and it takes the place of `path`.

    After an error in the block `path` is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new = scratch / "new"
    new.mkdir()
    try:
        yield new
        for file in [*sorted(new.rglob("*")), new]:
            _sync(file)
        if path.exists():
            path.rename(scratch / "old")
        new.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(scratch)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename never publishes what a crash could empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, whole or not at all."""
    with atomic_path(path) as beside:
        beside.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


class AtomicCheckpointIO(CheckpointIO):
    """Lightning checkpoints written whole or not at all, and read as data alone (`weights_only=True`)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(Path(path)) as beside:
            torch.save(checkpoint, beside)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as plain data on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds more than data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: give a checkpoint, such as <run>/checkpoints/last.ckpt")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise ValueError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
