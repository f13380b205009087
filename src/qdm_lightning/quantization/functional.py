"""Fake quantization with straight-through gradients, as pure functions (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576).

One function serves weights and activations: `scale` and `zero_point` hold one value for the whole tensor or one for each
index of the first axis (a sample of a batch, or an output channel of a weight).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from qdm_lightning.quantization import compiled


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integer codes Q(x) = clip(round(x / s) + z, qmin, qmax), as float32 values of x's shape. No gradient.

    `scale` and `zero_point` must broadcast against x as they are (see `fake_quantize` for first-axis values).
    """
    with torch.no_grad():
        return torch.clamp(torch.round(x.float() / scale) + zero_point, qmin, qmax)


def exp(log_scale: Tensor) -> Tensor:
    """s = exp(log s), which brings its logarithm with it: `fake_quantize` gives the gradient to log s itself, in its one pass.

    What is computed from the result has no such logarithm, and autograd the gradient as usual. Not to be written in place.
    """
    scale = log_scale.exp()
    scale.logarithm = log_scale  # type: ignore[attr-defined]
    return scale


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    scale_gradient: float = 1.0,
    *,
    hold: bool = False,
    silu: bool = False,
    channels: Tensor | None = None,
) -> Tensor:
    """x_hat = s (clip(round(x / s) + z, qmin, qmax) - z), with LSQ+'s gradients.

    d x_hat / dx is 1 where qmin <= x / s + z <= qmax and 0 elsewhere; d x_hat / ds is (x_hat - x) / s inside and q_limit - z
    outside; d x_hat / dz is 0 inside and -s outside. The backward pass keeps x, s and z alone, and has no derivative itself.

    Args:
        x: any shape and floating type; the result has both.
        scale: positive, float32, one element or `x.shape[0]` elements; from `exp`, log s gets the gradient, s times that to s.
        zero_point: float32, as many elements as `scale`; rounded, and the gradient passes straight through.
        qmin, qmax: ends of the integer grid.
        scale_gradient: factor g on the scale's gradient (LSQ, sec. 2.2).
        hold: hold the zero point to [qmin, qmax] too, also straight-through.
        silu: quantize silu(x) in the same pass; the gradient to x goes through silu too.
        channels: positive factors that broadcast against a sample, such as 1 / r_c as (C, 1, 1): quantize channels x, or
            channels silu(x), in the same pass. They get no gradient.

    Raises:
        ValueError: `scale` and `zero_point` differ in size, or have neither one element nor one for each row of x.
    """
    if scale.numel() != zero_point.numel() or scale.numel() not in (1, *x.shape[:1]):
        raise ValueError(
            f"scale has {scale.numel()} and zero_point {zero_point.numel()} elements for x of shape {tuple(x.shape)}: "
            f"give both 1 element or both {x.shape[0]}"
        )
    log_scale = getattr(scale, "logarithm", None)
    limits = compiled.limits(qmin, qmax, scale_gradient, hold, log_scale is not None, x.device)
    value = scale.detach() if scale.requires_grad else scale
    return _FakeQuantize.apply(x, scale if log_scale is None else log_scale, zero_point, value, limits, silu, channels)


class _FakeQuantize(torch.autograd.Function):
    """`learned` gets the gradient, s or log s as `limits` say; `scale` is s, without gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        learned: Tensor,
        zero_point: Tensor,
        scale: Tensor,
        limits: Tensor,
        silu: bool,
        channels: Tensor | None,
    ) -> Tensor:
        if channels is None:
            rows, strides = compiled.as_rows(x, scale.numel())
        else:  # each sample a group of its own, so that its rows have the channels in the same places
            rows, strides = compiled.as_rows(x, len(x))
            channels = compiled.channel_rows(channels, x, strides, rows)
            scale, zero_point = (values.reshape(-1).expand(len(x)) for values in (scale, zero_point))
        out, s, z = compiled.forward(rows, _vector(scale), _vector(zero_point), limits, silu, channels)
        ctx.save_for_backward(rows, s, z, *(() if channels is None else (channels,)))
        ctx.constants = (x.shape, strides, learned.shape, limits, silu)  # type: ignore[attr-defined]
        # In place: autograd adds to a gradient or keeps it without a copy only where it is nobody's view.
        return out.as_strided_(x.shape, strides)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A second derivative can be asked for under create_graph alone; the decorator costs as much as a small kernel.
        return _once_backward(ctx, grad) if torch.is_grad_enabled() else _backward(ctx, grad)


def _vector(values: Tensor) -> Tensor:
    return values if values.ndim == 1 and values.is_contiguous() else values.reshape(-1).contiguous()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, s, z, *by = ctx.saved_tensors
    channels = by[0] if by else None
    shape, strides, own, limits, silu = ctx.constants
    upstream = compiled.in_layout(grad, strides).as_strided(rows.shape, rows.stride())
    symmetric = not ctx.needs_input_grad[2]
    grad_x, *sums = compiled.backward(upstream, rows, s, z, limits, silu, symmetric, channels)
    if channels is not None and own.numel() == 1:  # the samples share their scale
        sums = [g if g is None else g.sum() for g in sums]
    own_sums = [g if g is None or g.shape == own else g.view(own) for g in sums]
    return grad_x.as_strided_(shape, strides), *own_sums, None, None, None, None


_once_backward = once_differentiable(_backward)
