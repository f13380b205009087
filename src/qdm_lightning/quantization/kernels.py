"""The elementwise arithmetic of fake quantization: one fused pass forward, one backward, compiled where a compiler is at hand.

A tensor of any shape and layout (channels-last too) is seen as rows of its memory, (R, M), with a scale for each row, so that
one compiled function serves them all. `set_mode` chooses; `record` tells what ran.
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
    shifted = ratio + zero_point
    inside = torch.clamp(shifted, limits[0], limits[1]) == shifted
    passed = torch.where(inside, upstream, 0.0)
    code = torch.clamp(torch.round(ratio) + zero_point, limits[0], limits[1]) - zero_point  # outside: limit - z
    grad_scale = (upstream * (code - torch.where(inside, ratio, 0.0))).sum(-1) * limits[2]
    return passed.to(grad.dtype), grad_scale, (upstream - passed).sum(-1) * -scale.squeeze(-1)


def _backward_silu(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = x.float()
    gate = torch.sigmoid(value)
    inner, grad_scale, grad_zero = _backward(grad.float(), value * gate, scale, zero_point, limits)
    return (inner * gate * (1 + value * (1 - gate))).to(grad.dtype), grad_scale, grad_zero


def _backward_symmetric(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad, x, scale, zero_point, limits)[:2]


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
        """`function(x, *args)`, x (R, M)."""
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
        key = (function, x.dtype, args[0].dtype if args else None, x.device, torch.get_num_threads())
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
    large = max(1, len(args) - 3)
    # A large example: it decides how many threads work.
    shapes = [(2**20 // ROW, ROW)] * large + [(2**20 // ROW, 1)] * 2 * (len(args) > 1) + [(3,)] * (len(args) > 1)
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
def _limits(qmin: int, qmax: int, scale_gradient: float, device: torch.device) -> Tensor:
    """What compiled code takes as data, so that it serves every grid: its ends, and LSQ's factor on the gradient to s."""
    with torch.inference_mode(False):
        return torch.tensor([qmin, qmax, scale_gradient], dtype=torch.float32, device=device)


def forward(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, silu: bool = False) -> Tensor:
    """x_hat of x, or of silu(x), for x (R, M) with scale and zero point (R, 1)."""
    limits = _limits(qmin, qmax, 1.0, x.device)
    return cast(Tensor, _backend.call(_forward_silu if silu else _forward, x, scale, zero_point, limits))


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    scale_gradient: float,
    silu: bool = False,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients to x (R, M), scale and zero point (R,); `symmetric` leaves the last one out
    (None) where that saves a sum. See `ste.fake_quantize`."""
    function = _backward_silu if silu else _backward_symmetric if symmetric else _backward
    limits = _limits(qmin, qmax, scale_gradient, x.device)
    grad_x, grad_scale, *rest = _backend.call(function, grad, x, scale, zero_point, limits)
    return grad_x, grad_scale, rest[0] if rest else None


def row_moments(x: Tensor, psi: float) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + psi) of each sample of x (B, ...), in float32, each (B,)."""
    variance, mean = _backend.call(_row_moments, as_rows(x, x.shape[0])[0].view(x.shape[0], -1))
    return mean, torch.sqrt(variance + psi)


ROW = 8192
"""The longest row, where an axis ends in time: short enough to share among threads and to sum one by one."""


def as_rows(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """x as rows of its memory, (R, M), and the strides that it has, or its copy where its memory has gaps.

    With `groups` = `x.shape[0]`, R is a multiple of it and each row lies within one index of the first axis.
    """
    for dense in (lambda: x, x.clone, x.contiguous):
        tensor = dense()
        shape = _split(tensor.shape, tensor.stride(), groups)
        if shape is not None:
            return tensor.as_strided(shape, (shape[1], 1)), tensor.stride()
    raise AssertionError(f"a contiguous tensor of shape {tuple(x.shape)} has gaps")


@cache
def _split(shape: torch.Size, strides: tuple[int, ...], groups: int) -> tuple[int, int] | None:
    """(R, M) of a tensor without gaps, its first axis the slowest if there are groups; None of another."""
    axes = sorted((axis for axis in range(len(shape)) if shape[axis] != 1), key=lambda axis: -strides[axis])
    size = 1
    for axis in reversed(axes):
        if strides[axis] != size:
            return None
        size *= shape[axis]
    if groups > 1 and axes[0] != 0:
        return None
    rows = 1
    for axis in axes:
        if rows >= groups and (size <= ROW or size == shape[axis]):
            break
        rows, size = rows * shape[axis], size // shape[axis]
    return rows, size


def column(values: Tensor, rows: int) -> Tensor:
    """One value, or one for each of the groups, as a column (rows, 1)."""
    groups = values.numel()
    return values.reshape(groups, 1).expand(groups, rows // groups).contiguous().view(rows, 1)


def in_layout(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x, or a copy that lies in memory by these strides; those of axes of one element say nothing."""
    if all(own == asked or n == 1 for own, asked, n in zip(x.stride(), strides, x.shape, strict=True)):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


@cache
def gradient_factor(elements: int, qmax: int) -> float:
    """LSQ's g = 1 / sqrt(N q_max), N the elements (of one sample) that share the scale."""
    return 1.0 / math.sqrt(elements * qmax)
