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


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all; its folder is created."""
    with atomic_path(path) as beside:
        beside.write_bytes(content)
