"""`debug=profile`: what the time of a training step goes into, by torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, schedule

from qdm_lightning.base.checks import at_least
from qdm_lightning.base.files import atomic_path, write_whole
from qdm_lightning.loggers.csv_metrics import CSVMetrics

FOLDER, TRACE, OPERATIONS = "profile", "trace.json", "operations.txt"
ROWS = 40
"""Of the table, longest first."""


class Profile(Callback):
    """Traces steps of a training. Leaves in `<run>/profile/` `trace.json`, which perfetto.dev and chrome://tracing show, and
    `operations.txt`, a table of operations by their time. Of several ranks the first one is traced.

    Args:
        skip: steps before, in which kernels are compiled and memory is taken; one more is traced and thrown away.
        steps: steps that are traced; fewer where training ends before.

    Raises:
        ValueError: `skip` below 0, or `steps` below 1.
    """

    def __init__(self, skip: int = 3, steps: int = 5) -> None:
        at_least("callbacks.profile.skip", skip, 0)
        at_least("callbacks.profile.steps", steps, 1)
        self.skip, self.steps = skip, steps
        self._profiler: Any = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = next(logger.path.parent for logger in trainer.loggers if isinstance(logger, CSVMetrics)) / FOLDER
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(wait=self.skip, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=lambda profiler: _write(profiler, folder),
        )
        self._profiler.start()

    def on_train_batch_end(self, *args: Any) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def _write(profiler: Any, folder: Path) -> None:
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=ROWS)
    write_whole(folder / OPERATIONS, f"{table}\n".encode(), checksum=False)
    with atomic_path(folder / TRACE, checksum=False) as temporary:
        profiler.export_chrome_trace(str(temporary))
