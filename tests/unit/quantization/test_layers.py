"""The cache of quantized weights: as good as new whatever happens to the weights."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from qdm_lightning.quantization.calibration import MinMax, calibrate
from qdm_lightning.quantization.layers import QuantConv1d, QuantConv2d, QuantLinear
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
    prepare(model, QuantConfig(weight_bits=bits, act_bits=bits), edges=())
    calibrate(model, lambda: model(x), MinMax())
    assert type(model[0]) is kind
    return model, x


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_is_the_float_layer_on_quantized_operands(kind):
    model, x = quantized(kind)
    layer, (_, _, function, options) = model[0], LAYERS[kind]
    expected = function(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias, **options)
    assert torch.equal(model(x), expected)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)  # from the cache


def test_reflection_padding_is_kept():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    x = torch.randn(1, 2, 5, 5)
    prepare(model, QuantConfig(weight_bits=4, act_bits=4), edges=())
    calibrate(model, lambda: model(x), MinMax())
    layer = model[0]
    padded = F.pad(layer.quantized_input(x), (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(model(x), F.conv2d(padded, layer.quantized_weight(), layer.bias))


def count_quantizations(model):
    calls = []
    model[0].weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_weights_are_quantized_once_for_sampling_and_at_every_step_of_training():
    model, x = quantized()
    calls = count_quantizations(model)
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert len(calls) == 1
    for _ in range(3):
        model(x)  # gradients are on
    assert len(calls) == 4
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert len(calls) == 7


def step(model, **options):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, **options)
    model(torch.randn(4, 6)).square().sum().backward()
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 6))  # cached, and then the step
    optimizer.step()


def load(model):
    other, _ = quantized()
    model.load_state_dict(other.state_dict())


def load_through_bytes(model):
    buffer = io.BytesIO()
    torch.save(quantized()[0].state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True), assign=True)


def write_data_and_evaluate(model):
    model[0].weight.data.mul_(-1)
    model.eval()


def write_in_inference_mode(model):
    with torch.inference_mode():
        model[0].weight.mul_(-1)


def replace_data_twice(model):
    for _ in range(2):
        model[0].weight.data = model[0].weight.data * -3


def parametrized(model):
    class Negative(nn.Module):
        def forward(self, weight):
            return -weight

    parametrize.register_parametrization(model[0], "weight", Negative())


CHANGES = {
    "in place": lambda model: model[0].weight.mul_(-1),
    "one number": lambda model: model[0].weight[0, 0].add_(10),
    "by a view": lambda model: model[0].weight.t()[0].add_(10),
    "the scale": lambda model: model[0].weight_quantizer.log_scale.add_(1),
    "initialized anew": lambda model: nn.init.normal_(model[0].weight),
    "fused foreach": lambda model: torch._foreach_mul_(list(model.parameters()), -1.0),
    "replaced": lambda model: setattr(model[0], "weight", nn.Parameter(-model[0].weight)),
    "data replaced": replace_data_twice,
    "data written, then eval": write_data_and_evaluate,
    "inference mode": write_in_inference_mode,
    "adam": step,
    "adam foreach": lambda model: step(model, foreach=True),
    "adam fused": lambda model: step(model, fused=True),
    "load_state_dict": load,
    "load_state_dict, assigned": load_through_bytes,
    "dtype": lambda model: model.double().float(),
    "calibrated anew": lambda model: calibrate(model, lambda: model(torch.randn(4, 6) * 9), MinMax()),
    "parametrized": parametrized,
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_cache_is_never_stale(name):
    model, x = quantized()
    model.eval()
    with torch.no_grad():
        before = model(x)
    with torch.set_grad_enabled(name.startswith("adam")):
        CHANGES[name](model)
    model.eval() if name.startswith("data written") else None
    with torch.no_grad():
        found = model(x)
        layer = model[0]
        expected = F.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)
    assert torch.equal(found, expected)
    if name != "dtype":
        assert not torch.equal(found, before)


def test_weights_passed_for_one_call_are_never_mistaken_for_earlier_ones():
    """Temporary tensors come at the addresses of freed ones, with the same version."""
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(4, 64)
    prepare(model, QuantConfig(weight_bits=4, act_bits=4), edges=())
    calibrate(model, lambda: model(x), MinMax())
    layer = model.eval()[0]
    with torch.no_grad():
        for factor in torch.linspace(-2, 2, 40).tolist():
            weight = layer.weight * factor
            torch.func.functional_call(model, {"0.weight": weight}, (x,))
            expected = layer.weight_quantizer(weight)
            assert torch.equal(layer._cached[1], expected)
            del weight, expected


def test_a_copy_caches_for_itself():
    model, x = quantized()
    model.eval()
    with torch.no_grad():
        before = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), before)
        twin[0].weight.mul_(-1)
        assert not torch.equal(twin(x), before)
        assert torch.equal(model(x), before)


def test_the_cache_is_in_no_checkpoint():
    model, x = quantized()
    with torch.no_grad():
        model.eval()(x)
    assert set(model.state_dict()) == {
        "0.weight",
        "0.bias",
        "0.weight_quantizer.log_scale",
        "0.input_quantizer.log_scale",
        "0.input_quantizer.zero_point",
    }


def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        model, x = quantized()
        expected = model.eval()(x)
        model[0].weight.mul_(-1)
        assert not torch.equal(model(x), expected)


def test_training_after_sampling_has_gradients():
    model, x = quantized()
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())
