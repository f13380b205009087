"""Files that are either whole or absent (written to another name, synced, renamed), read with errors that name them, hashed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from qdm_lightning.base.checks import first_line

STALE = 3600.0
"""Seconds after which a half-written file of another machine is that of a killed process, where no lock says so."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; after the block it is synced and renamed to `path`, or removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder in the folder of `path`; after the block its files are synced and it takes the place of `path`.

    After an error in the block `path` is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".tmp", f".{path.name}.", path.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        for file in [*sorted(new.rglob("*")), new]:
            _sync(file)
        if path.exists():
            path.rename(Path(scratch) / "old")
        new.rename(path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename never publishes what a crash could empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all; its folder is created."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, whole or not at all."""
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode())


def remove_leftovers(path: Path, *, locked: bool = True) -> None:
    """Remove the temporary files and folders of processes that were killed while writing `path`.

    Args:
        path: its name may be a pattern, such as `*`.
        locked: the caller holds the lock under which `path` is written. Without one, a file is left over if the process of this
            machine that its name tells is gone, or after `STALE`.
    """
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(FileNotFoundError):  # its writer is done, or another process was faster
            if locked or _abandoned(temporary):
                if temporary.is_dir():
                    shutil.rmtree(temporary, ignore_errors=True)
                else:
                    temporary.unlink()


def _abandoned(temporary: Path) -> bool:
    host, process = temporary.name.split(".")[-3:-1]
    if host != _host() or not process.isdigit():
        return time.time() - temporary.stat().st_mtime > STALE
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextmanager
def reading(path: Path, advice: str = "") -> Iterator[BinaryIO]:
    """Open `path` for a reader of its format, whatever that raises at damaged bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: "<path> is damaged: <what went wrong in the block>", and `advice` where it is given.
    """
    with path.open("rb") as stream:
        try:
            yield stream
        except Exception as error:  # json, zip, zlib, numpy and pickle each raise their own
            raise ValueError(f"{path} is damaged: {first_line(error)}{advice and f'; {advice}'}") from error


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: "<path> is damaged: ...", and `advice` where it is given.
    """
    with reading(path, advice) as stream:
        content = json.load(stream)
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    return content


def sha256(pieces: Iterable[Any]) -> str:
    """SHA-256 (hexadecimal) of `pieces` laid end to end: strings, in UTF-8, and buffers (bytes, contiguous arrays)."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode() if isinstance(piece, str) else piece)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def data_hash(data: Any) -> str:
    """SHA-256 (hexadecimal) of plain data, whatever the order of the names in its dicts."""
    return sha256([json.dumps(data, sort_keys=True)])
