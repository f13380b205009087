"""A traced U-Net, operator by operator, as an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.fx import Node

from qdm_lightning.exporting import lowering
from qdm_lightning.exporting.graph import Graph
from qdm_lightning.exporting.lowering import Activation, Codes, WeightCodes
from qdm_lightning.exporting.marks import marked
from qdm_lightning.exporting.tables import tabulated
from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer

TYPES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}
UNARY = {"exp": "Exp", "sin": "Sin", "cos": "Cos", "sigmoid": "Sigmoid", "sqrt": "Sqrt"}


@dataclass(frozen=True)
class Product:
    """One multiplication of the network: what it takes and gives in the graph, and what it is.

    Attributes:
        name: of its module.
        node: the traced operator, whose arguments are `arguments`: activations to be quantized, weights, names, constants.
        output: name of its result in the graph.
        integer: both factors are codes.
        operands: both are activations.
    """

    name: str
    node: Node
    arguments: tuple[Any, ...]
    output: str
    integer: bool
    operands: bool


class _Traced(nn.Module):
    """The network under the names that the graph's inputs have."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        noise: Tensor = self.network(sample, timestep)
        return noise


def trace(network: nn.Module, shape: Sequence[int]) -> torch.export.ExportedProgram:
    """The operators of `network(sample, timestep)` for images (C, H, W), for any batch."""
    batch = torch.export.Dim("batch", max=63)  # diffusers copies larger ones before it enlarges them; the graph is the same
    inputs = (torch.zeros(2, *shape), torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        program = torch.export.export(_Traced(network), inputs, dynamic_shapes={"sample": {0: batch}, "timestep": {0: batch}})
        return program.run_decompositions({})


class Translator:
    """A network as a graph.

    Args:
        network: a `Denoiser`, whose U-Net is prepared or in float: what it makes of the estimate is part of the graph.
        shape: (C, H, W) of an image.
        num_train_timesteps: T, for the tables of quantizers of the user's own.

    Attributes:
        network: the traced network, whose quantizers do nothing.
        quantizers: with their names, by the numbers of their marks.
        products: its multiplications, in the order of the pass.

    Raises:
        ValueError: the network has an operator or a quantizer that a graph cannot hold.
    """

    def __init__(self, network: nn.Module, shape: Sequence[int], num_train_timesteps: int = 1000) -> None:
        self.network, found = marked(network)
        self.quantizers = [(name.removeprefix("unet."), quantizer) for name, quantizer in found]
        for name, quantizer in self.quantizers:
            lowering.check(name, quantizer)
        self.shape, self.num_train_timesteps = tuple(shape), num_train_timesteps
        self.program = trace(self.network.to(memory_format=torch.contiguous_format), shape)

    def translate(self, metadata: Mapping[str, str], *, quantize: bool = True, watch: bool = False) -> Any:
        """The model, inputs `sample` (N, C, H, W) float32 and `timestep` (N,) int64, output `noise` as `sample`.

        Args:
            quantize: False leaves the quantizers out: the wiring alone, where no rounding hides or amplifies an error.
            watch: give what enters and leaves each of `products` too, as outputs of the names that `watched` has.
        """
        self.graph, self.values, self.quantize = Graph(), dict[Node, Any](), quantize
        self.products: list[Product] = []
        parameters = {**self.program.graph_signature.inputs_to_parameters, **self.program.graph_signature.inputs_to_buffers}
        tensors = {**self.program.state_dict, **self.program.constants}  # buffers that no checkpoint has are among the latter
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                stored = parameters.get(node.name)
                self.values[node] = node.name if stored is None else tensors[stored].detach()
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                (output,) = node.args[0]
        sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["N", *self.shape])
        timestep = helper.make_tensor_value_info("timestep", TensorProto.INT64, ["N"])
        outputs = {"noise": (self._value(output), ["N", *self.shape])}
        if watch:
            outputs |= {name: (value, [None] * ndim) for name, (value, ndim) in self.watched().items()}
        return self.graph.model([sample, timestep], outputs, metadata)

    def watched(self) -> dict[str, tuple[str, int]]:
        """By name, the values around each product number i and how many axes they have: `output<i>`, `input<i>.<k>` of
        argument k before it is quantized, and `codes<i>.<k>` after."""
        found = {}
        for i, product in enumerate(self.products):
            found[f"output{i}"] = product.output, product.node.meta["val"].ndim
            for k, argument in enumerate(product.arguments):
                if isinstance(argument, Activation):
                    codes = argument.codes(self.graph, operand=product.operands)
                    found[f"input{i}.{k}"] = argument.x, argument.ndim
                    found[f"codes{i}.{k}"] = lowering.plain(self.graph, codes), argument.ndim
                elif isinstance(argument, str):
                    found[f"input{i}.{k}"] = argument, product.node.args[k].meta["val"].ndim  # type: ignore[union-attr]
        return found

    def _call(self, node: Node) -> Any:
        """What a traced operator is in the graph: the method of its name, `_conv2d` for aten.conv2d."""
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0].strip("_")
        translate: Callable[..., Any] | None = getattr(self, f"_{name}", None)
        try:
            if name in BINARY and not node.kwargs:
                a, b = (self._value(arg, node) for arg in node.args)
                return self.graph.op(BINARY[name], a, b)
            if name in UNARY:
                return self.graph.op(UNARY[name], self._value(node.args[0]))
            if translate is not None:
                return translate(node, *node.args, **node.kwargs)
        except TypeError as error:  # arguments that the method does not have
            raise ValueError(f"the network uses {node.target} in a way that the export does not know: {error}") from error
        raise ValueError(f"the network uses {node.target}, which the export does not know")

    def _value(self, arg: Any, like: Node | None = None) -> str:
        """The name of an argument's value in the graph; a number becomes a constant of the type of `like`."""
        if isinstance(arg, int | float):
            assert like is not None
            return self.graph.constant(np.array(arg, helper.tensor_dtype_to_np_dtype(TYPES[like.meta["val"].dtype])))
        value = self.values[arg]
        if isinstance(value, Activation):
            return lowering.plain(self.graph, value.codes(self.graph))
        if isinstance(value, WeightCodes):
            return lowering.store_weight(self.graph, value)
        return self.graph.constant(value.contiguous().numpy()) if isinstance(value, Tensor) else str(value)

    def _rsub(self, node: Node, x: Node, other: Any) -> str:
        return self.graph.op("Sub", self._value(other, node), self._value(x))

    def _index(self, node: Node, x: Node, indices: Sequence[Node | None]) -> str:
        if len(indices) != 1 or indices[0] is None:
            raise ValueError("the network takes elements along several axes at once, which the export does not know")
        return self.graph.op("Gather", self._value(x), self._value(indices[0]), axis=0)

    def _mark(self, node: Node, x: Node, index: int) -> Any:
        name, quantizer = self.quantizers[index]
        weight, shape = self.values[x], node.meta["val"].shape
        if not self.quantize:
            return weight
        if isinstance(weight, Tensor):
            return lowering.weight_codes(name, cast(WeightQuantizer, quantizer), weight)
        table = None
        if type(quantizer) not in lowering.KNOWN:
            sample = [int(size) for size in shape[1:]]
            table = tabulated(name, cast(ActivationQuantizer, quantizer), sample, self.num_train_timesteps)
        return Activation(name, quantizer, self._value(x), len(shape), table)

    def _codes(self, arg: Node, padding: Sequence[int] = (), *, operand: bool = False) -> Codes:
        """What a product takes of an argument, `padding` zeros on all sides of its last axes."""
        value = self.values[arg]
        if isinstance(value, Activation):
            return value.codes(self.graph, padding, operand=operand)
        plain = self._value(arg)
        return Codes(lowering.padded(self.graph, plain, arg.meta["val"].ndim, padding) if any(padding) else plain)

    def _weight(self, arg: Node, *, transposed: bool = False) -> tuple[str, Tensor]:
        """A weight in the graph, and its values."""
        value = self.values[arg]
        if isinstance(value, WeightCodes):
            return lowering.store_weight(self.graph, value, transposed=transposed), value.values
        return self.graph.constant((value.T if transposed else value).contiguous().numpy()), value

    def _product(self, node: Node, output: str, factors: Sequence[Node]) -> str:
        """Keep a multiplication, and return its output."""
        *_, (path, _kind) = node.meta["nn_module_stack"].values()
        arguments = torch.fx.map_arg(node.args, lambda arg: self.values[arg])
        integer = all(isinstance(self.values[factor], Activation | WeightCodes) for factor in factors)
        operands = not any(isinstance(self.values[factor], WeightCodes | Tensor) for factor in factors)
        self.products.append(Product(path.removeprefix("network.unet."), node, arguments, output, integer, operands))
        return output

    def _conv2d(
        self,
        node: Node,
        x: Node,
        w: Node,
        bias: Node | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> str:
        weight, values = self._weight(w)
        codes = self._codes(x)
        if codes.offset is not None and any(padding):  # what is padded is a code of the sample's own: zeros before quantizing
            codes, padding = self._codes(x, padding), (0, 0)
        geometry: dict[str, Any] = {
            "strides": list(stride),
            "pads": [*padding, *padding],
            "dilations": list(dilation),
            "group": groups,
        }
        y = self.graph.op("Conv", codes.values, weight, **geometry)
        y = lowering.finish(self.graph, y, codes, values.sum((1, 2, 3)).view(-1, 1, 1), self._bias(bias, -1, 1, 1))
        return self._product(node, y, (x, w))

    def _linear(self, node: Node, x: Node, w: Node, bias: Node | None = None) -> str:
        weight, values = self._weight(w, transposed=True)
        codes = self._codes(x)
        y = self.graph.op("MatMul", codes.values, weight)
        return self._product(node, lowering.finish(self.graph, y, codes, values.sum(1), self._bias(bias, -1)), (x, w))

    def _bias(self, bias: Node | None, *shape: int) -> Tensor | None:
        return None if bias is None else self.values[bias].reshape(shape)

    def _matmul(self, node: Node, a: Node, b: Node) -> str:
        width = int(a.meta["val"].shape[-1])
        first, second = (self._codes(arg, operand=True) for arg in (a, b))
        return self._product(node, lowering.product(self.graph, first, second, width), (a, b))

    def _scaled_dot_product_attention(self, node: Node, q: Node, k: Node, v: Node, *rest: Any, **options: Any) -> str:
        if any(value is not None and value != 0.0 and value is not False for value in (*rest, *options.values())):
            raise ValueError("the network's attention has a mask or dropout, which the export does not know")
        graph = self.graph
        transposed = graph.op("Transpose", self._value(k), perm=[0, 1, 3, 2])
        scores = graph.op("MatMul", self._value(q), transposed)
        scores = graph.op("Mul", scores, graph.number(q.meta["val"].shape[-1] ** -0.5))
        return self._product(node, graph.op("MatMul", graph.op("Softmax", scores, axis=-1), self._value(v)), (q, k, v))

    def _group_norm(self, node: Node, x: Node, groups: int, weight: Node, bias: Node, epsilon: float = 1e-5, *_: Any) -> str:
        return self.graph.op(
            "GroupNormalization", self._value(x), self._value(weight), self._value(bias), num_groups=groups, epsilon=epsilon
        )

    def _silu(self, node: Node, x: Node) -> str:
        value = self._value(x)
        return self.graph.op("Mul", value, self.graph.op("Sigmoid", value))

    def _softmax(self, node: Node, x: Node, axis: int, *_: Any) -> str:
        return self.graph.op("Softmax", self._value(x), axis=axis)

    def _view(self, node: Node, x: Node, shape: Any) -> str:
        sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        assert sizes.count(-1) <= 1, "more than one axis of unknown length"
        return self.graph.op("Reshape", self._value(x), self.graph.integers(*sizes))

    _reshape = _unsqueeze = _unsafe_view = _flatten = _unflatten = _squeeze = _view

    def _transpose(self, node: Node, x: Node, first: int, second: int) -> str:
        axes = list(range(node.meta["val"].ndim))
        axes[first], axes[second] = axes[second], axes[first]
        return self.graph.op("Transpose", self._value(x), perm=axes)

    def _cat(self, node: Node, parts: Sequence[Node], axis: int = 0) -> str:
        return self.graph.op("Concat", *(self._value(part) for part in parts), axis=axis)

    def _slice(self, node: Node, x: Node, axis: int, start: int = 0, end: int = 2**63 - 1, step: int = 1) -> str:
        integers = self.graph.integers
        return self.graph.op("Slice", self._value(x), integers(start), integers(end), integers(axis), integers(step))

    def _pad(self, node: Node, x: Node, pads: Sequence[int], mode: str = "constant", value: float | None = None) -> str:
        ndim, count = node.meta["val"].ndim, len(pads) // 2
        if mode != "constant":
            raise ValueError(f"the network pads by {mode}, which the export does not know")
        before, after = ([0] * (ndim - count) + list(pads[first::2])[::-1] for first in (0, 1))
        widths = self.graph.integers(*before, *after)
        return self.graph.op("Pad", self._value(x), widths, self.graph.number(value or 0.0))

    def _constant_pad_nd(self, node: Node, x: Node, pads: Sequence[int], value: float = 0.0) -> str:
        return self._pad(node, x, pads, "constant", value)

    def _upsample_nearest2d(self, node: Node, x: Node, size: Any, factors: Any) -> str:
        shape, before = node.meta["val"].shape, x.meta["val"].shape
        scales = self.graph.constant(np.array([1, 1, shape[2] / before[2], shape[3] / before[3]], np.float32))
        options = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        return self.graph.op("Resize", self._value(x), "", scales, **options)

    def _avg_pool2d(self, node: Node, x: Node, kernel: Any, stride: Any = None, *rest: Any) -> str:
        if any(np.any(value) for value in rest):
            raise ValueError("the network pools with padding, which the export does not know")
        return self.graph.op("AveragePool", self._value(x), kernel_shape=list(kernel), strides=list(stride or kernel))

    def _arange(self, node: Node, start: int, end: int | None = None, step: int = 1, **_: Any) -> Tensor:
        first, last = (0, start) if end is None else (start, end)
        return torch.arange(first, last, step, dtype=node.meta["val"].dtype)

    def _ones(self, node: Node, size: Any, **_: Any) -> Tensor:
        return torch.ones((), dtype=node.meta["val"].dtype)  # what it is multiplied by has the shape

    def _to(self, node: Node, x: Node, *_: Any, **__: Any) -> Any:
        if x.meta["val"].dtype == node.meta["val"].dtype:
            return self.values[x]
        return self.graph.op("Cast", self._value(x), to=TYPES[node.meta["val"].dtype])

    _to_copy = _to

    def _clone(self, node: Node, x: Node, **_: Any) -> Any:
        return self.values[x]

    _contiguous = _alias = _detach = _clone

    def _dropout(self, node: Node, x: Node, probability: float, training: bool) -> Any:
        assert not training
        return self.values[x]

    def _sym_size(self, *_: Any, **__: Any) -> None:
        return None

    _assert_tensor_metadata = _sym_size
