"""What a result must carry to be trusted: versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qdm_lightning import __version__
from qdm_lightning.quantization import compiled

PACKAGES = (
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
    """Versions of Python, of this package as it runs, and of the packages that a result depends on."""
    own = {"python": platform.python_version(), "qdm-lightning": __version__}
    return {**own, **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def hardware() -> dict[str, Any]:
    """Processor, cores, torch's threads, and the GPU where there is one."""
    return {
        "processor": _proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What an image's last bits depend on, its settings aside: machine, versions, threads, how fake quantization runs."""
    machine = hardware()
    return {
        "torch": torch.__version__,
        "device": machine["gpu"] if device.type == "cuda" else device.type,
        **{name: machine[name] for name in ("processor", "capability", "threads")},
        "fake_quantization": compiled.provenance()["fake_quantization"],
    }


def peak_memory() -> dict[str, int]:
    """Greatest memory of this process so far, in bytes: resident, and allocated on the GPU where there is one.

    `resident` is known on Linux alone.
    """
    resident = _proc("self/status", "VmHWM")  # getrusage would count the process that started this one too
    memory = {"resident": int(resident.split()[0]) * 1024} if resident else {}
    if torch.cuda.is_available():
        memory["gpu"] = torch.cuda.max_memory_allocated()
    return memory


def _proc(file: str, name: str) -> str | None:
    """Linux: the value behind a name in a file below /proc; None where there is none."""
    try:
        lines = Path("/proc", file).read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def git_commit() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether a tracked file was changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    commit, _, dirty = described.partition("-")
    return {"commit": commit, "changed": bool(dirty)}
