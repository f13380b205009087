"""Caches: folders that a command of ours may write into although no run's folder is around them. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from qdm_lightning.base.files import remove_leftovers, write_whole

DEFAULT = "~/.cache/qdm_lightning"

TAG = "CACHEDIR.TAG"
"""Marks a cache, see https://bford.info/cachedir; programs that make backups leave such folders out."""

_CONTENT = b"Signature: 8a477f597d28d172789f06886806bc55\n# A cache of qdm_lightning.\n"


def is_cache(path: str | Path) -> bool:
    """True for the default cache, one that `mark_cache` marked, and what lies below one."""
    folder = Path(path).expanduser().resolve()
    return any(place == Path(DEFAULT).expanduser().resolve() or _marked(place) for place in (folder, *folder.parents))


def _marked(folder: Path) -> bool:
    file = folder / TAG
    return file.is_file() and file.read_bytes() == _CONTENT


def mark_cache(path: str | Path) -> None:
    """Make a cache of a folder that the user typed. Raises OSError where it cannot be written."""
    if not is_cache(path):
        file = Path(path).expanduser() / TAG
        remove_leftovers(file, locked=False)
        write_whole(file, _CONTENT)
