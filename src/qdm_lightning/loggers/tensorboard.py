"""TensorBoard: an event file in the run folder."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.loggers import TensorBoardLogger

from qdm_lightning.loggers.media import cosmetic


class TensorBoardRun(TensorBoardLogger):
    """Lightning's logger without its hparams.yaml: the configuration is a file of the run folder already."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with cosmetic("metrics", "TensorBoard"):
            super().log_metrics(metrics, step)

    def save(self) -> None:
        if self._experiment is not None:
            self._experiment.flush()
