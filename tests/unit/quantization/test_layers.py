"""Layers on quantized operands, and the block in which their weights are quantized once."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdm_lightning.quantization.calibration import MinMax, calibrate
from qdm_lightning.quantization.layers import QuantConv1d, QuantConv2d, QuantLinear, cached_weights
from qdm_lightning.quantization.preparation import prepare
from qdm_lightning.quantization.spec import QuantConfig

LAYERS = {
    QuantLinear: (lambda: nn.Linear(6, 5), (4, 6), F.linear, {}),
    QuantConv1d: (
        lambda: nn.Conv1d(6, 4, 3, padding=2, dilation=2),
        (4, 6, 9),
        F.conv1d,
        {"padding": 2, "dilation": 2},
    ),
    QuantConv2d: (lambda: nn.Conv2d(6, 4, 3, stride=2, groups=2), (4, 6, 9, 9), F.conv2d, {"stride": 2, "groups": 2}),
}


def quantized(kind=QuantLinear, bits=4):
    build, shape, _, _ = LAYERS[kind]
    model, x = nn.Sequential(build()), torch.randn(shape)
    prepare(model, QuantConfig(weight_bits=bits, act_bits=bits), first_last=())
    calibrate(model, lambda: model(x), MinMax())
    assert type(model[0]) is kind
    return model, x


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_is_the_float_layer_on_quantized_operands(kind):
    model, x = quantized(kind)
    layer, (_, _, function, options) = model[0], LAYERS[kind]
    expected = function(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias, **options)
    assert torch.equal(model(x), expected)
    with torch.no_grad(), cached_weights(model.eval()):
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)  # from the cache


def test_reflection_padding_is_kept():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    x = torch.randn(1, 2, 5, 5)
    prepare(model, QuantConfig(weight_bits=4, act_bits=4), first_last=())
    calibrate(model, lambda: model(x), MinMax())
    layer = model[0]
    padded = F.pad(layer.quantized_input(x), (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(model(x), F.conv2d(padded, layer.quantized_weight(), layer.bias))


def count_quantizations(model):
    calls = []
    model[0].weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_weights_are_quantized_once_in_a_block_and_at_every_pass_outside():
    model, x = quantized()
    calls = count_quantizations(model.eval())
    with torch.no_grad():
        model(x), model(x)
        assert len(calls) == 2
        for block in (1, 2):
            with cached_weights(model):
                assert all(torch.equal(model(x), model(x)) for _ in range(3))
            assert len(calls) == 2 + block
        model(x)
    assert len(calls) == 5


def test_the_cache_serves_evaluation_without_gradients_alone():
    model, x = quantized()
    calls = count_quantizations(model.eval())
    with cached_weights(model):
        model(x), model(x)  # gradients are on
        assert len(calls) == 2
        model.train()
        with torch.no_grad():
            model(x), model(x)
        assert len(calls) == 4
        with torch.no_grad():
            model.eval()(x), model(x)
        assert len(calls) == 5
        model(x).sum().backward()
    assert len(calls) == 6
    assert all(p.grad is not None for p in model.parameters())


def test_a_block_in_a_block_uses_the_outer_ones_weights_and_other_models_have_their_own():
    (model, x), (other, _) = quantized(), quantized()
    calls, others = count_quantizations(model.eval()), count_quantizations(other.eval())
    with torch.no_grad(), cached_weights(model):
        model(x)
        with cached_weights(model), cached_weights(other):
            for _ in range(2):
                model(x), other(x)
        model(x), other(x), other(x)
    assert (len(calls), len(others)) == (1, 3)


def test_an_exception_ends_the_block():
    model, x = quantized()
    with torch.no_grad():
        before = model.eval()(x)
        with pytest.raises(KeyError), cached_weights(model):
            {"weights cached": model(x)}["missing"]
        model[0].weight.mul_(-1)
        assert not torch.equal(model(x), before)


CHANGES = {
    "in place": lambda model: model[0].weight.mul_(-1),
    "the scale": lambda model: model[0].weight_quantizer.log_scale.add_(1),
    "data": lambda model: model[0].weight.data.mul_(-1),
    "calibrated anew": lambda model: calibrate(model, lambda: model(torch.randn(4, 6) * 9), MinMax()),
    "load_state_dict": lambda model: model.load_state_dict(quantized()[0].state_dict()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_a_block_is_seen(name):
    model, x = quantized()
    with torch.no_grad():
        with cached_weights(model.eval()):
            before = model(x)
        CHANGES[name](model)
        for context in (nullcontext(), cached_weights(model)):
            with context:
                after, layer = model(x), model[0]
            assert torch.equal(after, F.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias))
            assert not torch.equal(after, before)


def test_calibration_in_a_block_sees_float_weights():
    (model, x), (other, _) = quantized(), quantized()
    other.load_state_dict(model.state_dict())
    calibrate(other, lambda: other(x), MinMax())
    with torch.no_grad(), cached_weights(model.eval()):
        model(x)
        calibrate(model, lambda: model(x), MinMax())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_copy_caches_nothing():
    model, x = quantized()
    with torch.no_grad(), cached_weights(model.eval()):
        before = model(x)
        twin = copy.deepcopy(model)
        twin[0].weight.mul_(-1)
        assert not torch.equal(twin(x), before)
        assert torch.equal(model(x), before)


def test_the_cache_is_in_no_checkpoint():
    model, x = quantized()
    with torch.no_grad(), cached_weights(model.eval()):
        model(x)
        names = set(model.state_dict())
    assert names == {
        "0.weight",
        "0.bias",
        "0.weight_quantizer.log_scale",
        "0.input_quantizer.log_scale",
        "0.input_quantizer.zero_point",
    }
