"""Checks of downloaded files: there at all, and with the published MD5 sum. Messages say what, where and how to get it."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets.utils import calculate_md5  # type: ignore[import-untyped]


def require(path: Path, how: str) -> None:
    """Raise FileNotFoundError, with `how` to get it, unless `path` is a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing: looked for {path}; {how}")


def require_md5(path: Path, expected: str, how: str) -> None:
    """Raise ValueError, with `how` to get it, unless the MD5 sum of the file at `path` is `expected` (hexadecimal)."""
    found = calculate_md5(path)
    if found != expected:
        raise ValueError(
            f"{path} is damaged: its MD5 sum is {found}, published is {expected}; {how} "
            "(data.verify=false accepts other files of this format)"
        )
