"""A finished student as a folder for the hub, with its model card, and the folder's upload."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdm_lightning.base.checks import UserError, one_line
from qdm_lightning.base.files import atomic_folder, verify
from qdm_lightning.reporting.collect import Contents, Run, collect
from qdm_lightning.reporting.model_card import Publication, model_card
from qdm_lightning.reporting.records import METRICS

CARD, GRID, STUDENT = "README.md", "samples.png", "student"
FOLDER = "hub"
"""In the run's folder."""


@dataclass(frozen=True)
class Published:
    """What was made: the folder, its files by name with their bytes, and where it went (None: nowhere)."""

    folder: Path
    files: dict[str, int]
    url: str | None


def read_run(folder: Path) -> Contents:
    """A finished run with a student, and what was measured of it.

    Raises:
        UserError: it is not finished, has no student, one of version 0.1, or numbers that are not finite.
        FileNotFoundError, ValueError: no run there, or damaged records.
    """
    if not (folder / METRICS).is_file():
        raise UserError(f"run={folder} is not finished: python -m qdm_lightning.train run={folder} goes on with it")
    contents = collect([folder])
    run = contents.runs[0]
    if not run.student:
        raise UserError(
            f"run={folder} has no student, it is a teacher alone: its folder {folder / 'teacher'} is a plain diffusers pipeline"
        )
    if not (folder / STUDENT / "unet" / "config.json").is_file():
        raise UserError(f"run={folder} has no {STUDENT} folder of this version: train the run again")
    bad = next(_not_finite({"teacher": run.metrics["teacher"], "student": run.student}), None)
    if bad is not None:
        raise UserError(f"run={folder} is not published: its {bad[0]} is {bad[1]}")
    return contents


def _not_finite(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _not_finite(value, f"{above}{name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield f"{above}{name}", number


def make_folder(contents: Contents, out: Path, about: Publication) -> dict[str, int]:
    """Write the folder, whole or not at all; an older one is replaced.

    Returns:
        Its files by name, with their bytes; checksums, which start with a dot, are not among them.

    Raises:
        ValueError: a file of the student is damaged.
        UserError: `out` is a folder of something else.
    """
    run: Run = contents.runs[0]
    if out.is_dir() and any(out.iterdir()) and not (out / CARD).is_file():
        raise UserError(f"out={out} holds something else than a published student: give another folder")
    student = run.folder / STUDENT
    files = [file for file in sorted(student.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    with atomic_folder(out) as new:
        for file in files:
            verify(file)
            copy = new / file.relative_to(student)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        if (run.folder / GRID).is_file():
            shutil.copyfile(run.folder / GRID, new / GRID)
        (new / CARD).write_text(model_card(run, contents.results, about), "utf-8")
    found = [file for file in sorted(out.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return {file.relative_to(out).as_posix(): file.stat().st_size for file in found}


def check_repo(repo: str) -> None:
    """Raise UserError where no repository can be called so, or there is no token to write to it."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"repo={repo} is no name of a repository: {one_line(error)}") from error
    if get_token() is None:
        raise UserError(
            "the hub has no token of yours: type hf auth login, or set HF_TOKEN; dry_run=true only makes the folder"
        )


def upload(folder: Path, repo: str, private: bool, message: str) -> str:
    """Upload a folder to a repository, which is made where it is not there; returns its address.

    Raises:
        UserError: the hub cannot be reached or refuses, or the repository is there and public where `private` is asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        name = made.repo_id
        if private and not api.repo_info(name).private:
            raise UserError(f"repo={name} is there already and is public: leave out private=true, or give another name")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=[".*", "*/.*"])
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f"the hub refuses repo={repo}: {one_line(error)[:300]}; the folder is {folder}") from error
    except UserError:
        raise
    except Exception as error:
        if not _is_about_the_network(error):
            raise
        raise UserError(f"{api.endpoint} cannot be reached: {one_line(error)[:200]}; the folder is {folder}") from error
    return str(made)


def _is_about_the_network(error: BaseException) -> bool:
    """Of the client's HTTP library, whichever that is, or of the system's sockets."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
