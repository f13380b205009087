"""ONNX Runtime's own way to integers: it dequantizes before most products whose result stays float, so these are rewritten."""

from __future__ import annotations

from typing import Any

import numpy as np


def on_integers(model: Any) -> Any:
    """A copy of an exported ONNX model for ONNX Runtime: packed weights as int8, products on integers.

    conv(s (q - z), s_w q_w) = s s_w ConvInteger(q, q_w, z), exact in int32 up to the last factor; MatMulInteger alike.
    """
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    copied = ModelProto()
    copied.CopyFrom(model)
    graph = copied.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}

    def array(name: str) -> np.ndarray:
        result: np.ndarray = numpy_helper.to_array(tensors[name])
        return result

    def add(name: str, value: np.ndarray) -> str:
        if name not in tensors:
            tensors[name] = numpy_helper.from_array(value, name)
        return name

    nodes = []
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in tensors and node.attribute[0].i == TensorProto.INT8:
            add(node.output[0], array(node.input[0]).astype(np.int8))
            continue
        x, w = (makers.get(name) for name in node.input[:2]) if node.op_type in ("Conv", "MatMul") else (None, None)
        if x is None or w is None or {x.op_type, w.op_type} != {"DequantizeLinear"}:
            nodes.append(node)
            continue
        name, kind = node.output[0], f"{node.op_type}Integer"
        scale = array(x.input[1]) * array(w.input[1])
        if node.op_type == "Conv":
            scale = scale.reshape(1, -1, 1, 1)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        nodes += [
            helper.make_node(kind, [x.input[0], w.input[0], x.input[2]], [f"{name}_sums"], f"{name}_sums", **attributes),
            helper.make_node("Cast", [f"{name}_sums"], [f"{name}_float"], f"{name}_float", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_float", add(f"{name}_scale", scale)], [name], name),
        ]
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in used)
    needed = {name for node in graph.node for name in node.input}
    graph.initializer.extend(tensor for name, tensor in tensors.items() if name in needed)
    return copied
