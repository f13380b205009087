"""Hydra's plugin for `hydra/sweeper=checked`: every job of a sweep is checked before the first one starts.

Hydra finds sweepers in packages of this name alone. What it does is in `qdm_lightning.cli.sweep`, imported when it is used.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig


class CheckedSweeper(Sweeper):
    """The product of comma-separated values, as Hydra's own sweeper makes it. Options as there."""

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        self.max_batch_size, self.params = max_batch_size, params

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        from qdm_lightning.cli.sweep import sweep

        launcher = partial(Plugins.instance().instantiate_launcher, hydra_context, config=config)
        self.run = partial(sweep, task_function, hydra_context.config_loader, launcher, config)

    def sweep(self, arguments: list[str]) -> Any:
        return self.run(arguments)
