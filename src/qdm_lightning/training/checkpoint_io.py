"""Checkpoints that are whole or absent, and read as data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors.torch import load
from torch import Tensor, nn

from qdm_lightning.base.checks import one_line
from qdm_lightning.base.files import atomic_path, reading
from qdm_lightning.base.trust import load_tensors

PREFIXES = {"ema": "ema.module.unet.", "raw": "student.unet."}
"""Where a checkpoint has the averaged weights of the U-Net that was trained, and those of the optimizer."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning checkpoints written whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as plain data on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds more than data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: give a checkpoint, such as <run>/checkpoints/last.ckpt")
    with reading(path, "it cannot be read as a checkpoint") as stream:
        content = load_tensors(stream)
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict) or "global_step" not in content:
            raise ValueError("it holds no checkpoint of a run")
        return content


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, on the CPU. Raises ValueError where the file is damaged."""
    with reading(path) as stream:
        return load(stream.read())


def fill_from_checkpoint(unet: nn.Module, path: Path, weights: str = "ema") -> int:
    """Load a checkpoint's U-Net, its average (`ema`) or as the optimizer left it (`raw`), into `unet`; returns its step.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds another network.
    """
    checkpoint, prefix = load_checkpoint(path), PREFIXES[weights]
    state = {n.removeprefix(prefix): value for n, value in checkpoint.get("state_dict", {}).items() if n.startswith(prefix)}
    fill(unet, state, path)
    return int(checkpoint["global_step"])


def fill(unet: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state that must be exactly the U-Net's. Raises ValueError, which names the file `path`, where it is not."""
    try:
        unet.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is no checkpoint of this network: {one_line(error)[:300]}") from error
