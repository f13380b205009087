"""diffusers' attention with both of its products on integer codes."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from qdm_lightning.integer import kernels, native
from qdm_lightning.integer.encoding import encode, round_to_grid
from qdm_lightning.integer.grids import Grid, GridSource, StaticGrid, Target, grid_source
from qdm_lightning.integer.layers import IntegerLinear
from qdm_lightning.integer.report import Inexact
from qdm_lightning.quantization.attention import AttentionProcessor, QuantizedAttention

FARTHEST = 2**15 - 1
"""The farthest zero point with which the compiled pass corrects its sums in 32 bits."""


class Signed(NamedTuple):
    """An operand x_hat = s (code - offset) with int8 codes; `scale` and `offset` are (1,) or (B,)."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


def signed(codes: Tensor, grid: Grid) -> Signed:
    """uint8 codes as int8 ones: moved by the zero point, or by as much of it as int8 holds."""
    bits = grid.qmax.bit_length()
    shift = grid.zero_point.clamp(2**bits - 128, 128)
    moved = codes.to(torch.int16) - shift.to(torch.int16).view(-1, *[1] * (codes.ndim - 1))
    return Signed(moved.to(torch.int8), grid.scale, grid.zero_point - shift)


def product(a: Signed, b: Signed) -> Tensor:
    """a_hat b_hat, (B, heads, M, N) float32, of codes (B, heads, M, K) and (B, heads, K, N).

    With x = s (c - o): s_a s_b (c_a c_b - o_b rows(c_a) - o_a columns(c_b) + K o_a o_b); scales and offsets are a sample's.
    """
    left, right = a.codes.flatten(0, 1), b.codes.flatten(0, 1)
    sums = torch.stack([torch._int_mm(x, y) for x, y in zip(left, right, strict=True)]).unflatten(0, a.codes.shape[:2])
    scale, o_a, o_b = ((a.scale * b.scale).view(-1, 1, 1, 1), a.offset.view(-1, 1, 1, 1), b.offset.view(-1, 1, 1, 1))
    if bool((o_a == 0).all() and (o_b == 0).all()):
        return sums.float().mul_(scale)
    rows = a.codes.sum(-1, keepdim=True, dtype=torch.int32).double()
    columns = b.codes.sum(-2, keepdim=True, dtype=torch.int32).double()
    o_a, o_b = o_a.double(), o_b.double()
    exact = sums.double() - o_b * rows - o_a * columns + a.codes.shape[-1] * o_a * o_b
    return (exact * scale).float()


class IntegerAttention(AttentionProcessor):
    """An attention processor as `QuantizedAttention`, whose products multiply the codes of q, k, v and the probabilities."""

    def __init__(self, processor: QuantizedAttention, heads: int, width: int) -> None:
        super().__init__()
        parts = (processor.query, processor.key, processor.value, processor.probabilities)
        if any(part is None for part in parts):
            raise ValueError("an attention on integer codes has four quantizers")
        if not kernels.int8_matmul_is_exact():
            raise Inexact("torch's product of 8-bit codes is not exact on this processor")
        self.query, self.key, self.value, self.probabilities = (
            grid_source(cast(Any, part), (2, heads, 4, width)) for part in parts
        )

    def attended(self, attn: Any, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        q, k, v = _projections(attn, x, context)
        return self.attend(q, k, v, attn.heads, mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        """Of float q, k, v (B, N, heads d): probs_hat v_hat, (B, N, heads d) float32."""
        if mask is None and self.native_ready:
            grids = [source.at(source.operand(x)) for x, source in ((q, self.query), (k, self.key), (v, self.value))]
            grids.append(self.probabilities.at(q))
            if all(-FARTHEST <= z <= FARTHEST for grid in grids for z in grid.zero_points):
                return native.attention(q, k, v, heads, grids)
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, d)
        q_codes, k_codes, v_codes = (_operand(x, grid) for x, grid in ((q, self.query), (k, self.key), (v, self.value)))
        scores = product(q_codes, k_codes._replace(codes=k_codes.codes.mT)).mul_(q.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores + mask
        probabilities = _operand(scores.softmax(dim=-1), self.probabilities)
        return product(probabilities, v_codes).transpose(1, 2).flatten(2)

    @property
    def native_ready(self) -> bool:
        """True where the one compiled pass computes this attention: its probabilities have a static grid from 0 on."""
        source = self.probabilities
        if not isinstance(source, StaticGrid) or source.silu or not native.has_vnni():
            return False
        return not bool(source.zero_point.any())


def _operand(x: Tensor, source: GridSource) -> Signed:
    x = source.operand(x)
    grid = source.at(x)
    return signed(round_to_grid(x, grid), grid)


def _projections(attn: Any, x: Tensor, context: Tensor | None) -> list[Tensor]:
    """q, k, v, (B, N, heads d). Where nothing but the group norm stands before them, their codes are made in its one pass."""
    layers = [attn.to_q, attn.to_k, attn.to_v]
    if x.ndim == 4 and context is None and all(isinstance(layer, IntegerLinear) and layer.grid.static for layer in layers):
        grids = [layer.grid.at(x) for layer in layers]
        normed = attn.group_norm is not None
        targets = [
            Target(grid, norm=normed, silu=layer.silu, channels=layer.channels)
            for grid, layer in zip(grids, layers, strict=True)
        ]
        codes = encode([x], targets, attn.group_norm)
        rows = [c.permute(0, 2, 3, 1).flatten(1, 2) for c in codes]
        return [layer.compute(c, grid) for layer, c, grid in zip(layers, rows, grids, strict=True)]
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    return [attn.to_q(x), *(layer(x if context is None else context) for layer in layers[1:])]
