"""What a run still takes, said once its first steps are measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from qdm_lightning.display.progress import duration

MEASURED = 20
"""Training steps behind the plan."""

LONG = 60.0
"""Seconds; what takes less needs no plan."""


class PlanOfRun(Callback):
    """After `MEASURED` steps says what those that are left and the images take, where that is over `LONG` seconds.

    Args:
        say: prints a line.
        calls: calls of the network behind the images that are drawn after the training.
        call_seconds: measures one of them.
    """

    def __init__(self, say: Callable[[str], None], calls: int, call_seconds: Callable[[], float]) -> None:
        self.say, self.calls, self.call_seconds = say, calls, call_seconds
        self.seconds, self._begin = list[float](), 0.0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.perf_counter() - self._begin)
        if len(self.seconds) != MEASURED or not trainer.is_global_zero:
            return
        left, step, call = module.max_steps - trainer.global_step, statistics.median(self.seconds), self.call_seconds()
        whole = left * step + self.calls * call
        if whole > LONG:
            images = f"{self.calls} calls for images at {call:.3g} s"
            self.say(f"plan: {left} steps at {step:.3g} s ({duration(left * step)}), {images} ({duration(self.calls * call)})")
