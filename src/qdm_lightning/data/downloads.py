"""Published files of a data set, fetched and checked. Messages say what is missing or damaged, where, and how to get it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from torchvision.datasets.utils import calculate_md5  # type: ignore[import-untyped]

OTHER_FILES = "(data.verify=false accepts other files of this format)"


def download(name: str, root: Path, fetch: Callable[[], object], otherwise: str) -> None:
    """Let `fetch` get the files of data set `name` below `root`, one process at a time.

    Raises:
        FileNotFoundError: it cannot; the message ends with `otherwise`, how to get them by other means.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / f"{name}.lock"):
            fetch()
    except (ImportError, OSError, RuntimeError) as error:
        raise FileNotFoundError(f"{name} could not be downloaded to {root} ({error}): {otherwise}") from error


def require(path: Path, how: str, md5: str | None = None) -> None:
    """Check that `path` is a file, and that its MD5 sum is `md5` (hexadecimal) where one is given.

    Raises:
        FileNotFoundError: no such file; the message says `how` to get it.
        ValueError: another sum.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing: looked for {path}; {how}")
    if md5 is not None and calculate_md5(path) != md5:
        raise ValueError(f"{path} is damaged: its MD5 sum is not the published {md5}; {how} {OTHER_FILES}")
