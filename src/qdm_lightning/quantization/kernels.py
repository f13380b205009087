"""The elementwise arithmetic of fake quantization: one fused pass forward, one backward, compiled where a compiler is at hand.

A tensor is seen as a row of its memory, (N,), or as rows of its first axis, (R, M), whatever its layout (channels-last too), so
that two compiled variants serve every shape. `set_mode` chooses; `record` tells what ran.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def _forward(x: Tensor, scale: Tensor, zero_point: Tensor, limits: Tensor) -> Tensor:
    codes = torch.clamp(torch.round(x.float() / scale) + zero_point, limits[0], limits[1])
    return ((codes - zero_point) * scale).to(x.dtype)


def _forward_silu(x: Tensor, scale: Tensor, zero_point: Tensor, limits: Tensor) -> Tensor:
    return _forward(F.silu(x.float()), scale, zero_point, limits).to(x.dtype)


def _backward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    upstream = grad.float()
    ratio = x.float() / scale
    below = ratio + zero_point < limits[0]
    above = ratio + zero_point > limits[1]
    inside = ~(below | above)
    outside = torch.where(below, limits[0] - zero_point, limits[1] - zero_point)
    grad_scale = (upstream * torch.where(inside, torch.round(ratio) - ratio, outside)).sum(-1)
    grad_zero = (torch.where(inside, 0.0, upstream) * -scale).sum(-1)
    return torch.where(inside, grad, torch.zeros_like(grad)), grad_scale, grad_zero


def _backward_silu(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = x.float()
    gate = torch.sigmoid(value)
    inner, grad_scale, grad_zero = _backward(grad.float(), value * gate, scale, zero_point, limits)
    return (inner * gate * (1 + value * (1 - gate))).to(grad.dtype), grad_scale, grad_zero


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x.float() - x.float().mean(-1, keepdim=True)  # two passes: as exact as Welford's one, and faster
    return centred.square().mean(-1), x.float().mean(-1)


LARGEST = 2**31 - 1
"""Elements that compiled code is asked to index; more are quantized eagerly."""


class _Backend:
    """Calls functions as inductor compiled them, without dynamo before them: its guards cost as much as a small kernel, and the
    key of a compiled function holds all that its code depends on."""

    def __init__(self) -> None:
        self.mode = "auto"
        self.chosen: str | None = None
        self.reason = ""
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def choose(self, chosen: str, reason: str) -> None:
        self.chosen, self.reason = chosen, reason

    def call(self, function: Callable[..., Any], x: Tensor, *args: Tensor) -> Any:
        """`function(x, *args)`, x (N,) or (R, M)."""
        if self.chosen is None:
            self.choose(*(("eager", "asked for") if self.mode == "off" else ("compiled", "inductor")))
        foreign = type(x) is not Tensor or x.is_meta or torch.compiler.is_compiling()  # something else traces
        if self.chosen == "eager" or foreign:
            return function(x, *args)
        if x.numel() > LARGEST:
            if self.mode == "on":
                raise RuntimeError(
                    f"trainer.compile=on, but a tensor has {x.numel()} elements, of which compiled code takes {LARGEST}: "
                    "type trainer.compile=auto, or a smaller data.batch_size"
                )
            self.reason = f"inductor; tensors of more than {LARGEST} elements ran eager"
            return function(x, *args)
        key = (function, x.ndim, x.dtype, args[0].dtype if args else None, x.device, torch.get_num_threads())
        compiled = self.compiled.get(key)
        if compiled is None:
            try:
                compiled = self.compiled[key] = _compile(function, [x, *args])
            except Exception as error:  # whatever a missing or broken compiler raises; kept in the record, or raised by `on`
                if self.mode == "on":
                    raise RuntimeError(
                        f"trainer.compile=on, but compiling failed: {_first_line(error)}; type trainer.compile=off"
                    ) from error
                self.choose("eager", f"compiling failed: {_first_line(error)}")
                return function(x, *args)
        return compiled(x, *args)


def _compile(function: Callable[..., Any], args: Sequence[Tensor]) -> Callable[..., Any]:
    """`function` for tensors like `args`: (grad and) x of any size, then scale, zero point and limits if it takes them."""
    from torch._inductor import standalone_compile
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    # The compiler looks for CUDA's headers and says so where there are none; a CPU needs none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    rows, large = args[0].ndim == 2, max(1, len(args) - 3)
    shape, column = ((64, 2**14), (64, 1)) if rows else ((2**20,), (1,))  # a large example: it decides how many threads work
    shapes = [shape] * large + [column, column, (2,)][: len(args) - large]
    with _disable_current_modes(), torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
        examples: list[Any] = [torch.ones(s, dtype=a.dtype, device=a.device) for s, a in zip(shapes, args, strict=True)]
        # Without the function's annotations, which inductor's cache on disk can't hash where they are strings.
        graph = make_fx(lambda *tensors: function(*tensors), tracing_mode="symbolic")(*examples)
        return cast(Callable[..., Any], standalone_compile(graph, examples))


_backend = _Backend()


def set_mode(mode: str) -> None:
    """`auto` compiles where that works, `on` insists (RuntimeError otherwise), `off` runs eager."""
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"compile mode {mode} is not allowed: choose one of auto, on, off")
    _backend.mode, _backend.chosen, _backend.reason = mode, None, ""


def record() -> dict[str, str]:
    """What ran: {"fake_quantization": "compiled" | "eager" | "unused", "reason": ...}, for the record of a run."""
    return {"fake_quantization": _backend.chosen or "unused", "reason": _backend.reason}


@cache
def _limits(qmin: int, qmax: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([qmin, qmax], dtype=torch.float32, device=device)


def forward(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, silu: bool = False) -> Tensor:
    """x_hat of x, or of silu(x), for x (N,) with scale (1,), or x (R, M) with scale (R, 1)."""
    return cast(Tensor, _backend.call(_forward_silu if silu else _forward, x, scale, zero_point, _limits(qmin, qmax, x.device)))


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, silu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x (its shape), scale and zero point (() or (R,)); see `ste.fake_quantize`."""
    function = _backward_silu if silu else _backward
    grad_x, grad_scale, grad_zero = _backend.call(function, grad, x, scale, zero_point, _limits(qmin, qmax, x.device))
    return grad_x, grad_scale, grad_zero


def row_moments(x: Tensor, psi: float) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + psi) of each row of x (R, M), in float32, each (R,)."""
    variance, mean = _backend.call(_row_moments, x)
    return mean, torch.sqrt(variance + psi)


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
