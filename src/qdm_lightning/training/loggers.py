"""Loggers: metrics.csv in the run folder, and Weights & Biases beside it."""

from __future__ import annotations

import csv
import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
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


def logged_in() -> bool:
    """True if W&B would find a key without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def wandb_logger(
    *,
    run_dir: Path,
    config: Mapping[str, Any],
    project: str,
    name: str | None = None,
    tags: Sequence[str] = (),
    mode: str | None = None,
    run_tags: Sequence[str] = (),
) -> Logger:
    """A W&B logger with a run of its own, also for the second job of a process. Its files lie in `run_dir`.

    Args:
        run_dir: the run folder; its name names the W&B run where `name` is None, and a resumed run takes its id up again.
        config: resolved configuration, logged as the run's.
        mode: `online`, `offline`, or None: WANDB_MODE if set, else online only where the user is logged in.
        tags, run_tags: joined.
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    chosen = mode or os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    identity = run_dir / "wandb_id"
    run_id = identity.read_text("utf-8").strip() if identity.is_file() else secrets.token_hex(4)
    with atomic_path(identity) as beside:
        beside.write_text(run_id + "\n", "utf-8")
    run = wandb.init(
        project=project,
        name=name or run_dir.name,
        id=run_id,
        resume="allow" if chosen == "online" else None,
        dir=run_dir,
        tags=[*tags, *run_tags] or None,
        mode=chosen,  # type: ignore[arg-type]
        config=dict(config),
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30),
    )
    return WandbLogger(experiment=run)
