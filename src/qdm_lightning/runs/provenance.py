"""What a result must carry to be trusted: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qdm_lightning.quantization import compiled

PACKAGES = (
    "qdm-lightning",
    "torch",
    "lightning",
    "diffusers",
    "torchmetrics",
    "torch-fidelity",
    "hydra-core",
    "wandb",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, torch's threads, and the GPU where there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the last bits of an image depend on beside its settings: machine, versions, threads, compiled compiled."""
    machine = hardware()
    return {
        "torch": torch.__version__,
        "device": machine["gpu"] if device.type == "cuda" else device.type,
        "processor": machine["processor"],
        "capability": machine["capability"],
        "threads": machine["threads"],
        "fake_quantization": compiled.provenance()["fake_quantization"],
    }


def peak_memory() -> dict[str, int]:
    """Greatest memory of this process so far, in bytes: resident, and allocated on the GPU where there is one.

    `resident` is known on Linux alone.
    """
    found = {} if (resident := _peak_resident()) is None else {"resident": resident}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.max_memory_allocated()
    return found


def _peak_resident() -> int | None:
    try:  # getrusage would count the process that started this one too
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether it was changed; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None


def _git(folder: Path, *args: str) -> str:
    command = ["git", "-C", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
