"""Why exported files store codes as they do: what OpenVINO 2026.4.1 multiplies in float32, with the right result.

* A convolution or linear layer takes uint8 with any zero point, at 8 bits and fewer.
* A product of two activations runs on integers only if both zero points are 0 in the stored type and the second one is int8.
* A weight of 4 bits is cast to int8 before it is dequantized, for int4 that reaches the DequantizeLinear runs in float32.
* So do activations stored as uint4, and FakeQuantize with 4, 8 or 64 levels (with 16 and 256 it runs on integers).
"""

from functools import partial

import numpy as np
import openvino as ov
import pytest
from onnx import TensorProto, helper

from qdm_lightning.exporting.graph import Graph
from qdm_lightning.runtimes.network import sums_bytes

SIZE = (1, 8, 6, 6)


def kernels(graph, output, shape):
    """Names of the executed kernels of products."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    model = graph.model([x], {"y": (output, [None] * len(shape))}, {})
    core, settings = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "SNIPPETS_MODE": "DISABLE"}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return [str(n["primitiveType"].value).lower()[-3:] for n in nodes if n["layerType"].value in ("Convolution", "MatMul")]


def codes(graph, zero_point, dtype=np.uint8):
    """x on a grid of 8 bits."""
    scale, zero = graph.number(0.1), graph.constant(dtype(zero_point))
    return graph.op("DequantizeLinear", graph.op("QuantizeLinear", "x", scale, zero), scale, zero)


def product(dtype, zero_point):
    graph = Graph()
    x_hat = codes(graph, zero_point, dtype)
    return kernels(graph, graph.op("MatMul", x_hat, graph.op("Transpose", x_hat, perm=[0, 2, 1])), (1, 8, 8))


def convolution(cast=True):
    graph = Graph()
    weight = graph.constant(np.resize(np.arange(-8, 8, dtype=np.int8), (8, 8, 3, 3)), packed=True)
    kind = TensorProto.INT8 if cast else TensorProto.INT4
    weight = graph.op("Cast", weight, to=TensorProto.INT8) if cast else weight
    graph.tensors["zeros"] = helper.make_tensor("zeros", kind, [8], [0] * 8)
    w_hat = graph.op("DequantizeLinear", weight, graph.constant(np.full(8, 0.1, np.float32)), "zeros", axis=0)
    return kernels(graph, graph.op("Conv", codes(graph, 7), w_hat, pads=[1] * 4), SIZE)


@pytest.mark.skipif(not (sums_bytes() and ov.__version__.startswith("2026.4")), reason="what one release of OpenVINO does")
@pytest.mark.parametrize(
    ("build", "kernel"),
    [
        (convolution, "_i8"),
        (partial(convolution, cast=False), "f32"),
        (partial(product, np.int8, 0), "_i8"),
        (partial(product, np.int8, 7), "f32"),
        (partial(product, np.uint8, 0), "f32"),
    ],
    ids=[
        "as exported",
        "weights as int4",
        "product as exported",
        "its zero point",
        "of unsigned codes",
    ],
)
def test_kernels(build, kernel):
    assert build() == [kernel]
