"""Weights & Biases: one run a job, also in a multirun, under `wandb agent`, and when the job goes on later."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger

from qdm_lightning.loggers.media import STEP, TIMESTEP, cosmetic

OVER_STEPS = (
    "teacher/train/*",
    "teacher/val/*",
    "train/*",
    "val/*",
    "sampled/*",
    "samples/*",
    "final/*",
    "scale*",
    "zero_point/*",
)
AXES = {TIMESTEP: None, "activations/*": TIMESTEP, "nem_error/*": TIMESTEP, STEP: None, **dict.fromkeys(OVER_STEPS, STEP)}
"""What W&B shows, by name, and its horizontal axis; an axis has none itself."""


class WandbRun(WandbLogger):
    """Lightning's logger over a run of ours. A fault of W&B's in the middle of a job is a warning, not the job's end.

    Args:
        run: as `wandb.init` returns it.
        artifacts: log files too (see `media.log_files`).
    """

    def __init__(self, run: Any, artifacts: bool = True) -> None:
        super().__init__(experiment=run)
        self.artifacts = artifacts

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with cosmetic("metrics", "W&B"):
            super().log_metrics(metrics, step)


def logged_in() -> bool:
    """True if W&B would find a key without asking."""
    import wandb

    host = urlparse(wandb.Settings().base_url).hostname or ""
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def sweep_name(run_dir: Path) -> str | None:
    """Name of the multirun's folder that the run folder lies in (Hydra leaves `multirun.yaml` there); None for a run alone."""
    return next((folder.name for folder in list(run_dir.parents)[:3] if (folder / "multirun.yaml").is_file()), None)


def rows_before(run_dir: Path) -> int:
    """No fewer than the rows that earlier offline parts of a run have logged. W&B numbers the rows of each part from 0, and a
    row that bears a number twice may be lost where the parts are uploaded: this part begins with the number returned."""
    least = 16  # bytes that a row takes in W&B's file
    return sum(file.stat().st_size for file in run_dir.glob("wandb/offline-run-*/run-*.wandb")) // least


def start_run(mode: str, otherwise: str | None, **settings: Any) -> Any:
    """A run of its own by `wandb.init`, also while another of this process goes on.

    Args:
        mode: `online` or `offline`.
        otherwise: the mode to take, after a warning, where W&B does not answer; None makes that an error.
        settings: further settings of `wandb.init`.

    Raises:
        ValueError: W&B refuses the run, or does not answer.
    """
    import wandb

    try:
        return wandb.init(
            **settings,
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30),
        )
    except wandb.Error as error:
        first = str(error).partition("\n")[0]
        if otherwise in (None, mode):
            raise ValueError(f"W&B refuses this run: {first}; to go without: logger.mode=offline or logger=none") from error
        logging.getLogger(__name__).warning("W&B cannot be reached (%s): this run is logged %s", first, otherwise)
        wandb.teardown()  # its service holds on to the run's id
        return start_run(otherwise, None, **settings)
