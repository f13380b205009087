"""Argument checks whose message says what was given, what is allowed and what to type. Imports nothing heavy."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path


class UserError(ValueError):
    """Bad input: its message is one line for the user, who sees no traceback."""


def one_line(text: object) -> str:
    """`text` with every run of white space, line breaks included, as one space."""
    return " ".join(str(text).split())


def first_line(error: Exception) -> str:
    """First line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


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
    """Make a folder, and raise UserError where no file can be written in it. `name` is the setting that says where it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{name}={folder} cannot be written ({error.strerror}): give another folder") from error


def folder(name: str, value: str) -> None:
    """Raise ValueError where `value` can be no folder, as it is a file or lies below one."""
    path = Path(value).expanduser().absolute()
    for file in (path, *path.parents):
        if file.exists() and not file.is_dir():
            raise ValueError(
                f"{name}={value} is not allowed: {file} is a file; give a folder, which is made if it is not there"
            )
