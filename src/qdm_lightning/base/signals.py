"""Ending early: SIGTERM and Ctrl-C raise `Interrupted` where they arrive, or wait for the end of a training step.

    with handled():
        with deferred(): ...   # a signal is only noted; the loop asks `received()` after each step

What a signal ends leaves with status 128 + its number, which no scheduler takes for "done".
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from qdm_lightning.base.ranks import child_rank, rank

STUCK = 20.0
"""Seconds after which a process ends at once whose main thread does not see a signal: it waits for another rank in C++."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the work. `number` is the first one's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class _State:
    """What came, whether the block that runs defers it, and what else is to end first."""

    number: int | None = None
    deferred = False
    before: Callable[[int], None] | None = None


def received() -> int | None:
    """Number of the first signal that came; None where none did."""
    return _State.number


def check() -> None:
    """Raise Interrupted if a signal came that no block defers: Python drops what a handler raises within a finalizer."""
    if _State.number is not None and not _State.deferred:
        raise Interrupted(_State.number)


@contextmanager
def deferred(state: bool = True) -> Iterator[None]:
    """Within the block signals are only noted; with `state=False`, inside such a block, they raise again.

    A second Ctrl-C is never deferred.
    """
    before, _State.deferred = _State.deferred, state
    try:
        if not state:
            check()
        yield
    finally:
        _State.deferred = before


@contextmanager
def before_the_end(end: Callable[[int], None]) -> Iterator[None]:
    """Within the block the first signal calls `end(number)` before it raises: processes that this one started end first."""
    _State.before = end
    try:
        yield
    finally:
        _State.before = None


@contextmanager
def handled() -> Iterator[None]:
    """Within the block handle SIGTERM and SIGINT, and in a SLURM job SIGUSR1, its usual notice before the end.

    What is ignored stays so, such as SIGINT in a shell's background. A rank that the first one started tells that one, and
    goes on until all ranks end together, or the first is gone. Outside of the main thread nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.number, _State.deferred, _State.before = None, False, None
    numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    read, write = os.pipe()
    os.set_blocking(write, False)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch_signals, args=(read, frozenset(taken)), daemon=True).start()
    if child_rank():
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    try:
        for number in taken:
            signal.signal(number, _handle)
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
        signal.set_wakeup_fd(wakeup)
        os.close(write)  # which ends the thread


def _handle(number: int, frame: FrameType | None) -> None:
    again = _State.number is not None
    if child_rank() or (again and number != signal.SIGINT):  # the first one is on its way
        return
    _State.number = _State.number or number
    if _State.deferred and not again:
        return
    if _State.before is not None:
        end, _State.before = _State.before, None
        end(number)
    raise Interrupted(_State.number)


def _watch_signals(read: int, numbers: frozenset[int]) -> None:
    """In a thread, as the main one may wait in C++ for another rank, where it sees no signal."""
    while byte := os.read(read, 1):
        number = byte[0]
        if number not in numbers:
            continue
        if child_rank():
            with suppress(ProcessLookupError):
                os.kill(os.getppid(), signal.SIGTERM)
            continue
        time.sleep(STUCK)
        if _State.number is None:
            print("interrupted while waiting for another process; the same command goes on", file=sys.stderr, flush=True)
            os._exit(status(number))
    os.close(read)


def _watch_parent(parent: int) -> None:
    """End this rank once the first one is gone: it would wait for it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def status(number: int) -> int:
    """Exit status of a process that a signal ended; 0 of a rank that the first one started, whose own status tells."""
    return 0 if child_rank() else 128 + number


def requeue(number: int) -> None:
    """After SLURM's notice put the job back into its queue, as Lightning does."""
    if number != signal.SIGUSR1 or rank():
        return
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job: Any = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    with suppress(OSError):
        subprocess.run(["scontrol", "requeue", job], check=False)
