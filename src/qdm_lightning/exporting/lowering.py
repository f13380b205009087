"""How each quantizer becomes QuantizeLinear and DequantizeLinear, and products of what they give.

A quantized activation is `Codes`: x_hat = scale (values + offset), where `values` comes out of a DequantizeLinear that a
runtime can take into an integer kernel, and scale and offset are constants, or one for each sample. They leave the product,

    conv(x_hat, w_hat) = scale (conv(values, w_hat) + offset conv(1, w_hat)),    and so for linear layers and attention,

so that codes are integers with a constant scale wherever the grid depends on the timestep or on the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn

from qdm_lightning.exporting.graph import Graph
from qdm_lightning.quantization import functional
from qdm_lightning.quantization.quantizer import LSQActivation, LSQProbability, LSQWeight
from qdm_lightning.quantization.taq import EMANormalizedActivation, GroupedActivation, NormalizedActivation
from qdm_lightning.quantization.timestep import timesteps

KNOWN = (LSQActivation, LSQProbability, LSQWeight, NormalizedActivation, EMANormalizedActivation, GroupedActivation)
"""Quantizers that a graph can hold; a subclass may compute anything, and is refused."""

PACKED_BITS = 4
"""Weights of so many bits or fewer are stored two codes to a byte."""


@dataclass(frozen=True)
class Codes:
    """x_hat = scale (values + offset); None stands for 1 and for 0."""

    values: str
    scale: str | None = None
    offset: str | None = None


@dataclass(frozen=True)
class WeightCodes:
    """A quantized weight: the weight and its quantizer, codes (O, ...), scales (O,), and the values that they stand for."""

    weight: Tensor
    quantizer: LSQWeight
    codes: Tensor
    scale: Tensor
    values: Tensor


def check(name: str, quantizer: nn.Module) -> None:
    """Raise ValueError where a graph cannot hold a quantizer."""
    if type(quantizer) not in KNOWN:
        raise ValueError(
            f"{name} is a {type(quantizer).__name__}, which has no form in ONNX: "
            f"only {', '.join(kind.__name__ for kind in KNOWN)} are exported"
        )
    seen = getattr(quantizer, "seen", None)
    if seen is not None and not bool(seen.all()):
        raise ValueError(
            f"{name}: timestep groups {(~seen).nonzero().flatten().tolist()} were never seen in calibration or training, so "
            "their grids mean nothing: train or calibrate on all timesteps, or take fewer groups (taq.groups=...)"
        )


def weight_codes(quantizer: LSQWeight, weight: Tensor) -> WeightCodes:
    """The codes of a weight."""
    scale = quantizer.scale.detach().float()
    column = scale.view(-1, *[1] * (weight.ndim - 1))
    codes = functional.quantize(weight.detach().float(), column, torch.zeros(1), quantizer.qmin, quantizer.qmax)
    return WeightCodes(weight, quantizer, codes.to(torch.int8), scale, codes * column)


def store_weight(graph: Graph, weight: WeightCodes, *, transposed: bool = False) -> str:
    """w_hat in the graph, from integers; a linear layer's is stored as (in, out)."""
    codes = (weight.codes.T if transposed else weight.codes).contiguous().numpy()
    packed = weight.quantizer.bits <= PACKED_BITS
    stored = graph.constant(codes, packed=packed)
    if packed:  # OpenVINO multiplies in float32 where codes reach the DequantizeLinear as int4
        stored = graph.op("Cast", stored, to=TensorProto.INT8)
    # No zero point: where two kinds of layers share that constant, OpenVINO multiplies both in float32 if the batch is fixed.
    return graph.op("DequantizeLinear", stored, graph.constant(weight.scale.numpy()), axis=1 if transposed else 0)


@dataclass(frozen=True)
class Activation:
    """What a quantizer is applied to: the value `x` of `ndim` axes, the first of which is the sample."""

    quantizer: LSQActivation
    x: str
    ndim: int

    def codes(self, graph: Graph, padding: Sequence[int] = (), *, operand: bool = False) -> Codes:
        """The codes, in the graph.

        Args:
            padding: zeros around x, on both sides of each of its last axes.
            operand: x is multiplied by another activation, for which OpenVINO wants int8 codes with zero point 0.
        """
        quantizer = self.quantizer
        x = padded(graph, self.x, self.ndim, padding) if any(padding) else self.x
        if type(quantizer) in (LSQActivation, LSQProbability):  # one grid for all
            with torch.no_grad():
                scale, zero_point = (float(value) for value in quantizer.grid(torch.zeros(1)))
            if operand and not quantizer.symmetric:
                return _signed_codes(graph, quantizer, x, graph.number(scale), graph.number(zero_point))
            return Codes(_unsigned(graph, x, scale, int(zero_point), quantizer.bits))
        if type(quantizer) is NormalizedActivation:
            grid = _sample_grid(graph, quantizer, self.x, self.ndim)
        else:
            grid = _grid_of_timestep(graph, quantizer, self.ndim)
        return _signed_codes(graph, quantizer, x, *grid)


def padded(graph: Graph, x: str, ndim: int, padding: Sequence[int]) -> str:
    """x (of `ndim` axes) with `padding` zeros on both sides of each of its last axes."""
    widths = [0] * (ndim - len(padding)) + list(padding)
    return graph.op("Pad", x, graph.integers(*widths, *widths), graph.number(0.0))


def _unsigned(graph: Graph, x: str, scale: float, zero_point: int, bits: int) -> str:
    """Codes on [0, 2^b - 1] with any zero point, as uint8.

    x is clipped, not its codes, so that quantizing and dequantizing stand side by side, the pattern that every runtime knows.
    The ends are on the grid: the codes are the same.
    """
    s, z = graph.number(scale), graph.constant(np.uint8(zero_point))
    if bits < 8:
        ends = (float(np.float32(scale) * np.float32(code - zero_point)) for code in (0, 2**bits - 1))
        x = graph.op("Clip", x, *map(graph.number, ends))
    return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, s, z), s, z)


def _signed_codes(graph: Graph, quantizer: LSQActivation, x: str, scale: str, zero_point: str) -> Codes:
    """int8 codes - 2^(b-1), which any zero point allows, in units of the scale."""
    half = 2 ** (quantizer.bits - 1)
    middle = graph.op("Sub", zero_point, graph.number(half))
    shifted = graph.op("Add", graph.op("Round", graph.op("Div", x, scale)), middle)
    clipped = graph.op("Clip", shifted, graph.number(-half), graph.number(half - 1))
    one, zero = graph.number(1.0), graph.constant(np.int8(0))
    values = graph.op("DequantizeLinear", graph.op("QuantizeLinear", clipped, one, zero), one, zero)
    return Codes(values, scale, graph.op("Neg", middle))


def _sample_grid(graph: Graph, quantizer: NormalizedActivation, x: str, ndim: int) -> tuple[str, str]:
    """s_n and z_n of `taq=normalize`, (N, 1, ...): see `NormalizedActivation`."""
    axes = graph.integers(*range(1, ndim))
    if quantizer.symmetric:
        greatest = graph.op("Max", graph.op("ReduceMax", x, axes, keepdims=1), graph.number(quantizer.psi))
        return graph.op("Mul", greatest, graph.number(float(quantizer.scale.detach()))), graph.number(0.0)
    mean = graph.op("ReduceMean", x, axes, keepdims=1)
    centred = graph.op("Sub", x, mean)
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), axes, keepdims=1)
    std = graph.op("Sqrt", graph.op("Add", variance, graph.number(quantizer.psi)))
    scale = graph.op("Mul", std, graph.number(float(quantizer.scale.detach())))
    zero_point = graph.op("Sub", graph.number(float(quantizer.zero_point.detach())), graph.op("Div", mean, scale))
    if quantizer.holds_zero:
        zero_point = graph.op("Clip", zero_point, graph.number(quantizer.qmin), graph.number(quantizer.qmax))
    return scale, graph.op("Round", zero_point)


def _grid_of_timestep(graph: Graph, quantizer: Any, ndim: int) -> tuple[str, str]:
    """s_t and z_t of `taq=ema` and `taq=scale`, (N, 1, ...), read from tables of one row for each group."""
    groups, total = quantizer.groups, quantizer.num_train_timesteps
    all_t = torch.arange(total)
    group = quantizer.group_of(all_t)
    first = torch.searchsorted(group, torch.arange(groups)).clamp(max=total - 1)  # a t of each group
    with torch.no_grad(), timesteps(all_t[first]):
        tables = quantizer.grid(torch.zeros(groups, 1))
    index = graph.op("Div", graph.op("Mul", "timestep", graph.integers(groups)), graph.integers(total))
    shape = graph.integers(-1, *[1] * (ndim - 1))
    scale, zero_point = (
        graph.op("Reshape", graph.op("Gather", graph.constant(table.float().numpy()), index), shape) for table in tables
    )
    return scale, zero_point


def plain(graph: Graph, codes: Codes) -> str:
    """x_hat itself."""
    value = codes.values if codes.offset is None else graph.op("Add", codes.values, codes.offset)
    return value if codes.scale is None else graph.op("Mul", value, codes.scale)


def product(graph: Graph, a: Codes, b: Codes, width: int) -> str:
    """a b of attention's operands (N, heads, I, width) and (N, heads, width, J)."""
    y = graph.op("MatMul", a.values, b.values)
    for factor, axis, offset in ((a, -1, b.offset), (b, -2, a.offset)):
        if offset is not None:
            sums = graph.op("ReduceSum", factor.values, graph.integers(axis), keepdims=1)
            y = graph.op("Add", y, graph.op("Mul", sums, offset))
    if a.offset is not None and b.offset is not None:
        y = graph.op("Add", y, graph.op("Mul", graph.op("Mul", a.offset, b.offset), graph.number(width)))
    scales = [codes.scale for codes in (a, b) if codes.scale is not None]
    return graph.op("Mul", y, scales[0] if len(scales) == 1 else graph.op("Mul", *scales)) if scales else y


def finish(graph: Graph, y: str, x: Codes, weight_sum: Tensor, bias: Tensor | None) -> str:
    """What a layer makes of x_hat, from the product `y` of its values with the weight.

    Args:
        weight_sum: the weight's sum for each output; it broadcasts against y, as `bias` does.
    """
    shift = None if bias is None else graph.constant(bias.contiguous().numpy())
    if x.offset is not None:  # few numbers for each sample: the result is read and written once
        own = graph.op("Mul", graph.op("Mul", graph.constant(weight_sum.contiguous().numpy()), x.offset), str(x.scale))
        shift = own if shift is None else graph.op("Add", own, shift)
    if x.scale is not None:
        y = graph.op("Mul", y, x.scale)
    return y if shift is None else graph.op("Add", y, shift)
