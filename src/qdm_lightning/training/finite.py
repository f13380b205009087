"""Training ends at the first value that is not finite."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qdm_lightning.base.checks import UserError


class FiniteLosses(Callback):
    """Ends training at the first loss that is not finite, before a checkpoint is written or a best one chosen.

    A step's loss is looked at when the next one begins, so that a GPU is not waited for.

    Args:
        prefix: prefix of the logged names.
        lower: the setting to lower, with its value.

    Raises (in its hooks):
        UserError: training diverged, with the step and what to lower.
    """

    def __init__(self, prefix: str, lower: str) -> None:
        self.prefix, self.lower = prefix, lower
        self._step, self._loss = 0, torch.zeros(())

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._check("train/loss", self._loss)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._step, self._loss = trainer.global_step, outputs["loss"].detach()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._check("train/loss", self._loss)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._check("val/loss", trainer.callback_metrics[f"{self.prefix}val/loss"])

    def _check(self, name: str, loss: Tensor) -> None:
        if not loss.isfinite():
            raise UserError(
                f"{self.prefix}{name} is {float(loss)} after step {self._step}: training diverged and ends here, nothing "
                f"since the last checkpoint is kept; lower {self.lower}"
            )
