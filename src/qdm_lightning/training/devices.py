"""Work that processes share, each with a device of its own: Lightning starts them and deals out the devices."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric import Fabric

Work = Callable[[torch.device, int, int], None]
"""work(device, index, count): the share `index` of `count`. It is pickled, so it must be defined in a module."""


def measuring_device(accelerator: str) -> torch.device:
    """Where calibration and sampling run: the device that training takes, `auto` being the best at hand."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def share(work: Work, accelerator: str, devices: int) -> None:
    """Run `work` in `devices` processes at once and wait for all of them.

    Args:
        accelerator: as in `lightning.Trainer`.
        devices: how many; more than the machine has is an error of Lightning's.

    Raises:
        ValueError: fewer devices than asked for.
    """
    quiet = logging.getLogger("lightning.fabric")
    level = quiet.level
    quiet.setLevel(logging.WARNING)
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, strategy="ddp_spawn")
    except Exception as error:  # Lightning's MisconfigurationException is a bare Exception
        raise ValueError(f"devices={devices}: {str(error).splitlines()[0]}") from error
    finally:
        quiet.setLevel(level)
    fabric.launch(_call, work)  # type: ignore[arg-type]


def _call(fabric: Any, work: Work) -> None:
    work(fabric.device, fabric.global_rank, fabric.world_size)
