"""The elementwise arithmetic of fake quantization: one fused pass forward, one backward, compiled where a compiler is at hand.

A tensor is seen as a row of its memory, (N,), or as rows of its first axis, (R, M), whatever its layout (channels-last too), so
that two compiled variants serve every shape. `set_mode` chooses; `record` tells what ran.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _forward(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    codes = torch.clamp(torch.round(x.float() / scale) + zero_point, qmin, qmax)
    return ((codes - zero_point) * scale).to(x.dtype)


def _forward_silu(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return _forward(F.silu(x.float()), scale, zero_point, qmin, qmax).to(x.dtype)


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    upstream = grad.float()
    ratio = x.float() / scale
    below = ratio + zero_point < qmin
    above = ratio + zero_point > qmax
    inside = ~(below | above)
    outside = torch.where(below, qmin - zero_point, qmax - zero_point)
    grad_scale = (upstream * torch.where(inside, torch.round(ratio) - ratio, outside)).sum(-1)
    grad_zero = (torch.where(inside, 0.0, upstream) * -scale).sum(-1)
    return torch.where(inside, grad, torch.zeros_like(grad)), grad_scale, grad_zero


def _backward_silu(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    value = x.float()
    gate = torch.sigmoid(value)
    inner, grad_scale, grad_zero = _backward(grad.float(), value * gate, scale, zero_point, qmin, qmax)
    return (inner * gate * (1 + value * (1 - gate))).to(grad.dtype), grad_scale, grad_zero


def _row_moments(x: Tensor, psi: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.float(), dim=-1, correction=0)
    return mean, torch.sqrt(variance + psi)


_EAGER: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "forward_silu": _forward_silu,
    "backward": _backward,
    "backward_silu": _backward_silu,
    "row_moments": _row_moments,
}


class _Backend:
    """Chooses between eager and compiled functions once, at the first use, and remembers why."""

    def __init__(self) -> None:
        self.mode = "auto"
        self.chosen: str | None = None
        self.reason = ""
        self.functions: dict[str, Callable[..., Any]] = {}

    def choose(self) -> None:
        self.chosen, self.reason, self.functions = "eager", "asked for", _EAGER
        if self.mode == "off":
            return
        # The compiler looks for CUDA's headers and says so where there are none; a CPU needs none.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        # fullgraph: past its recompile limit dynamo then raises, where it would otherwise run eager without a word.
        compiled = {name: torch.compile(f, dynamic=True, fullgraph=True) for name, f in _EAGER.items()}
        try:
            self._try(compiled)
        except Exception as error:  # whatever a missing or broken compiler raises; kept in the record, or raised by `on`
            if self.mode == "on":
                raise RuntimeError(
                    f"trainer.compile=on, but compiling failed: {_first_line(error)}; type trainer.compile=off"
                ) from error
            self.reason = f"compiling failed: {_first_line(error)}"
            return
        self.chosen, self.reason, self.functions = "compiled", "torch.compile", compiled

    @staticmethod
    def _try(functions: dict[str, Callable[..., Any]]) -> None:
        with torch.no_grad():
            for shape, rows in (((8192,), (1,)), ((64,), (1,)), ((6, 1536), (6, 1))):
                x, upstream = torch.ones(shape), torch.ones(shape)
                scale, zero_point = torch.ones(rows), torch.ones(rows)
                for kind in ("", "_silu") if rows == (1,) else ("",):
                    functions["forward" + kind](x, scale, zero_point, 0, 15)
                    functions["backward" + kind](upstream, x, scale, zero_point, 0, 15)
            functions["row_moments"](torch.ones(6, 1536), 1e-5)

    def call(self, name: str, *args: Any) -> Any:
        if self.chosen is None:
            self.choose()
        # Detached: dynamo would compile once more for every combination of `requires_grad` and of bases of views.
        args = tuple([arg.detach() if isinstance(arg, Tensor) else arg for arg in args])
        try:
            return self.functions[name](*args)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            if self.mode == "on":
                raise
            self.chosen, self.reason = "eager", f"recompile limit: {_first_line(error)}"
            self.functions = _EAGER
            return self.functions[name](*args)


_backend = _Backend()


def set_mode(mode: str) -> None:
    """`auto` compiles where that works, `on` insists (RuntimeError otherwise), `off` runs eager."""
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"compile mode {mode} is not allowed: choose one of auto, on, off")
    _backend.mode, _backend.chosen, _backend.reason = mode, None, ""


def record() -> dict[str, str]:
    """What ran: {"fake_quantization": "compiled" | "eager" | "unused", "reason": ...}, for the record of a run."""
    return {"fake_quantization": _backend.chosen or "unused", "reason": _backend.reason}


def forward(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, silu: bool = False) -> Tensor:
    """x_hat of x, or of silu(x), for x (N,) with scale (1,), or x (R, M) with scale (R, 1)."""
    return _backend.call("forward_silu" if silu else "forward", x, scale, zero_point, qmin, qmax)


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, silu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x (its shape), scale and zero point (() or (R,)); see `ste.fake_quantize`."""
    return _backend.call("backward_silu" if silu else "backward", grad, x, scale, zero_point, qmin, qmax)


def row_moments(x: Tensor, psi: float) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + psi) of each row of x (R, M), in float32, each (R,)."""
    return _backend.call("row_moments", x, psi)


def memory_order(x: Tensor, keep_first: bool) -> tuple[int, ...] | None:
    """The axes of x from the slowest to the fastest in memory; None where x is contiguous as it is.

    With `keep_first` the first axis stays first, whatever its stride.
    """
    return None if x.is_contiguous() else _by_stride(x.stride(), keep_first)


@cache
def _by_stride(strides: tuple[int, ...], keep_first: bool) -> tuple[int, ...]:
    axes = sorted(range(len(strides)), key=lambda axis: (-strides[axis], axis))
    if keep_first:
        axes.remove(0)
        axes.insert(0, 0)
    return tuple(axes)


def flatten(x: Tensor, order: tuple[int, ...] | None, rows: int) -> Tensor:
    """x as (N,), or as (rows, M) where rows > 1; a view wherever the memory allows."""
    ordered = x if order is None else x.permute(order)
    return ordered.contiguous().view((rows, -1) if rows > 1 else (-1,))


def unflatten(flat: Tensor, shape: torch.Size, order: tuple[int, ...] | None) -> Tensor:
    """The inverse of `flatten`: a tensor of `shape` in the memory order of the original."""
    return flat.view(shape) if order is None else flat.as_strided(shape, _dense_strides(shape, order))


@cache
def _dense_strides(shape: torch.Size, order: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


@cache
def gradient_factor(elements: int, qmax: int) -> float:
    """LSQ's g = 1 / sqrt(N q_max), N the elements (of one sample) that share the scale."""
    return 1.0 / math.sqrt(elements * qmax)
