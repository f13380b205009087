"""Threads, devices, and work that processes share: Lightning starts them and deals out the devices."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric

from qdm_lightning.base.checks import UserError, first_line
from qdm_lightning.quantization import compiled
from qdm_lightning.training.spec import TrainerConfig

PROCESSES_A_CORE = 4
"""At most: each loads the network for itself."""

Work = Callable[[torch.device, int, int], None]
"""work(device, index, count): the share `index` of `count`. It is pickled, so it must be defined in a module."""


def set_up(trainer: TrainerConfig) -> None:
    """Threads of torch, compilation of fake quantization and determinism as the settings say; before any network runs."""
    if trainer.threads:
        torch.set_num_threads(trainer.threads)
    compiled.set_mode(trainer.compile)
    torch.use_deterministic_algorithms(trainer.deterministic)


@contextmanager
def deterministic_or_one_line() -> Iterator[None]:
    """Within the block an operation that has no deterministic form, where one is asked for, is an error of one line.

    Raises:
        UserError: there was such an operation; torch's own message names it.
    """
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).partition(" does not have")[0]
        raise UserError(
            f"trainer.deterministic=true: {operation} has no deterministic form on this device; "
            "type trainer.deterministic=false, or take another device"
        ) from error


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """The logger of this name says nothing below a warning."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def measuring_device(accelerator: str) -> torch.device:
    """Where calibration and sampling run: the device that training takes, `auto` being the best at hand."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def check_processes(accelerator: str, devices: int) -> None:
    """Raise ValueError at far more processes than cores, where `accelerator` is the CPU."""
    most = PROCESSES_A_CORE * (os.cpu_count() or 1)
    if measuring_device(accelerator).type == "cpu" and devices > most:
        raise ValueError(f"devices={devices} is not allowed: this machine has {os.cpu_count()} cores, at most {most} processes")


def share(work: Work, accelerator: str, devices: int) -> None:
    """Run `work` in `devices` processes at once and wait for all of them.

    Args:
        accelerator: as in `lightning.Trainer`.
        devices: how many; more than the machine has is an error of Lightning's.

    Raises:
        ValueError: fewer devices than asked for.
    """
    try:
        with quiet("lightning.fabric"):
            fabric = Fabric(accelerator=accelerator, devices=devices, strategy="ddp_spawn")
    except Exception as error:  # Lightning's MisconfigurationException is a bare Exception
        raise ValueError(f"devices={devices}: {first_line(error)}") from error
    try:
        fabric.launch(_call, work)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():  # they would be waited for
            process.terminate()
        raise


def _call(fabric: Any, work: Work) -> None:
    work(fabric.device, fabric.global_rank, fabric.world_size)
