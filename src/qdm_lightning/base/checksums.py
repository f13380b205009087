"""The checksum of a file beside it: `.X.sha256` says which bytes were written as `X`, and whoever reads `X` compares.

The checksum is written before `X` takes its name, and holds the content before it too until then, so that a kill at any moment
leaves a file that matches. Both are lines as `sha256sum` writes them. A file without a checksum, such as a copy or one of an
older version, is read as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_LINE = re.compile(r"([0-9a-f]{64})  ")


def checksum_file(path: Path) -> Path:
    """Where the checksum of a file stands."""
    return path.with_name(f".{path.name}.sha256")


def file_hash(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename never publishes what a crash could empty."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_checked(temporary: Path, path: Path) -> None:
    """Let `temporary`, which is on the disk, take the name `path`, and `path` its checksum.

    Args:
        temporary: in the folder of `path`, and its name begins with `.<name>.`.
    """
    new, beside = file_hash(temporary), checksum_file(path)
    scratch = beside.with_name(beside.name + temporary.name.removeprefix(f".{path.name}"))
    with _held(path.parent):
        before = _content(path)
        _write(path, [new, *(digest for digest in before if digest != new)], scratch)
        temporary.replace(path)
        sync(path.parent)
        if before:
            _write(path, [new], scratch, durable=False)


def add_checksum(path: Path) -> None:
    """Write the checksum of a file that has none, in a folder that is synced later."""
    if not checksum_file(path).exists():
        checksum_file(path).write_text(_lines(path, [file_hash(path)]))


def remove_checked(path: Path) -> None:
    """Remove a file and its checksum, or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    checksum_file(path).unlink(missing_ok=True)


@contextmanager
def opened_checked(path: Path, advice: str = "") -> Iterator[BinaryIO]:
    """Open a file for reading, if its bytes are those that were written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: "<path> is damaged: ...", what to do if it was changed on purpose, and `advice` where it is given.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is damaged: it is no file{advice and f'; {advice}'}")
    while True:
        with path.open("rb") as stream:
            written = _written(path)
            if written is not None and hashlib.file_digest(stream, "sha256").hexdigest() not in written:
                if not os.path.samestat(os.fstat(stream.fileno()), path.stat()):  # another process has just replaced it
                    continue
                raise ValueError(
                    f"{path} is damaged: its bytes are not those that were written (if it was changed on purpose, "
                    f"remove {checksum_file(path).name} beside it){advice and f'; {advice}'}"
                )
            stream.seek(0)
            yield stream
            return


def _written(path: Path) -> list[str] | None:
    """What a file may hold by its checksum; None where it has none."""
    try:
        text = checksum_file(path).read_text("ascii")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return []
    return _LINE.findall(text)


def _content(path: Path) -> list[str]:
    """The digest of what is there now. It is known, unless a process was killed while it wrote, or there is no checksum."""
    if not path.is_file():
        return []
    written = _written(path) or []
    return written if len(written) == 1 else [file_hash(path)]


def _write(path: Path, digests: Sequence[str], temporary: Path, durable: bool = True) -> None:
    if durable and _written(path) == list(digests):
        return
    try:
        temporary.write_text(_lines(path, digests))
        if durable:
            sync(temporary)
        temporary.replace(checksum_file(path))  # renames keep their order: the folder is synced after the next
    finally:
        temporary.unlink(missing_ok=True)


def _lines(path: Path, digests: Sequence[str]) -> str:
    return "".join(f"{digest}  {path.name}\n" for digest in digests)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time renames in a folder, where the file system has locks: two may write the same file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
