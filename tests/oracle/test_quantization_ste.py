"""Fake quantization against torch's learnable operators and brevitas' convolution."""

import pytest
import torch
from brevitas.core.scaling import ScalingImplType
from brevitas.nn import QuantConv2d
from brevitas.quant import Int8WeightPerChannelFloat

from qdm_lightning.quantization import compiled
from qdm_lightning.quantization.functional import fake_quantize


@pytest.fixture(autouse=True)
def _eager():
    torch.manual_seed(0)
    compiled.set_mode("off")
    yield
    compiled.set_mode("auto")


def case(qmin, qmax, rows):
    """Scales are powers of two, so that torch's x * (1 / s) and our x / s are one number."""
    scale = 2.0 ** torch.randint(-6, -1, (rows,))
    zero_point = torch.randint(qmin, qmax + 1, (rows,)).float() if qmin == 0 else torch.zeros(rows)
    x = (torch.rand(rows, 3000) * 1.6 - 0.3) * (qmax - qmin) + qmin - zero_point[:, None]
    return x * scale[:, None], torch.randn(rows, 3000), scale, zero_point


@pytest.mark.parametrize(("qmin", "qmax"), [(0, 3), (0, 15), (0, 255), (-2, 1), (-8, 7), (-128, 127)])
@pytest.mark.parametrize("rows", [1, 5])
def test_torchs_learnable_operator(qmin, qmax, rows):
    """torch decides inside or outside after rounding, LSQ before: upstream is zeroed in the half step where they differ."""
    x, upstream, scale, zero_point = case(qmin, qmax, rows)
    position = x / scale[:, None] + zero_point[:, None]
    outside = (position < qmin) | (position > qmax)
    band = outside & (position > qmin - 0.5) & (position < qmax + 0.5)
    assert 0 < band.float().mean() < 0.4
    upstream = upstream.masked_fill(band, 0.0)

    def gradients(function):
        inputs = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        out = function(*inputs)
        return out, torch.autograd.grad(out, inputs, upstream)

    def operator(x, scale, zero_point):
        if rows == 1:
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, qmin, qmax, 1.0)
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 0, qmin, qmax, 1.0)

    out, found = gradients(lambda x, s, z: fake_quantize(x, s, z, qmin, qmax))
    expected, wanted = gradients(operator)
    assert torch.equal(out, expected)
    assert torch.equal(found[0], wanted[0])
    size = upstream.abs().sum() * qmax
    torch.testing.assert_close(found[1], wanted[1].view(rows), rtol=1e-5, atol=1e-6 * size.item())
    torch.testing.assert_close(found[2], wanted[2].view(rows), rtol=1e-5, atol=1e-6 * size.item())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_brevitas_convolution(bits):
    """A learned scale for each output channel. brevitas learns the threshold s 2^(b-1), not the step s."""
    peer = QuantConv2d(
        6,
        8,
        3,
        padding=1,
        bias=True,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=bits,
        weight_narrow_range=False,
        weight_scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS,
    )
    peer.train()
    with torch.no_grad():
        peer.weight.mul_(torch.logspace(-1, 1, 8).view(-1, 1, 1, 1))
        threshold = peer.weight.abs().amax((1, 2, 3)) * torch.linspace(0.4, 0.9, 8)  # clips some weights of each channel
        peer.quant_weight()  # the first call starts the parameter
        (learned,) = (p for name, p in peer.named_parameters() if "scaling_impl" in name)
        learned.copy_(threshold.view(learned.shape))
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = peer.weight.detach().clone().requires_grad_()
    scale = peer.quant_weight().scale.detach().view(8).clone().requires_grad_()
    torch.testing.assert_close(scale, threshold / -qmin)

    x = torch.randn(3, 6, 7, 7)
    w_hat = fake_quantize(weight, scale, torch.zeros(8), qmin, qmax)
    assert torch.equal(w_hat, peer.quant_weight().value)
    out = torch.nn.functional.conv2d(x, w_hat, peer.bias, padding=1)
    expected = peer(x)
    assert torch.equal(out, expected)

    ratio = (weight / scale.view(-1, 1, 1, 1)).detach()
    beyond = (ratio < qmin) | (ratio > qmax)
    band = beyond & (ratio > qmin - 0.5) & (ratio < qmax + 0.5)
    upstream = torch.randn_like(weight).masked_fill(band, 0.0)
    assert 0 < beyond.float().mean() < 0.9
    ours = torch.autograd.grad(w_hat, (weight, scale), upstream)
    theirs = torch.autograd.grad(peer.quant_weight().value, (peer.weight, learned), upstream)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)  # brevitas multiplies by s and divides by it
    torch.testing.assert_close(ours[1], theirs[1].view(8) * -qmin, rtol=1e-4, atol=1e-4)
