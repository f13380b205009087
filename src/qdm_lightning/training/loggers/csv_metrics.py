"""metrics.csv in the run folder, which every run writes."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qdm_lightning.training.files import atomic_path


class CSVMetrics(Logger):
    """Scalars as rows of one file, `step` and a column for each name. A resumed run goes on in the same file.

    Args:
        path: of the file.
        resume_step: rows of this step and later are dropped from an existing file; None begins a new one.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.columns = ["step"]
        if resume_step is not None and path.is_file():
            with path.open(newline="", encoding="utf-8") as stream:
                reader = csv.DictReader(stream)
                self.rows = [row for row in reader if float(row["step"]) < resume_step]
                self.columns = list(reader.fieldnames or self.columns)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return "0"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step or 0, **{k: v for k, v in metrics.items() if k != "epoch"}}
        if len(row) == 1:
            return
        if self.rows and int(self.rows[-1]["step"]) == row["step"]:
            self.rows[-1].update(row)
        else:
            self.rows.append(row)
        self.columns += [name for name in row if name not in self.columns]

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is a file of its own."""

    @rank_zero_only
    def save(self) -> None:
        if not self.rows:
            return
        with atomic_path(self.path) as beside, beside.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
