"""A spike towards integers: OpenVINO's integer kernels against the simulation, fed the same input codes.

A quantizer becomes `QuantizeLinear -> Clip to the b-bit grid -> DequantizeLinear` in ONNX, a weight int8 codes with a
`DequantizeLinear`. What the graphs below showed on OpenVINO 2026.4.1, a CPU with AVX-512 VNNI, precision hint f32:

* The unsigned grid [0, 2^b - 1] with an integer zero point suits convolutions and linear layers as it is: uint8 codes with
  any zero point run on integer kernels at 8, 4, 3 and 2 bits alike, with symmetric padding and with the downsampler's padding
  on the right and below (codes padded with the zero point), and equal the simulation to 1e-6 of the greatest output.
* A product of two activations runs on integers only if both zero points are 0 in the stored type and the second operand is
  int8. So q, k, v are stored as `code - z` in int8, which holds every grid up to 7 bits for z in [2^b - 128, 128] (TaQ's zero
  points may lie outside the grid here); at 8 bits they are stored as `code - 128` and the rest of the offset becomes two sums
  over rows. Probabilities are uint8 with zero point 0 as they are. No grid has to change for it.
* One step of each static TaQ variant is such a graph of constants. A scale that is an input of the graph runs in float32, so
  that there is one graph a timestep group.
* What runs in float32, with the right result: weights stored as int4, activations stored as uint4, FakeQuantize with 4, 8 or
  64 levels (with 16 and 256 it runs on integers), int8 codes with a zero point other than 0 in a convolution.
"""

from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qdm_lightning.quantization import compiled, functional
from qdm_lightning.quantization.calibration import MSESearch, calibrate
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.quantizer import LSQActivation
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.quantization.taq import EMANormalizedActivation, GroupedActivation
from qdm_lightning.quantization.timestep import timesteps

CORE = ov.Core()
INTEGERS = "INT8" in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
VARIANTS = {
    "off": LSQActivation,
    "ema": partial(EMANormalizedActivation, groups=4),
    "scale": partial(GroupedActivation, groups=4),
}
AT_STEP = torch.tensor(300)


def multiplies_bytes() -> bool:
    """True where the processor adds products of 8-bit codes in 32 bits (VNNI). Without it the sum of two of them saturates at
    16 bits, 255 * 127 * 2 > 32767, and the kernels are exact up to 7 bits."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return True  # not Linux: shown by the test itself
    return any(flag in text for flag in ("avx512_vnni", "avx_vnni", "asimddp"))


SATURATES = pytest.mark.skipif(not multiplies_bytes(), reason="no VNNI: sums of 8-bit products saturate at 16 bits")
BITS = [pytest.param(8, marks=SATURATES), 7, 4, 3, 2]


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compiled.set_mode("off")
    yield
    compiled.set_mode("auto")
    torch.set_num_threads(threads)


class Graph:
    """An ONNX graph from x, and what OpenVINO makes of it."""

    def __init__(self, shape):
        self.shape, self.nodes, self.constants = list(shape), [], []

    def constant(self, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.constants)}"))
        return self.constants[-1].name

    def op(self, kind, *inputs, **attributes):
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def codes(self, x, scale, zero_point, bits, shift=0, dtype=np.uint8):
        """x's codes, stored as code - shift."""
        q = self.op("QuantizeLinear", x, self.constant(np.float32(scale)), self.constant(dtype(zero_point - shift)))
        return q if bits == 8 else self.op("Clip", q, self.constant(dtype(-shift)), self.constant(dtype(2**bits - 1 - shift)))

    def values(self, codes, scale, zero_point, dtype=np.uint8):
        return self.op("DequantizeLinear", codes, self.constant(np.float32(scale)), self.constant(dtype(zero_point)))

    def operand(self, x, scale, zero_point, bits):
        """x as int8 codes with zero point 0, and the constant by which s * code falls short of x_hat."""
        fits = 2**bits - 128 <= zero_point <= 128
        shift = zero_point if fits else 2 ** (bits - 1)
        offset = scale * (shift - zero_point)
        if not -128 <= zero_point - shift <= 127:  # no int8: moved before the rounding
            x, zero_point = self.op("Add", x, self.constant(np.float32(-offset))), shift
        return self.values(self.codes(x, scale, zero_point, bits, shift, np.int8), scale, 0, np.int8), offset

    def weight(self, layer):
        scale = layer.weight_quantizer.scale.detach()
        q = layer.weight_quantizer
        codes = functional.quantize(layer.weight.flatten(1), scale[:, None], torch.zeros(1), q.qmin, q.qmax).view(
            layer.weight.shape
        )
        zeros = self.constant(np.zeros(len(scale), np.int8))
        return self.op(
            "DequantizeLinear", self.constant(codes.numpy().astype(np.int8)), self.constant(scale.numpy()), zeros, axis=0
        )

    def bias(self, layer):
        return self.constant(layer.bias.detach().numpy())

    def compile(self, output):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * len(self.shape))
        graph = helper.make_graph(self.nodes, "spike", [x], [y], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        # Without snippets every product is a node of its own, whose kernel shows.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "SNIPPETS_MODE": "DISABLE"}
        return CORE.compile_model(CORE.read_model(model.SerializeToString()), "CPU", settings)


def kernels_of(compiled, *kinds):
    """Names of the executed kernels of the nodes of these kinds."""
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return [str(node["primitiveType"].value) for node in nodes if node["layerType"].value in kinds]


def assert_integer(compiled, count):
    found = kernels_of(compiled, "Convolution", "FullyConnected", "MatMul")
    assert len(found) == count
    if INTEGERS:
        assert all(name.lower().endswith("i8") for name in found), found


def assert_equal(compiled, x, expected):
    difference = np.abs(compiled(x.numpy())[0] - expected.numpy()).max()
    assert difference <= 1e-6 * expected.abs().max().item()


def prepared(layer, bits, variant, shape, shift=0.0):
    """A layer alone in a model, calibrated over all timesteps, in eval mode."""
    quantizers = Quantizers(activation=VARIANTS[variant], attention=VARIANTS[variant])
    model = nn.Sequential(layer).eval()
    prepare(model, QuantConfig(weight_bits=bits, act_bits=bits), quantizers, first_last=())
    batches = [torch.nn.functional.silu(torch.randn(8, *shape)) + shift for _ in range(2)]

    def run():
        for x in batches:
            with timesteps(torch.arange(0, 1000, 125)):
                model(x)

    calibrate(model, run, MSESearch())
    return model


def constants(quantizer, x):
    """Scale and zero point at the fixed step."""
    with torch.no_grad(), timesteps(AT_STEP):
        scale, zero_point = quantizer.grid(x)
    assert len(scale.unique()) == len(zero_point.unique()) == 1
    return scale[0].item(), int(zero_point[0])


def simulate(model, x):
    with torch.no_grad(), timesteps(AT_STEP):
        return model(x)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", BITS)
def test_padded_convolution(bits, variant):
    torch.manual_seed(bits)
    model = prepared(nn.Conv2d(16, 8, 3, padding=1), bits, variant, (16, 6, 6))
    layer = model[0]
    x = torch.randn(2, 16, 6, 6)
    scale, zero_point = constants(layer.input_quantizer, x)
    with torch.no_grad(), timesteps(AT_STEP):
        x = layer.quantized_input(x)
    graph = Graph(x.shape)
    x_hat = graph.values(graph.codes("x", scale, zero_point, bits), scale, zero_point)
    compiled = graph.compile(graph.op("Conv", x_hat, graph.weight(layer), graph.bias(layer), pads=[1] * 4))
    assert_equal(compiled, x, simulate(model, x))
    assert_integer(compiled, 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", BITS)
def test_downsampler(bits, variant):
    """diffusers pads zeros on the right and below before the convolution; the graph pads the codes with the zero point."""
    torch.manual_seed(bits)
    model = prepared(Downsample2D(16, use_conv=True, padding=0), bits, variant, (16, 6, 6))
    layer = model[0].conv
    x = torch.randn(2, 16, 6, 6)
    scale, zero_point = constants(layer.input_quantizer, x)
    with torch.no_grad(), timesteps(AT_STEP):
        x = layer.quantized_input(x)
    graph = Graph(x.shape)
    codes = graph.codes("x", scale, zero_point, bits)
    pads = graph.constant(np.array([0, 0, 0, 0, 0, 0, 1, 1]))
    padded = graph.op("Pad", codes, pads, graph.constant(np.uint8(zero_point)))
    x_hat = graph.values(padded, scale, zero_point)
    compiled = graph.compile(graph.op("Conv", x_hat, graph.weight(layer), graph.bias(layer), strides=[2, 2]))
    assert_equal(compiled, x, simulate(model, x))
    assert_integer(compiled, 1)


def linear(graph, layer, x, activation):
    scale, zero_point = constants(layer.input_quantizer, activation)
    bits = layer.input_quantizer.bits
    x_hat = graph.values(graph.codes(x, scale, zero_point, bits), scale, zero_point)
    product = graph.op("MatMul", x_hat, graph.op("Transpose", graph.weight(layer), perm=[1, 0]))
    return graph.op("Add", product, graph.bias(layer))


def product(graph, a, a_offset, b, b_offset, inner):
    """(a + a_offset) (b + b_offset) with the product of a and b on integers."""
    y = graph.op("MatMul", a, b)
    for matrix, axis, offset in ((a, -1, b_offset), (b, -2, a_offset)):
        if offset:
            sums = graph.op("ReduceSum", matrix, graph.constant(np.array([axis])), keepdims=1)
            y = graph.op("Add", y, graph.op("Mul", sums, graph.constant(np.float32(offset))))
    return graph.op("Add", y, graph.constant(np.float32(inner * a_offset * b_offset))) if a_offset and b_offset else y


def attention_graph(attention, x, bits):
    """The integer graph of a prepared attention without norm and residual, x (B, N, C)."""
    (batch, length, channels), heads = x.shape, attention.heads
    processor, graph, width = attention.processor, Graph(x.shape), channels // heads
    operands = []
    for layer, quantizer, axes in (
        (attention.to_q, processor.query, [0, 2, 1, 3]),
        (attention.to_k, processor.key, [0, 2, 3, 1]),
        (attention.to_v, processor.value, [0, 2, 1, 3]),
    ):
        y = graph.op("Reshape", linear(graph, layer, "x", x), graph.constant(np.array([batch, length, heads, width])))
        operands.append(graph.operand(graph.op("Transpose", y, perm=axes), *constants(quantizer, x), bits))
    (q, q_offset), (k, k_offset), (v, v_offset) = operands
    scores = graph.op("Mul", product(graph, q, q_offset, k, k_offset, width), graph.constant(np.float32(width**-0.5)))
    scale = processor.probabilities.scale.item()
    probabilities = graph.values(graph.codes(graph.op("Softmax", scores, axis=-1), scale, 0, 8), scale, 0)
    out = graph.op("Transpose", product(graph, probabilities, 0.0, v, v_offset, length), perm=[0, 2, 1, 3])
    out = graph.op("Reshape", out, graph.constant(np.array([batch, length, channels])))
    return graph.compile(linear(graph, attention.to_out[0], out, x))


def nearest_tie(model, x):
    """How near the values that are rounded come to a tie, in steps: nearer than float32's error, either code is right."""
    distances = []

    def look(quantizer, inputs):
        with torch.no_grad():
            y = inputs[0]
            scale, zero = quantizer.grid(y)
            ratio = y / scale.view(-1, *[1] * (y.ndim - 1))
            codes = ratio + zero.view(-1, *[1] * (y.ndim - 1))
            near = ((ratio - ratio.floor()) - 0.5).abs()
            distances.append(near[(codes > quantizer.qmin - 1) & (codes < quantizer.qmax + 1)].min().item())

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if hasattr(m, "observe")]
    simulate(model, x)
    for hook in hooks:
        hook.remove()
    assert len(distances) == 8
    return min(distances)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", BITS)
def test_attention_block(bits, variant):
    """Four linear layers and both products on integers, also where TaQ's zero point lies outside the grid."""
    torch.manual_seed(bits)
    attention = Attention(16, heads=2, dim_head=8, bias=True)
    attention.to_q.bias.data += 2.0  # a mean far from zero
    model = prepared(attention, bits, variant, (8, 16))
    inputs = (torch.nn.functional.silu(torch.randn(1, 8, 16)) for _ in range(100))
    x = next(x for x in inputs if nearest_tie(model, x) > 2e-4)
    if variant == "ema":
        assert constants(attention.processor.query, x)[1] < 0  # zero is not on this grid
    compiled = attention_graph(attention, x, bits)
    assert_equal(compiled, x, simulate(model, x))
    assert_integer(compiled, 6)


def unsigned_operands():
    graph = Graph((1, 8, 8))
    x_hat = graph.values(graph.codes("x", 0.1, 7, 4), 0.1, 7)
    return graph.compile(graph.op("MatMul", x_hat, graph.op("Transpose", x_hat, perm=[0, 2, 1])))


def convolution(weight_type=TensorProto.INT8, dtype=np.uint8, zero_point=7, shift=0):
    graph = Graph((1, 8, 6, 6))
    graph.constants += [
        helper.make_tensor("codes", weight_type, [8, 8, 3, 3], [k % 16 - 8 for k in range(8 * 8 * 9)]),
        helper.make_tensor("zeros", weight_type, [8], [0] * 8),
    ]
    weight = graph.op("DequantizeLinear", "codes", graph.constant(np.full(8, 0.1, np.float32)), "zeros", axis=0)
    codes = graph.codes("x", 0.1, zero_point, 4, shift, dtype)
    return graph.compile(graph.op("Conv", graph.values(codes, 0.1, zero_point - shift, dtype), weight, pads=[1] * 4))


@pytest.mark.skipif(not (INTEGERS and ov.__version__.startswith("2026.4")), reason="what one release of OpenVINO does")
@pytest.mark.parametrize(
    "build",
    [unsigned_operands, partial(convolution, TensorProto.INT4), partial(convolution, dtype=np.int8, shift=8)],
    ids=["product of unsigned codes", "weights as int4", "int8 with a zero point"],
)
def test_float_kernels(build):
    """The reasons for the storage above: these compute the right thing in float32."""
    assert [name[-3:] for name in kernels_of(build(), "Convolution", "MatMul")] == ["f32"]
