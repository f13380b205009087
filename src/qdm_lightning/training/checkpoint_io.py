"""Checkpoints that are whole or absent, checked against their checksum, and read as data alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from qdm_lightning.base.checks import one_line
from qdm_lightning.base.checksums import remove_checked
from qdm_lightning.base.files import atomic_path, reading
from qdm_lightning.base.trust import load_tensors
from qdm_lightning.quantization.packing import load_packed
from qdm_lightning.training.network_settings import KEY, check_settings

PREFIXES = {"ema": "ema.module.unet.", "raw": "student.unet."}
"""Where a checkpoint has the averaged weights of the U-Net that was trained, and those of the optimizer."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning checkpoints written whole or not at all, with a checksum that is compared."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as stream:  # torch's own does not say a full disk
            torch.save(checkpoint, stream)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        remove_checked(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as plain data on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds more than data, or is no checkpoint of a run.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not a file: give a checkpoint, such as <run>/checkpoints/last.ckpt")
    with reading(path, "it cannot be read as a checkpoint") as stream:
        content = load_tensors(stream)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint of a run: it holds a {type(content).__name__}")
    for name, kind in (("state_dict", dict), ("global_step", int)):
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path} is no checkpoint of a run: it has no {name}")
    return content


def fill_from_checkpoint(
    unet: nn.Module, path: Path, settings: Mapping[str, Any], weights: str = "ema"
) -> tuple[int, dict[str, str]]:
    """Load a checkpoint's U-Net, its average (`ema`) or as the optimizer left it (`raw`), into `unet`.

    Args:
        unet: filled in place.
        path: the checkpoint.
        settings: of `unet`, as `network_settings` has them; the checkpoint's must be the same.
        weights: `ema` or `raw`.

    Returns:
        Its step, and {"warning": ...} for the record where the checkpoint has no settings to compare, else {}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds another network.
    """
    checkpoint, prefix = load_checkpoint(path), PREFIXES[weights]
    warning = check_settings(checkpoint.get(KEY), settings, path)
    named = {str(name): value for name, value in checkpoint["state_dict"].items()}
    state = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    fill(unet, state, path)
    return int(checkpoint["global_step"]), {"warning": warning} if warning else {}


def fill(unet: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state, its weights in float or packed, that must be exactly the U-Net's, and finite.

    Raises:
        ValueError: it is not; the message names the file `path`.
    """
    spoilt = next((name for name, value in state.items() if not value.isfinite().all()), None)
    if spoilt is not None:
        raise ValueError(f"{path}: {spoilt} is not finite: the network has diverged, or the file is damaged")
    try:
        load_packed(unet, state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of this network: {one_line(error)[:300]}") from error
