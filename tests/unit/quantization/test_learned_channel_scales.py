"""Learned scales by input channel: their gradient is autograd's through the grid, and they train with the quantizers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdm_lightning.quantization import MinMax, QuantConfig, calibrate, prepare
from qdm_lightning.training.optimizer import build_optimizer, split_parameters
from qdm_lightning.training.spec import OptimizerConfig


@pytest.fixture
def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 6, 3, groups=2))
    x = torch.randn(5, 3, 6, 6) * torch.tensor([1.0, 4.0, 0.3]).view(3, 1, 1)
    prepare(model, QuantConfig(first_last_bits=4, channel_scales="learned"))
    calibrate(model, lambda: model(x), MinMax())
    with torch.no_grad():
        for layer in (model[0], model[2]):  # no value lies on the very end of its grid, where rounding would decide
            layer.input_quantizer.log_scale -= 0.1
            layer.weight_quantizer.log_scale -= 0.1
    return model, x


def straight_through(x, scale, zero, qmin, qmax):
    """s (round(clip(x / s + z)) - z), whose gradient is 1 between the grid's ends and 0 beyond them, by torch's autograd."""
    held = (x / scale + zero).clamp(qmin, qmax)
    return scale * (held + (held.round() - held).detach() - zero)


def reference(layer, x, log_r):
    quantizer, groups = layer.input_quantizer, layer.groups
    x = straight_through(x * (-log_r).exp().view(-1, 1, 1), *quantizer.grid(x), quantizer.qmin, quantizer.qmax)
    r = log_r.exp().view(groups, -1).repeat_interleave(layer.out_channels // groups, 0)[:, :, None, None]
    quantizer = layer.weight_quantizer
    scale = quantizer.scale.detach().view(-1, 1, 1, 1)
    weight = straight_through(layer.weight.detach() * r, scale, 0, quantizer.qmin, quantizer.qmax)
    return F.conv2d(x, weight, layer.bias.detach(), padding=layer.padding, groups=groups)


@pytest.mark.parametrize("index", [0, 2])
def test_the_gradient_is_that_of_autograd(prepared, index):
    model, x = prepared
    layer = model[index]
    layer.input_quantizer.silu = False  # the SiLU before the second layer is its own here
    x = x if index == 0 else torch.randn(5, 4, 6, 6)
    log_r = layer.log_channel_scale.detach().clone().requires_grad_()
    wanted, found = reference(layer, x, log_r), layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(wanted)
    (wanted * upstream).sum().backward()
    (found * upstream).sum().backward()
    assert log_r.grad.abs().min() > 0
    torch.testing.assert_close(layer.log_channel_scale.grad, log_r.grad, rtol=1e-4, atol=1e-4)


def test_they_train_with_the_quantizers_and_evaluation_uses_them(prepared):
    model, x = prepared
    scales = [model[0].log_channel_scale, model[2].log_channel_scale]
    _, quantizers = split_parameters(model)
    assert {id(s) for s in scales} <= {id(p) for p in quantizers}
    before, start = model.eval()(x).detach(), [s.detach().clone() for s in scales]
    adam = build_optimizer(model.train(), OptimizerConfig(quantizer_lr=0.1, lr=1e-9))
    model(x).square().mean().backward()
    adam.step()
    assert all((s != old).all() for s, old in zip(scales, start, strict=True))
    with torch.no_grad():
        now = model.eval()(x)
        assert not torch.equal(now, before)
        torch.testing.assert_close(now, model.train()(x))
