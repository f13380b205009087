"""What happens beside training: the progress bar, learned scales, pictures in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer


class StageProgress(Callback):
    """Advances a stage of the terminal by every training step.

    Args:
        stage: with `advance(n, **fields)`.
    """

    def __init__(self, stage: Any) -> None:
        self.stage = stage

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step:
            self.stage.skip(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        show = trainer.global_step % 10 == 0
        self.stage.advance(1, **({"loss": f"{float(outputs['loss'].detach()):.4f}"} if show else {}))


class LearnedScales(Callback):
    """Logs mean scale and zero point of every quantizer at each validation, as `scale/<layer>` and `zero_point/<layer>`."""

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        values: dict[str, float] = {}
        for name, quantizer in module.get_submodule("student").named_modules():
            if isinstance(quantizer, ActivationQuantizer | WeightQuantizer) and hasattr(quantizer, "scale"):
                label = name.removeprefix("unet.")
                values[f"scale/{label}"] = _mean(quantizer, "scale")
                if isinstance(quantizer, ActivationQuantizer) and hasattr(quantizer, "zero_point"):
                    values[f"zero_point/{label}"] = _mean(quantizer, "zero_point")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_metrics(values, trainer.global_step)


def _mean(quantizer: nn.Module, name: str) -> float:
    value: Tensor = getattr(quantizer, name)
    return float(value.detach().mean())


class SampleDuringTraining(Callback):
    """Calls `measure(step)` every `every` steps and logs the scalars that it returns.

    Args:
        measure: samples the averaged student and returns scalars by name.
        every: training steps.
    """

    def __init__(self, measure: Callable[[int], Mapping[str, float]], every: int) -> None:
        self.measure, self.every = measure, every

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every == 0 and step < trainer.max_steps and trainer.is_global_zero:
            values = dict(self.measure(step))
            for logger in trainer.loggers:
                logger.log_metrics(values, step)


def log_pictures(loggers: list[Any], key: str, path: Any, step: int) -> None:
    """Log a PNG to W&B, where there is such a logger."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)], step=None)
