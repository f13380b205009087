"""From float activations to codes: group norm, SiLU, rounding to the grid and the padding of the convolution, in one pass.

`encode` is the one way to codes. It runs as compiled C++ (`native`) or as plain tensor operations; both give the codes that
the simulation rounds to, code = clip(round(x / s) + z, 0, qmax).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.integer import native
from qdm_lightning.integer.grids import Grid, Padding, Target


def encode(
    parts: Sequence[Tensor], targets: Sequence[Target], norm: nn.GroupNorm | None = None, shift: Tensor | None = None
) -> list[Tensor]:
    """Codes of one activation, (B, C, H, W) uint8 channels-last for each target, H and W with its repeats and padding.

    Args:
        parts: the activation as one or two float tensors, (B, C_i, H, W), that are concatenated along the channels.
        targets: at most four.
        norm: group norm over all channels, for the targets that want it.
        shift: (B, C), added to the activation first: the time embedding.

    Raises:
        ValueError: zeros are padded and a zero point has no code of 8 bits; an activation is NaN.
    """
    for target in targets:
        if any(target.padding):
            low, high = target.grid.zero_points
            if low < 0 or high > 255:
                raise ValueError(f"zeros are padded, but the zero points {low:g}..{high:g} lie outside [0, 255]")
    found = native.encode(parts, targets, norm, shift)
    return _encode(parts, targets, norm, shift) if found is None else found


def round_to_grid(x: Tensor, grid: Grid, silu: bool = False, channels: Tensor | None = None) -> Tensor:
    """Codes of x, or of silu(x), (B, ..., C), uint8 of its shape: clip(round(x / s) + z, 0, qmax). Raises as `encode`.

    `channels`, (C,): factors of x, or of silu(x).
    """
    image = x.float().contiguous().view(x.shape[0], 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    return encode([image], [Target(grid, silu=silu, channels=channels)])[0].permute(0, 2, 3, 1).reshape(x.shape)


def _round(x: Tensor, grid: Grid) -> Tensor:
    if bool(x.isnan().any()):
        raise ValueError("an activation is not a number (NaN): it has no code")
    s, z = (values.reshape(-1, *[1] * (x.ndim - 1)) for values in (grid.scale, grid.zero_point))
    return torch.clamp(torch.round(x.float() / s) + z, 0, grid.qmax).to(torch.uint8)


def _encode(
    parts: Sequence[Tensor], targets: Sequence[Target], norm: nn.GroupNorm | None, shift: Tensor | None
) -> list[Tensor]:
    x = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    if shift is not None:
        x = x + shift[:, :, None, None]
    normed = norm(x) if norm is not None and any(target.norm for target in targets) else x
    found = []
    for target in targets:
        value = normed if target.norm else x
        value = F.silu(value) if target.silu else value
        codes = _round(value if target.channels is None else value * target.channels[:, None, None], target.grid)
        if target.repeat > 1:
            codes = codes.repeat_interleave(target.repeat, dim=2).repeat_interleave(target.repeat, dim=3)
        found.append(pad(codes, target.grid, target.padding))
    return found


def pad(codes: Tensor, grid: Grid, padding: Padding) -> Tensor:
    """Codes (B, C, H, W) channels-last, within a border of the code of zero."""
    codes = codes.contiguous(memory_format=torch.channels_last)
    if not any(padding):
        return codes
    left, right, above, below = padding
    b, c, h, w = codes.shape
    size = (b, c, h + above + below, w + left + right)
    zeros = grid.zero_point.to(torch.uint8).view(-1, 1, 1, 1)
    padded = zeros.expand(size).contiguous(memory_format=torch.channels_last)
    padded[:, :, above : above + h, left : left + w] = codes
    return padded
