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
from qdm_lightning.exporting.tables import Table
from qdm_lightning.integer.layers import weight_codes as integer_codes
from qdm_lightning.integer.report import Unsupported
from qdm_lightning.quantization.quantizer import ActivationQuantizer, LSQActivation, LSQProbability, WeightQuantizer
from qdm_lightning.quantization.taq import EMANormalizedActivation, Grouped, GroupedActivation, NormalizedActivation
from qdm_lightning.quantization.timestep import timesteps

KNOWN = (LSQActivation, LSQProbability, NormalizedActivation, EMANormalizedActivation, GroupedActivation)
"""Quantizers of activations whose grids are known; of others, subclasses among them, it is tabulated what `grid(x)` gives."""

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
    quantizer: WeightQuantizer
    codes: Tensor
    scale: Tensor
    values: Tensor


def check(name: str, quantizer: nn.Module) -> None:
    """Raise ValueError where a graph cannot hold a quantizer of activations."""
    if isinstance(quantizer, Grouped) and not bool(quantizer.seen.all()):
        raise ValueError(
            f"{name}: timestep groups {(~quantizer.seen).nonzero().flatten().tolist()} were never seen in calibration or "
            "training, so their grids mean nothing: train or calibrate on all timesteps, or take fewer groups (taq.groups=...)"
        )
    if isinstance(quantizer, ActivationQuantizer) and not callable(getattr(quantizer, "grid", None)):
        raise ValueError(f"{name}, a {type(quantizer).__name__}, has no form in ONNX: it has no grid(x)")


def weight_codes(name: str, quantizer: WeightQuantizer, weight: Tensor) -> WeightCodes:
    """The codes of a weight. Raises ValueError where `quantizer` does not make it scale times code."""
    try:
        codes, scale = integer_codes(weight, quantizer)
    except Unsupported as error:
        raise ValueError(f"{name} has no form in ONNX: {error}") from error
    return WeightCodes(weight, quantizer, codes, scale, codes * scale.view(-1, *[1] * (weight.ndim - 1)))


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
    """What a quantizer is applied to: the value `x` of `ndim` axes, the first of which is the sample.

    `name` is the quantizer's, for messages; `table` is the grid of one that is none of `KNOWN`.
    """

    name: str
    quantizer: Any
    x: str
    ndim: int
    table: Table | None = None

    def codes(self, graph: Graph, padding: Sequence[int] = (), *, operand: bool = False) -> Codes:
        """The codes, in the graph.

        Args:
            padding: zeros around x, on both sides of each of its last axes.
            operand: x is multiplied by another activation, for which OpenVINO wants int8 codes with zero point 0.

        Raises:
            ValueError: zeros around x, and a quantizer of the user's own whose grid has no zero.
        """
        quantizer = self.quantizer
        x = padded(graph, self.x, self.ndim, padding) if any(padding) else self.x
        if type(quantizer) is NormalizedActivation:
            return _signed_codes(graph, quantizer, x, *_sample_grid(graph, quantizer, self.x, self.ndim))
        if isinstance(quantizer, Grouped) and self.table is None:
            return _signed_codes(graph, quantizer, x, *_grid_of_group(graph, quantizer, self.ndim))
        with torch.no_grad():
            table = self.table or Table(*quantizer.grid(torch.zeros(1)))
        held = bool(((table.zero_point >= 0) & (table.zero_point <= quantizer.qmax)).all())
        if any(padding) and not held:
            raise ValueError(f"{self.name} has no form in ONNX: zeros are padded there, and its grid has no zero")
        if len(table.scale) > 1:
            return _signed_codes(graph, quantizer, x, *_rows(graph, table, "timestep", self.ndim))
        scale, zero_point = (float(value) for value in table)
        if not held or (operand and not getattr(quantizer, "symmetric", False)):
            return _signed_codes(graph, quantizer, x, graph.number(scale), graph.number(zero_point))
        return Codes(_unsigned(graph, x, scale, int(zero_point), quantizer.qmax))


def padded(graph: Graph, x: str, ndim: int, padding: Sequence[int]) -> str:
    """x (of `ndim` axes) with `padding` zeros on both sides of each of its last axes."""
    widths = [0] * (ndim - len(padding)) + list(padding)
    return graph.op("Pad", x, graph.integers(*widths, *widths), graph.number(0.0))


def _unsigned(graph: Graph, x: str, scale: float, zero_point: int, qmax: int) -> str:
    """Codes on [0, qmax] with any zero point among them, as uint8.

    x is clipped, not its codes, so that quantizing and dequantizing stand side by side, the pattern that every runtime knows.
    The ends are on the grid: the codes are the same.
    """
    s, z = graph.number(scale), graph.constant(np.uint8(zero_point))
    if qmax < 255:
        ends = (float(np.float32(scale) * np.float32(code - zero_point)) for code in (0, qmax))
        x = graph.op("Clip", x, *map(graph.number, ends))
    return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, s, z), s, z)


def _signed_codes(graph: Graph, quantizer: Any, x: str, scale: str, zero_point: str) -> Codes:
    """int8 codes - 2^(b-1), which any zero point allows, in units of the scale."""
    half = 2 ** (quantizer.bits - 1)
    middle = graph.op("Sub", zero_point, graph.number(half))
    shifted = graph.op("Add", graph.op("Round", graph.op("Div", x, scale)), middle)
    clipped = graph.op("Clip", shifted, graph.number(-half), graph.number(quantizer.qmax - half))
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


def _grid_of_group(graph: Graph, quantizer: Any, ndim: int) -> tuple[str, str]:
    """s_t and z_t of `taq=ema` and `taq=scale`, (N, 1, ...), read from tables of one row for each group."""
    groups, total = quantizer.groups, quantizer.num_train_timesteps
    all_t = torch.arange(total)
    group = quantizer.group_of(all_t)
    first = torch.searchsorted(group, torch.arange(groups)).clamp(max=total - 1)  # a t of each group
    with torch.no_grad(), timesteps(all_t[first]):
        table = Table(*quantizer.grid(torch.zeros(groups, 1)))
    index = graph.op("Div", graph.op("Mul", "timestep", graph.integers(groups)), graph.integers(total))
    return _rows(graph, table, index, ndim)


def _rows(graph: Graph, table: Table, index: str, ndim: int) -> tuple[str, str]:
    """The rows of a table that `index` (N,) names, each (N, 1, ...)."""
    shape = graph.integers(-1, *[1] * (ndim - 1))
    scale, zero_point = (
        graph.op("Reshape", graph.op("Gather", graph.constant(part.float().numpy()), index), shape) for part in table
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
