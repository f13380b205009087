"""An ONNX graph that grows node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

OPSET, IR_VERSION = 21, 10
"""The first operator set with GroupNormalization as torch computes it and with 4-bit tensors; ONNX Runtime from 1.20 on and
OpenVINO from 2025.0 on read it."""


class Graph:
    """Nodes and constants of one graph; every method that makes a value returns its name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.known: dict[tuple[Any, ...], str] = {}

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node with one output; equal ones are made once, so that what they share is computed once."""
        key = (kind, inputs, repr(sorted(attributes.items())))
        if key not in self.known:
            output = f"{name or kind}_{len(self.nodes)}"
            self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
            self.known[key] = output
        return self.known[key]

    def constant(self, value: Any, *, packed: bool = False) -> str:
        """An array or number as it is; `packed`: int8 codes in [-8, 7] as INT4, two to a byte, the first in the low half."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes(), packed)
        if key not in self.known:
            name = f"constant_{len(self.tensors)}"
            if packed:
                pairs = np.resize(array.astype(np.uint8) & 15, (-(-array.size // 2), 2))  # an odd one out is filled up
                content = (pairs[:, 0] | pairs[:, 1] << 4).tobytes()
                self.tensors[name] = helper.make_tensor(name, TensorProto.INT4, array.shape, content, raw=True)
            else:
                self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            self.known[key] = name
        return self.known[key]

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(np.float32(value))

    def integers(self, *values: int) -> str:
        """A list of int64: shapes, axes."""
        return self.constant(np.array(values, np.int64))

    def model(
        self, inputs: Sequence[Any], outputs: Mapping[str, tuple[str, Sequence[Any]]], metadata: Mapping[str, str]
    ) -> Any:
        """The graph as a model, checked by onnx.

        Args:
            inputs: as onnx describes them.
            outputs: by name, the value that an output is, and its shape (None where it is not known); all are float32.
            metadata: of the model.
        """
        ends = [helper.make_node("Identity", [value], [name], name=name) for name, (value, _) in outputs.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, (_, shape) in outputs.items()]
        graph = helper.make_graph([*self.nodes, *ends], "qdm_lightning", list(inputs), results, list(self.tensors.values()))
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="qdm_lightning")
        helper.set_model_props(model, dict(metadata))
        checker.check_model(model)
        return model
