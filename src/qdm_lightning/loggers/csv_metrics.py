"""metrics.csv in the run folder, which every run writes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qdm_lightning.base.files import atomic_path, reading


class CSVMetrics(Logger):
    """Scalars as rows of one file, `step` and a column for each name: the teacher's rows, then the others, by step.

    The file is a function of what was logged, in whatever order: a resumed run that logs a step again changes nothing.

    Args:
        path: path of the file.
        goes_on: take up the rows of an existing file; else a new one begins.

    Raises:
        ValueError: the existing file is damaged.
    """

    name = "csv"
    version = "0"

    def __init__(self, path: Path, goes_on: bool = False) -> None:
        super().__init__()
        self.path, self._saved = path, True
        self.rows: dict[tuple[bool, int], dict[str, Any]] = {}  # by (of the teacher, step)
        if goes_on and path.exists():
            with reading(path, "remove it to go on without what was logged before") as stream:
                lines = csv.DictReader(line.decode() for line in stream)
                rows = [{name: value for name, value in row.items() if value} for row in lines]
                self.rows = {_key(row): row for row in rows}

    def copy_of_rows(self, of_teacher: bool) -> list[dict[str, Any]]:
        """The rows so far of the teacher's training, or all others, as plain data."""
        return [dict(row) for key, row in self.rows.items() if key[0] == of_teacher]

    def go_back(self, of_teacher: bool, step: int, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Training goes on after `step` steps: what was logged of later ones is dropped, as they are made anew.
        The file stays as it is until then.

        Args:
            of_teacher: whose training; the rows of the other one stay.
            step: number of steps that were made.
            rows: `copy_of_rows` as of then, where it is known.
        """
        kept = {key: row for key, row in self.rows.items() if key[0] != of_teacher or (rows is None and key[1] < step)}
        self.rows = kept | {_key(row): dict(row) for row in rows or ()}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step or 0, **{k: v for k, v in metrics.items() if k != "epoch"}}
        if len(row) > 1:
            self.rows.setdefault(_key(row), {}).update(row)
            self._saved = False

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is a file of its own."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file, whole or not at all, if anything is new."""
        if self._saved:
            return
        names = sorted({name for row in self.rows.values() for name in row} - {"step"})
        with atomic_path(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["step", *names], restval="")
            writer.writeheader()
            writer.writerows(row for _, row in sorted(self.rows.items(), key=lambda item: (not item[0][0], item[0][1])))
        self._saved = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _key(row: Mapping[str, Any]) -> tuple[bool, int]:
    return all(name == "step" or name.startswith("teacher/") for name in row), int(row["step"])
