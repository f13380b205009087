"""One process among several: which it is, and the variables by which launchers say so. Torch is imported on demand."""

from __future__ import annotations

import os

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
"""Where the processes of one job meet: never inherited, or the jobs of a sweep would meet one another."""

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")
"""Environment variables by which launchers number their processes; all of them are 0, or not set, in the first alone."""


def rank() -> int:
    """0 in the first of the processes that train together, a positive number in the others."""
    numbers = [int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()]
    return next((number for number in numbers if number), 0)


def training_rank() -> tuple[int, int]:
    """(rank, number of ranks) of the process group of torch that trains; (0, 1) where there is none."""
    import torch.distributed as dist

    ranked = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)


def started_apart() -> bool:
    """True where srun or torchrun started this process as one of several."""
    several = (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE"))
    return any(number in os.environ and int(os.environ.get(count, "1")) > 1 for number, count in several)


def child_rank() -> bool:
    """True in a rank that Lightning started from the first one: that one's exit status is the job's."""
    return int(os.environ.get("LOCAL_RANK") or 0) > 0 and not started_apart()
