"""Argument checks whose message says what was given, what is allowed and what to type. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path


class UserError(ValueError):
    """Bad input: its message is one line for the user, who sees no traceback."""


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What moves a terminal's cursor, colors it, or turns the order of its letters; tabs and line breaks aside."""


def visible(text: object) -> str:
    """`text` with its control characters written out: names and messages out of files must not steer the terminal.

    >>> visible("a\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """`text` with every run of white space, line breaks included, as one space, and without control characters."""
    return visible(" ".join(str(text).split()))


_ADVICE = re.compile(r"[^.]*(If you trust|can still be loaded|In PyTorch \d|allow_pickle|weights_only).*")


def first_line(error: Exception) -> str:
    """First line of an error's message, without advice to trust a file that was refused; its type where nothing is left.

    >>> first_line(ValueError("Pickled data. If you trust the file, pass allow_pickle=True\\nmore"))
    'Pickled data.'
    """
    return _ADVICE.sub("", str(error).strip().partition("\n")[0]).strip() or type(error).__name__


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ValueError unless `value` is in `allowed`. `name` is the override to type, such as `sampler.spacing`."""
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed)
        raise ValueError(f"{name}={value} is not allowed: choose one of {choices}, for example {name}={next(iter(allowed))}")


def at_least(name: str, value: float, minimum: float) -> None:
    """Raise ValueError unless `value >= minimum` (NaN fails)."""
    if not value >= minimum:
        raise ValueError(f"{name}={value} is not allowed: it must be at least {minimum}, for example {name}={minimum}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless `low <= value <= high` (NaN fails)."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is not allowed: it must lie in [{low}, {high}], for example {name}={high}")


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `0 < value < inf` (NaN fails)."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} is not allowed: it must be a positive number")


def writable(name: str, folder: Path) -> None:
    """Raise UserError where no file can be written in a folder, which need not be there yet, and is not made.

    Args:
        name: the setting that says where it is.
        folder: absolute.
    """
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{name}={folder} cannot be written ({error.strerror}): give another folder") from error


def memory() -> int:
    """Bytes of memory that this machine has, or that this container may take."""
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text("ascii").split() if limit.is_file() else []
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
    return min([physical, *(int(word) for word in words if word.isdigit())])


def fits_memory(what: str, needed: float, available: int | None = None) -> None:
    """Raise ValueError where `what`, such as `num_samples=1000`, takes more than the bytes available (None: `memory()`)."""
    available = memory() if available is None else available
    if needed > available:
        say = f"it takes some {needed / 2**30:,.0f} GiB of memory, this machine has {available / 2**30:,.0f}"
        raise ValueError(f"{what} is not allowed: {say}")


def folder(name: str, value: str) -> None:
    """Raise ValueError where `value` can be no folder, as it is empty, a file, or lies below one."""
    if not value:
        raise ValueError(f"{name}= is empty: give a folder, which is made if it is not there")
    path = Path(value).expanduser().absolute()
    for file in (path, *path.parents):
        if file.exists() and not file.is_dir():
            raise ValueError(
                f"{name}={value} is not allowed: {file} is a file; give a folder, which is made if it is not there"
            )
