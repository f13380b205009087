"""Where one of the processes that train together ends, the others end too: within seconds, with one line, not with status 0.

A process whose peer is gone would else wait for it in a collective operation, or end with the network library's traceback.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from qdm_lightning.base.checks import UserError

LOST = 3
"""Exit status of a process that was ended as its main thread did not: it waits for a process that is gone."""

POLL, GRACE = 0.5, 10.0
"""Seconds between two looks at the other processes, and seconds that the main thread has to end by itself."""

LINE = "another of the processes that train together has ended: training ends here; the same command goes on from last.ckpt"

PARENT = "QDM_LIGHTNING_FIRST_RANK"
"""Variable in which the first process of a node leaves its number to those that it starts."""

_children: list[subprocess.Popen[Any]] = []


@contextmanager
def watched_ranks(trainer: Trainer) -> Iterator[None]:
    """Train within the block: where another process ends, this one does too.

    Raises:
        UserError: a collective operation failed, as a process that takes part in it has ended.
    """
    if trainer.world_size == 1:
        yield
        return
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        trainer.strategy._launcher = _Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), daemon=True, name="lost-ranks").start()
    try:
        yield
    except RuntimeError as error:
        if _is_lost(error):
            raise UserError(LINE) from error
        raise
    finally:
        over.set()


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's, without its observer, which kills this process and says nothing."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT]
            _children.extend(self.procs)
        return function(*args, **kwargs)


def _watch(over: threading.Event) -> None:
    parent = int(os.environ.get(PARENT, 0))
    while not over.wait(POLL):
        if (parent and os.getppid() != parent) or any(child.poll() for child in _children):
            if over.wait(GRACE):
                return
            print(f"error: {LINE}", file=sys.stderr, flush=True)
            for child in _children:
                child.kill()
            os._exit(LOST)


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective operation failed on its connection; gloo raises a bare RuntimeError."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "NCCL" in str(error)
