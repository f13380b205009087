"""The compiled code against tensor operations, exact integers and float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdm_lightning.integer import kernels, native
from qdm_lightning.integer.attention import IntegerAttention
from qdm_lightning.integer.encoding import encode, round_to_grid
from qdm_lightning.integer.grids import Grid, Target
from qdm_lightning.quantization import NormalizedActivation, compiled
from qdm_lightning.quantization.attention import QuantizedAttention
from qdm_lightning.quantization.quantizer import LSQActivation, LSQProbability


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def grid(scale, zero_point, bits):
    return Grid(torch.tensor(scale), torch.tensor(zero_point), 2**bits - 1)


@pytest.fixture
def library():
    compiled.set_mode("on")
    return native.library()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("batch", "parts"), [(3, (8, 12)), (1, (24,)), (2, (20,))])
def test_codes_equal_those_of_tensor_operations(batch, parts, shift):
    torch.set_num_threads(2)  # a batch of 1 is cut into rows
    x = [last(torch.randn(batch, c, 7, 5) * 3 + 1) for c in parts]
    channels = sum(parts)
    norm = nn.GroupNorm(4, channels, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    each = grid([0.05, 0.1, 0.2][:batch], [3.0, 0.0, 9.0][:batch], 4)
    targets = [
        Target(grid([0.02], [100.0], 8), (1, 2, 0, 3), norm=True, silu=True),
        Target(each, (0, 1, 0, 1)),
        Target(each, norm=True),
        Target(grid([0.3], [1.0], 2), (1, 1, 1, 1), silu=True, repeat=2),
    ]
    added = torch.randn(batch, channels) if shift else None
    found = encode(x, targets, norm, added)
    compiled.set_mode("off")
    expected = encode(x, targets, norm, added)
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == torch.uint8
        assert own.is_contiguous(memory_format=torch.channels_last)
        difference = (own.int() - other.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("mode", ["on", "off"])
def test_codes_are_round_x_over_s_plus_z_held_to_the_grid(mode):
    compiled.set_mode(mode)
    x = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 2.5, 3.49, 3.51, 99.0, torch.inf, -torch.inf]])
    assert round_to_grid(x, grid([1.0], [2.0], 3)).tolist() == [[0, 2, 2, 4, 4, 5, 6, 7, 7, 0]]
    assert round_to_grid(x[:, 3:5], grid([1.0], [-300.0], 8)).tolist() == [[0, 0]]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_zeros_need_a_code_where_they_are_padded(mode):
    compiled.set_mode(mode)
    with pytest.raises(ValueError, match=r"zero points -1..-1 lie outside \[0, 255\]"):
        encode([torch.zeros(1, 1, 2, 2)], [Target(grid([1.0], [-1.0], 4), (1, 1, 1, 1))])


def winograd_case(bits, weight_bits, channels=20, outputs=40, extreme=False):
    codes = torch.randint(2**bits, (3, channels, 8, 6))
    weight = torch.randint(-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1), (outputs, channels, 3, 3))
    if extreme:
        codes, weight = torch.full_like(codes, 2**bits - 1), torch.full_like(weight, -(2 ** (weight_bits - 1)))
        codes[0, :, ::2] = 0
        weight[0, :, 1] = 2 ** (weight_bits - 1) - 1
    return codes, weight


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(("bits", "weight_bits"), [(2, 2), (3, 3), (4, 4), (6, 4)])
def test_winograd_is_exact(library, bits, weight_bits, extreme):
    if not native.has_vnni():
        pytest.skip("no AVX-512 VNNI")
    codes, weight = winograd_case(bits, weight_bits, extreme=extreme)
    assert native.WinogradConv.suits(weight, 2**bits - 1)
    own = native.WinogradConv(weight, 2**bits - 1)
    found = own(last(codes.to(torch.uint8)), torch.ones(40), torch.zeros(40), 1.0)
    assert torch.equal(found.double(), F.conv2d(codes.double(), weight.double()))
    scale, bias, residual = torch.rand(40), torch.randn(40), torch.randn(found.shape)
    scaled = own(last(codes.to(torch.uint8)), scale, bias, 0.25, residual)
    expected = found * (scale * 0.25)[:, None, None] + bias[:, None, None] + residual
    torch.testing.assert_close(scaled, expected)


def test_winograd_refuses_what_8_bits_do_not_hold():
    assert not native.WinogradConv.suits(winograd_case(7, 4)[1], 127)
    wide = torch.full((4, 4, 3, 3), 15)
    assert not native.WinogradConv.suits(wide, 15)
    assert native.WinogradConv.suits(torch.full((4, 4, 3, 3), 14), 15)
    assert not native.WinogradConv.suits(torch.ones(4, 6, 3, 3, dtype=torch.int64), 15)
    assert not native.WinogradConv.suits(torch.ones(4, 4, 1, 1, dtype=torch.int64), 15)


def attention(bits, probability_bits, normalized):
    kind = NormalizedActivation if normalized else LSQActivation
    parts = [kind(bits=bits) for _ in range(3)]
    for index, part in enumerate(parts):
        part.set_grid(torch.tensor([(5.0 if normalized else 6.0) / part.qmax]), torch.tensor([part.qmax / 2 + index]))
    probabilities = LSQProbability(bits=probability_bits)
    probabilities.set_grid(torch.tensor([0.4 / probabilities.qmax]), torch.zeros(1))
    return QuantizedAttention(*parts, probabilities)


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("bits", "probability_bits"), [(8, 8), (4, 8), (2, 4)])
@pytest.mark.parametrize(("heads", "queries", "keys", "width"), [(2, 30, 30, 10), (1, 5, 19, 33)])
def test_attention_on_codes_equals_the_simulation(mode, normalized, bits, probability_bits, heads, queries, keys, width):
    compiled.set_mode(mode)
    processor = attention(bits, probability_bits, normalized)
    own = IntegerAttention(processor, heads, width)
    q, k, v = (torch.randn(3, n, heads * width) * 1.5 + 0.5 for n in (queries, keys, keys))
    split = [x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (q, k, v)]
    with torch.no_grad():
        hats = [part(x) for part, x in zip((processor.query, processor.key, processor.value), split, strict=True)]
        expected = processor._attend(*hats, None).transpose(1, 2).flatten(2)
        found = own.attend(q, k, v, heads)
    off = (found - expected).abs() > 1e-5 * expected.abs().max()
    assert off.float().mean() <= 0.05  # a probability on the border of two codes moves a row
    assert (found - expected).abs().max() <= 3 * 0.4 / (2**probability_bits - 1) * expected.abs().max() + 1e-5


def test_a_missing_compiler_leaves_tensor_operations_and_its_reason(monkeypatch):
    native._load.cache_clear()
    monkeypatch.setattr(
        "torch._inductor.codecache.CppCodeCache.load", lambda *_, **__: (_ for _ in ()).throw(OSError("no g++"))
    )
    try:
        compiled.set_mode("auto")
        assert native.library() is None
        assert native.provenance() == {"codes": "eager", "reason": "compiling failed: no g++"}
        assert round_to_grid(torch.ones(1, 4), grid([1.0], [0.0], 4)).tolist() == [[1, 1, 1, 1]]
        compiled.set_mode("on")
        with pytest.raises(RuntimeError, match=r"trainer.compile=on, but compiling failed: no g\+\+"):
            native.library()
    finally:
        native._load.cache_clear()


def test_linear_and_convolution_kernels_are_exact_here():
    if kernels.saturates():
        pytest.skip("no VNNI: 8-bit layers stay float")
    codes, weight = torch.full((2, 300), 255, dtype=torch.uint8), torch.full((5, 300), -128, dtype=torch.int8)
    assert (kernels.linear(codes, kernels.pack_linear(weight), torch.ones(5), None, 1.0) == -255 * 128 * 300).all()
