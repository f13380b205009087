"""Images as the network sees them, float32 in [-1, 1], and as files hold them, uint8."""

from __future__ import annotations

import torch
from torch import Tensor

from qdm_lightning.diffusion.finite import NotFiniteError


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 0..255: round((x + 1) 127.5), clamped. Same shape and device.

    Raises:
        NotFiniteError: a value is not finite: NaN would become black.
    """
    if not images.isfinite().all():
        raise NotFiniteError("an image holds values that are not finite: the network that drew it has diverged")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
