"""Weights of feature networks: files in, hashes out, and the color of the images that go in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn

from qdm_lightning.base.files import reading, sha256


def state_pieces(network: nn.Module) -> Iterator[Any]:
    """Name, dtype, shape and bytes (in logical order) of every parameter and buffer, sorted by name, to be hashed."""
    for name, value in sorted(network.state_dict().items()):
        yield f"{name}\0{value.dtype}\0{tuple(value.shape)}\0"
        yield value.detach().cpu().reshape(-1).view(torch.uint8).numpy()


def state_hash(network: nn.Module) -> str:
    """SHA-256 (hexadecimal) of `state_pieces`."""
    return sha256(state_pieces(network))


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of an .npz (plain arrays) or .safetensors file.

    Raises:
        ValueError: the file has another ending, or is damaged.
    """
    wanted = "metrics.weights: an .npz or .safetensors file is wanted"
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} cannot be read; {wanted}")
    with reading(path, wanted) as stream:
        if path.suffix == ".safetensors":
            return load(stream.read())
        archive = np.load(stream, allow_pickle=False)
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def color(images: Tensor, what: str) -> Tensor:
    """`images` (N, 3, H, W), or (N, 1, H, W) with the gray channel three times.

    Raises:
        ValueError: no uint8 images of 1 or 3 channels; `what` names the network.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{what} measures uint8 images (N, 3, H, W) or (N, 1, H, W), not {images.dtype} {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)
