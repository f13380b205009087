"""metrics.csv in the run folder, which every run writes."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qdm_lightning.base.files import atomic_path


class CSVMetrics(Logger):
    """Scalars as rows of one file, `step` and a column for each name. A resumed run goes on in the same file.

    Args:
        path: path of the file.
        resume_step: the student's rows of this step and later are dropped from an existing file, as it trains them anew; the
            teacher's stay, whose training has steps of its own. None begins a new file.
    """

    name = "csv"
    version = "0"

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[tuple[bool, int], dict[str, Any]] = {}  # by (of the teacher, step)
        if resume_step is not None and path.is_file():
            with path.open(newline="", encoding="utf-8") as stream:
                rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(stream)]
            self.rows = {_key(row): row for row in rows if _key(row)[0] or int(row["step"]) < resume_step}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step or 0, **{k: v for k, v in metrics.items() if k != "epoch"}}
        if len(row) > 1:
            self.rows.setdefault(_key(row), {}).update(row)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is a file of its own."""

    @rank_zero_only
    def save(self) -> None:
        if self.rows:
            columns = dict.fromkeys(name for row in self.rows.values() for name in row)
            with atomic_path(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, columns, restval="")
                writer.writeheader()
                writer.writerows(self.rows.values())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _key(row: Mapping[str, Any]) -> tuple[bool, int]:
    return all(name == "step" or name.startswith("teacher/") for name in row), int(row["step"])
