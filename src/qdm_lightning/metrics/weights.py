"""Weights of feature networks: files in, hashes out, and the color of the images that go in."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def file_hash(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def state_hash(network: nn.Module) -> str:
    """SHA-256 (hexadecimal) over name, dtype, shape and bytes of every parameter and buffer, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy() if array.numel() else b"")
    return digest.hexdigest()


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of an .npz (plain arrays) or .safetensors file.

    Raises:
        ValueError: the file has another ending, or is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"metrics.weights={path} is damaged: {error}") from error
    raise ValueError(f"metrics.weights={path} cannot be read: an .npz or .safetensors file is wanted")


def color(images: Tensor, what: str) -> Tensor:
    """`images` (N, 3, H, W), or (N, 1, H, W) with the gray channel three times.

    Raises:
        ValueError: no uint8 images of 1 or 3 channels; `what` names the network.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{what} measures uint8 images (N, 3, H, W) or (N, 1, H, W), not {images.dtype} {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)
