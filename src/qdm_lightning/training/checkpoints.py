"""The two checkpoints of a training, and its end between two steps when a signal asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from qdm_lightning.base import signals
from qdm_lightning.loggers.csv_metrics import CSVMetrics

LAST, BEST = "last.ckpt", "best.ckpt"
STATE, ROWS = "Checkpoints", "metrics_csv"
"""Names in a checkpoint: the best one so far, among the callbacks' states, and the rows of metrics.csv."""


class Stopped(Exception):
    """Training ended between two steps; everything that it came to is in `last.ckpt`."""


class Checkpoints(Checkpoint):
    """Writes `last.ckpt` at each validation, before it `best.ckpt` where the loss is the least so far, and `last.ckpt` when a
    signal ends the training.

    The least loss so far is part of the checkpoint, and no path is: a folder may be moved. So are the rows of metrics.csv, as
    the file may know of steps that are made again.

    Args:
        folder: where the two lie.
        monitor: name of the loss.
        loggers: of the run; the one of metrics.csv is written before each checkpoint.
    """

    state_key = STATE

    def __init__(self, folder: Path, monitor: str, loggers: list[Any]) -> None:
        self.folder, self.monitor = folder, monitor
        self.csv = [logger for logger in loggers if isinstance(logger, CSVMetrics)]
        self.of_teacher = monitor.startswith("teacher/")
        self.loss: float | None = None
        self.step: int | None = None  # of best.ckpt
        self.saved = 0  # step of last.ckpt

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict.get("step")

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loss, self.saved = best_loss(checkpoint), int(checkpoint["global_step"])
        for logger in self.csv:
            logger.go_back(self.of_teacher, self.saved, checkpoint.get(ROWS))

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in self.csv:
            checkpoint[ROWS] = logger.copy_of_rows(self.of_teacher)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        loss = float(trainer.callback_metrics[self.monitor])
        for logger in self.csv:
            logger.save()
        if self.loss is None or loss < self.loss:
            self.loss, self.step = loss, trainer.global_step
            trainer.save_checkpoint(self.folder / BEST, weights_only=False)
        self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved = trainer.global_step

    def end_if_asked(self, trainer: Trainer) -> None:
        """Between two steps: where a signal came to any rank, write `last.ckpt`.

        Raises:
            Stopped: a signal came; in all ranks.
        """
        if trainer.strategy.reduce_boolean_decision(signals.received() is not None, all=False):
            if trainer.global_step > self.saved:
                self._save_last(trainer)
            raise Stopped


def best_loss(checkpoint: Mapping[str, Any]) -> float | None:
    """The least loss that was validated up to a checkpoint, of older versions too."""
    states = checkpoint["callbacks"]
    if STATE in states:
        return None if states[STATE]["loss"] is None else float(states[STATE]["loss"])
    scores = [state["best_model_score"] for key, state in states.items() if key.startswith("ModelCheckpoint{'monitor': '")]
    return float(scores[0]) if scores and scores[0] is not None else None
