"""Files that are whole or absent (written to another name, synced, renamed), checksummed, read with errors that name them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from qdm_lightning.base.archives import check_sizes
from qdm_lightning.base.checks import one_line
from qdm_lightning.base.checksums import add_checksum, file_hash, opened_checked, rename_checked, sync

__all__ = [
    "atomic_folder",
    "atomic_path",
    "data_hash",
    "file_hash",
    "read_json",
    "read_text",
    "reading",
    "remove_leftovers",
    "sha256",
    "verify",
    "write_json",
    "write_whole",
]

STALE = 3600.0
"""Seconds after which a half-written file of another machine is that of a killed process, where no lock says so."""


@contextmanager
def atomic_path(path: Path, checksum: bool = True) -> Iterator[Path]:
    """A temporary path in the folder of `path`; after the block it is synced and renamed to `path`, or removed on an error.

    Args:
        path: its folder is created.
        checksum: leave a checksum beside it (see `checksums`); false for a PNG, which has its own, and for what is for the user
            alone and never read back.

    Raises:
        OSError: it cannot be written, such as on a full disk; its `filename` is `path`, whatever the block's library raised.
    """
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            if checksum:
                rename_checked(temporary, path)
            else:
                temporary.replace(path)
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder in the folder of `path`; after the block its files are synced, each with a checksum, and it takes the
    place of `path`.

    After an error in the block `path` is what it was.

    Raises:
        OSError: as `atomic_path`.
    """
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".tmp", f".{path.name}.", path.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            for file in sorted(new.rglob("*")):
                if file.is_file() and not file.name.startswith("."):
                    add_checksum(file)
            for file in [*sorted(new.rglob("*")), new]:
                sync(file)
            if path.exists():
                path.rename(Path(scratch) / "old")
            new.rename(path)
            sync(path.parent)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A system error of the block is about `path`: libraries leave the name out, or raise errors of their own for it."""
    try:
        yield
    except ValueError:  # what is wrong with the content
        raise
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _system_error(error: BaseException) -> int | None:
    """Number of the system error behind an exception: its own, that of the one it came from (torch), or in its text (Rust)."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error.__context__, OSError):
        return error.__context__.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def write_whole(path: Path, content: bytes, checksum: bool = True) -> None:
    """Write `content` to `path`, whole or not at all; arguments as of `atomic_path`."""
    with atomic_path(path, checksum) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, data: Any, checksum: bool = True) -> None:
    """Write plain data as indented JSON, whole or not at all; arguments as of `atomic_path`."""
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode(), checksum)


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

    Its checksum is compared, and the sizes in a zip archive, before the block sees a byte.

    Raises:
        FileNotFoundError: no such file.
        ValueError: "<path> is damaged: <what is wrong>", and `advice` where it is given, in one line.
    """
    with opened_checked(path, advice) as stream:
        try:
            check_sizes(stream)
            yield stream
        except Exception as error:  # json, zip, zlib, numpy and pickle each raise their own
            raise ValueError(f"{path} is damaged: {_what(error)}{advice and f'; {advice}'}") from error


def _what(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) and "weights" in str(error).lower():  # torch advises how to run it
        return "it is not tensors and plain data alone; a pickle can run code, and is not read"
    return one_line(error)[:300] or type(error).__name__


def verify(path: Path, advice: str = "") -> None:
    """Compare a file that a library reads with its checksum. Raises ValueError, FileNotFoundError as `reading`."""
    with reading(path, advice):
        pass


def read_text(path: Path, advice: str = "") -> str:
    """The text of a file in UTF-8. Raises FileNotFoundError, ValueError as `reading`."""
    with reading(path, advice) as stream:
        return stream.read().decode()


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


def data_hash(data: Any) -> str:
    """SHA-256 (hexadecimal) of plain data, whatever the order of the names in its dicts."""
    return sha256([json.dumps(data, sort_keys=True)])
