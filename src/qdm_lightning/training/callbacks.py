"""What happens around the training steps: progress bar, timing, the last validation, learned scales, images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qdm_lightning.loggers.media import log_values
from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer
from qdm_lightning.training.histograms import layer_label


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


class ValidateAtEnd(Callback):
    """Asks for the end at the last step, which Lightning validates then; at a multiple of `val_every` it does so once."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.global_step >= trainer.max_steps


class StepTimer(Callback):
    """Measures the training steps: forward, backward and update, without validation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.perf_counter() - self._begin)

    def median(self) -> float | None:
        """Seconds of a step; None where this process made none."""
        return round(statistics.median(self.seconds), 5) if self.seconds else None


class LearnedScales(Callback):
    """Logs the learned grids at each validation, to W&B and TensorBoard.

    `scale/<layer>` and `zero_point/<layer>` are means of one quantizer; `scales/weights_log2` and `scales/activations_log2` are
    histograms of log2 s over all layers and channels.
    """

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        values: dict[str, float | Tensor] = {}
        scales: dict[str, list[Tensor]] = {"weights": [], "activations": []}
        for name, quantizer in module.get_submodule("student").named_modules():
            if isinstance(quantizer, ActivationQuantizer | WeightQuantizer) and hasattr(quantizer, "scale"):
                label = layer_label(name)
                scale = cast(Tensor, quantizer.scale).detach().flatten()
                values[f"scale/{label}"] = float(scale.mean())
                scales["weights" if isinstance(quantizer, WeightQuantizer) else "activations"].append(scale)
                if isinstance(quantizer, ActivationQuantizer) and hasattr(quantizer, "zero_point"):
                    values[f"zero_point/{label}"] = float(quantizer.zero_point.detach().mean())  # type: ignore[operator]
        values |= {f"scales/{kind}_log2": torch.cat(parts).log2() for kind, parts in scales.items() if parts}
        log_values(trainer.loggers, values, trainer.global_step)


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
