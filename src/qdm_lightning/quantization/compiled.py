"""The elementwise arithmetic of fake quantization: one fused pass forward, one backward, compiled where a compiler is at hand.

A tensor of any shape and layout (channels-last too) is seen as rows of its memory, (G, K, M): G groups, each with a scale and
a zero point of its own, of K rows each; so one compiled function serves them all. `set_mode` chooses; `provenance`
says what ran.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Values of the groups, (G,), as a column of the rows of x, (G K, 1)."""
    groups, rows = x.shape[:2]
    column = values.unsqueeze(1).expand(groups, rows).clone(memory_format=torch.contiguous_format)
    # By this call compiled code computes the column once, not again for each number of a row.
    return column.as_strided((groups * rows, 1), (1, 1))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def _times(rows: Tensor, x: Tensor, channels: Tensor | None) -> Tensor:
    """The rows of x, (G K, M), times the channels' factors, (1, 1, K, M), which all groups share."""
    return rows if channels is None else _flat(rows.view(x.shape) * channels[0])


def _forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, limits: Tensor, silu: bool = False, channels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    value = _flat(x).float()
    s = _spread(scale, x)
    z = _spread(torch.round(torch.clamp(zero_point, limits[3], limits[4])), x)
    value = _times(F.silu(value) if silu else value, x, channels)
    codes = torch.clamp(torch.round(value / s) + z, limits[0], limits[1])
    return ((codes - z) * s).to(x.dtype), s, z


def _backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    z: Tensor,
    limits: Tensor,
    silu: bool = False,
    symmetric: bool = False,
    channels: Tensor | None = None,
) -> tuple[Tensor, ...]:
    upstream, value = _flat(grad).float(), _flat(x).float()
    gate = torch.sigmoid(value) if silu else None
    ratio = _times(value if gate is None else value * gate, x, channels) / s
    shifted = ratio + z
    inside = torch.clamp(shifted, limits[0], limits[1]) == shifted
    passed = torch.where(inside, upstream, 0.0)
    code = torch.clamp(torch.round(ratio) + z, limits[0], limits[1]) - z  # outside: limit - z
    row = s.squeeze(-1)
    factor = limits[2] * torch.where(limits[5] > 0, row, 1.0)
    grad_scale = (upstream * (code - torch.where(inside, ratio, 0.0))).sum(-1) * factor
    grad_zero = (upstream - passed).sum(-1) * -row
    passed = _times(passed, x, channels)
    grad_x = passed if gate is None else passed * gate * (1 + value * (1 - gate))
    sums = [rows.view(x.shape[:2]).sum(1) for rows in ([grad_scale] if symmetric else [grad_scale, grad_zero])]
    return grad_x.to(grad.dtype), *sums


def _forward_channels(
    x: Tensor, scale: Tensor, zero_point: Tensor, channels: Tensor, limits: Tensor, silu: bool = False
) -> tuple[Tensor, ...]:
    return _forward(x, scale, zero_point, limits, silu, channels)


def _backward_channels(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    z: Tensor,
    channels: Tensor,
    limits: Tensor,
    silu: bool = False,
    symmetric: bool = False,
) -> tuple[Tensor, ...]:
    return _backward(grad, x, s, z, limits, silu, symmetric, channels)


_BOTH = (False, True)
_FORWARD: dict[tuple[bool, bool], Callable[..., Any]] = {
    (by, silu): partial((_forward, _forward_channels)[by], silu=silu) for by, silu in product(_BOTH, repeat=2)
}
_BACKWARD: dict[tuple[bool, bool, bool], Callable[..., Any]] = {
    (by, silu, symmetric): partial((_backward, _backward_channels)[by], silu=silu, symmetric=symmetric)
    for by, silu, symmetric in product(_BOTH, repeat=3)
}


def _moments(x: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    values = _flat(x).float()
    means = values.mean(-1)
    within = (values - means.unsqueeze(-1)).square().mean(-1)  # two passes over a row, the second one from the cache
    rows = means.view(x.shape[:2])
    mean = rows.mean(1)
    between = (rows - mean.unsqueeze(1)).square().mean(1)
    return mean, torch.sqrt(within.view(x.shape[:2]).mean(1) + between + psi)


LARGEST = 2**31 - 1
"""Elements that compiled code is asked to index; more are quantized eagerly."""


@dataclass
class _Backend:
    """Calls functions as inductor compiled them; the key of a compiled function holds all that its code depends on."""

    mode: str = "auto"
    chosen: str = "unused"
    reason: str = ""
    compiled: dict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=dict)

    def call(self, function: Callable[..., Any], x: Tensor, *args: Tensor) -> Any:
        """`function(x, *args)`, x (G, K, M)."""
        if self.chosen == "unused":
            self.chosen, self.reason = ("eager", "asked for") if self.mode == "off" else ("compiled", "inductor")
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
                self.chosen, self.reason = "eager", f"compiling failed: {_first_line(error)}"
                return function(x, *args)
        return compiled(x, *args)


def _compile(function: Callable[..., Any], args: Sequence[Tensor]) -> Callable[..., Any]:
    """`function` for tensors like `args`, of any size.

    Inductor's own entry: what torch.compile and standalone_compile put around its code (guards, views, autograd) costs as much
    as the code does on a small tensor, and a tensor-in, tensor-out function without gradient needs none of it.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    # The compiler looks for CUDA's headers and says so where there are none; a CPU needs none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # A large example, of sizes that differ: by its rows' number it decides how many threads work, by their length how to sum.
    groups, rows = 12, 20
    sizes = {4: (1, 1, rows, ROW), 3: (groups, rows, ROW), 2: (groups * rows, 1), 1: (groups,)}
    with _disable_current_modes(), torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
        examples: list[Any] = [torch.ones(sizes[a.ndim], dtype=a.dtype, device=a.device) for a in args[:-1]]
        examples.append(torch.ones_like(args[-1]))
        # Without the function's annotations, which inductor's cache on disk can't hash where they are strings.
        trace = make_fx(lambda *t: tuple(function(*t)), tracing_mode="symbolic", decomposition_table=select_decomp_table())
        graph = trace(*examples)
        fake = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        with tracing(TracingContext(fake[0].fake_mode)):
            code = compile_fx_inner(graph, fake)
    return lambda *tensors: code(list(tensors))  # it empties the list


_backend = _Backend()


def set_mode(mode: str) -> None:
    """`auto` compiles where that works, `on` insists (RuntimeError otherwise), `off` runs eager."""
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"compile mode {mode} is not allowed: choose one of auto, on, off")
    _backend.mode, _backend.chosen, _backend.reason = mode, "unused", ""


def mode() -> str:
    """What `set_mode` chose."""
    return _backend.mode


def provenance() -> dict[str, str]:
    """What computed: {"fake_quantization": "compiled" | "eager" | "unused", "reason": ...}, as a run's metrics keep it."""
    return {"fake_quantization": _backend.chosen, "reason": _backend.reason}


@cache
def constants(device: torch.device, *values: float) -> Tensor:
    """What compiled code takes as data, so that one function serves every grid."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def limits(qmin: int, qmax: int, scale_gradient: float, hold: bool, log: bool, device: torch.device) -> Tensor:
    """The grid's ends, LSQ's factor on the gradient to s, the ends between which the zero point is held, if it is, and whether
    the gradient asked for is that to log s."""
    low, high = (qmin, qmax) if hold else (-math.inf, math.inf)
    return constants(device, qmin, qmax, scale_gradient, low, high, log)


def forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, limits: Tensor, silu: bool = False, channels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x_hat of x, or of silu(x), for x (G, K, M) with scale and real zero point (G,); and scale and integer
    zero point as columns of the rows, (G K, 1). `channels`: factors of what is quantized, from `channel_rows`."""
    by = () if channels is None else (channels,)
    call = _FORWARD[channels is not None, silu]
    return cast(tuple[Tensor, Tensor, Tensor], _backend.call(call, x, scale, zero_point, *by, limits))


def backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    z: Tensor,
    limits: Tensor,
    silu: bool = False,
    symmetric: bool = False,
    channels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients to x (G, K, M), scale and zero point (G,), from the columns that `forward` gave; `symmetric` leaves the last
    one out (None), which saves a sum. See `functional.fake_quantize`."""
    by = () if channels is None else (channels,)
    call = _BACKWARD[channels is not None, silu, symmetric]
    grad_x, grad_scale, *rest = _backend.call(call, grad, x, s, z, *by, limits)
    return grad_x, grad_scale, rest[0] if rest else None


def row_moments(x: Tensor, psi: float) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + psi) of each sample of x (B, ...), in float32, each (B,)."""
    return cast(tuple[Tensor, Tensor], _backend.call(_moments, as_rows(x, x.shape[0])[0], constants(x.device, psi)))


ROW = 4096
"""The longest row, where an axis ends in time: short enough to share among threads and to sum one by one."""


def as_rows(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """x as rows of its memory, (G, K, M), and the strides that it has, or its copy where its memory has gaps.

    With `groups` = `x.shape[0]`, G is their number and each row lies within one index of the first axis.
    """
    for dense in (lambda: x, x.clone, x.contiguous):
        tensor = dense()
        shape = _split(tensor.shape, tensor.stride(), groups)
        if shape is not None:
            return tensor.as_strided(shape, (shape[1] * shape[2], shape[2], 1)), tensor.stride()
    raise AssertionError(f"a contiguous tensor of shape {tuple(x.shape)} has gaps")


@cache
def _split(shape: torch.Size, strides: tuple[int, ...], groups: int) -> tuple[int, int, int] | None:
    """(G, K, M) of a tensor without gaps, its first axis the slowest if there are groups; None of another."""
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
    return groups, rows // groups, size


def in_layout(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x, or a copy that lies in memory by these strides; those of axes of one element say nothing."""
    if x.stride() == strides or all(own == asked or n == 1 for own, asked, n in zip(x.stride(), strides, x.shape, strict=True)):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def channel_rows(channels: Tensor, x: Tensor, strides: tuple[int, ...], rows: Tensor) -> Tensor:
    """Factors that broadcast against a sample of x, laid out as the rows of each sample, (1, 1, K, M) for `rows` (B, K, M)."""
    laid = in_layout(channels.float().expand(1, *x.shape[1:]), strides)
    _, count, length = rows.shape
    return laid.as_strided((1, 1, count, length), (count * length, count * length, length, 1))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


@cache
def gradient_factor(shape: Sequence[int], qmax: int) -> float:
    """LSQ's g = 1 / sqrt(N q_max) of a tensor whose each index of the first axis has N elements that share the scale."""
    return 1.0 / math.sqrt(math.prod(shape[1:]) * qmax)
