import math

import pytest
import torch
from torch import nn

from qdm_lightning.quantization.calibration import MinMax
from qdm_lightning.quantization.observer import Observer
from qdm_lightning.quantization.quantizer import (
    ActivationQuantizer,
    LSQActivation,
    LSQProbability,
    LSQWeight,
    WeightQuantizer,
)
from qdm_lightning.quantization.taq import NormalizedActivation


def record_of(*batches):
    observer = Observer(torch.Generator().manual_seed(0))
    for x in batches:
        observer.add(x)
    return observer


def activation(scale=0.25, zero_point=3.0, bits=4):
    quantizer = LSQActivation(bits=bits)
    quantizer.set_grid(torch.tensor([scale]), torch.tensor([zero_point]))
    return quantizer


def test_activation_is_lsq_plus_with_its_factor():
    """d L / d log s = s g sum(upstream (x_hat - x) / s | q_limit - z), g = 1 / sqrt(N q_max), N of one sample."""
    quantizer = activation()
    x, upstream = torch.randn(5, 7, 6) * 2, torch.randn(5, 7, 6)
    out = quantizer(x)
    out.backward(upstream)
    ratio = x.double() / 0.25
    codes = (ratio.round() + 3).clamp(0, 15)
    torch.testing.assert_close(out.double(), (codes - 3) * 0.25, rtol=1e-6, atol=0)
    inside = (ratio + 3 >= 0) & (ratio + 3 <= 15)
    slope = torch.where(inside, ratio.round() - ratio, codes - 3)
    factor = (42 * 15) ** -0.5
    torch.testing.assert_close(quantizer.log_scale.grad.double(), ((upstream * slope).sum() * factor * 0.25)[None])
    torch.testing.assert_close(quantizer.zero_point.grad.double(), ((~inside * upstream).sum() * -0.25)[None].double())


def test_factor_does_not_depend_on_the_batch():
    x = torch.randn(3, 8, 4)
    gradients = []
    for batch in (x, torch.cat([x, x])):
        quantizer = activation()
        quantizer(batch).square().sum().backward()
        gradients.append(quantizer.log_scale.grad)
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_zero_point_is_an_integer_on_the_grid_whatever_the_parameter():
    for parameter, integer in ((-4.0, 0.0), (2.4, 2.0), (99.0, 15.0)):
        _, zero_point = activation(zero_point=parameter).grid(torch.zeros(2, 3))
        assert zero_point.tolist() == [integer]


def test_weight_has_a_scale_for_each_output_channel():
    weight = torch.randn(6, 4, 3, 3) * torch.logspace(-2, 1, 6).view(-1, 1, 1, 1)
    quantizer = LSQWeight(bits=4, weight=weight)
    quantizer.initialize(weight, MinMax())
    torch.testing.assert_close(
        quantizer.scale.detach(),
        torch.maximum(weight.amax((1, 2, 3)) / 7, weight.amin((1, 2, 3)) / -8),
    )
    upstream = torch.randn_like(weight)
    out = quantizer(weight)
    out.backward(upstream)
    ratio = weight / quantizer.scale.detach().view(-1, 1, 1, 1)
    codes = ratio.round().clamp(-8, 7)
    torch.testing.assert_close(out, codes * quantizer.scale.view(-1, 1, 1, 1))
    slope = torch.where((ratio >= -8) & (ratio <= 7), ratio.round() - ratio, codes)
    expected = (upstream * slope).sum((1, 2, 3)) * (36 * 7) ** -0.5 * quantizer.scale.detach()
    torch.testing.assert_close(quantizer.log_scale.grad, expected, rtol=1e-4, atol=1e-6)


def test_probabilities_have_no_zero_point_to_learn():
    quantizer = LSQProbability(bits=8)
    assert [name for name, _ in quantizer.named_parameters()] == ["log_scale"]
    assert quantizer.scale.item() == pytest.approx(1 / 255)  # before calibration: all of [0, 1]
    quantizer.initialize(record_of(torch.rand(4, 2, 9, 9) * 0.5), MinMax())
    assert quantizer.scale.item() == pytest.approx(0.5 / 255, rel=0.02)
    assert quantizer(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_state_dict_holds_what_is_learned():
    weight = torch.randn(3, 2)
    assert set(LSQWeight(bits=4, weight=weight).state_dict()) == {"log_scale"}
    assert set(LSQActivation(bits=4).state_dict()) == {"log_scale", "zero_point"}
    assert set(LSQProbability(bits=8).state_dict()) == {"log_scale"}


def test_while_recording_inputs_pass_unchanged():
    quantizer = activation()
    x = torch.randn(4, 9)
    quantizer.observer = record_of()
    assert quantizer(x) is x
    assert torch.equal(quantizer.observer.values, x)


@pytest.mark.parametrize(("low", "high"), [(-0.3, 5.0), (0.0, 2.0), (-7.0, 1.0), (1.0, 2.0), (-2.0, -1.0)])
def test_initial_grid_covers_the_data_and_zero(low, high):
    quantizer = LSQActivation(bits=8)
    x = torch.empty(8, 64).uniform_(low, high)
    quantizer.initialize(record_of(x), MinMax())
    scale, zero_point = (t.item() for t in quantizer.grid(x))
    assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=0.05)
    assert (quantizer(x) - x).abs().max() <= scale  # half a step, and as much again for the integer zero point
    assert zero_point == round(zero_point)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_user_derives_from_the_bases(bits):
    class Plain(ActivationQuantizer):
        pass

    class PlainWeight(WeightQuantizer):
        pass

    weight = nn.Parameter(torch.zeros(2, 2))
    assert (Plain(bits=bits).qmin, Plain(bits=bits).qmax) == (0, 2**bits - 1)
    plain = PlainWeight(bits=bits, weight=weight)
    assert (plain.qmin, plain.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    with pytest.raises(NotImplementedError, match=r"Plain must define quantize\(x\)"):
        Plain(bits=bits)(torch.zeros(1))
    with pytest.raises(NotImplementedError, match="Plain must define initialize"):
        Plain(bits=bits).initialize(record_of(), MinMax())
    with pytest.raises(NotImplementedError, match="PlainWeight must define initialize"):
        plain.initialize(weight, MinMax())


class PowersOfTwo:
    """Mixed into a quantizer: its scale is the nearest power of two, straight-through."""

    @property
    def scale(self):
        log2 = self.log_scale / math.log(2)
        return 2 ** (log2 + (log2.round() - log2).detach())


@pytest.mark.parametrize("base", [LSQActivation, LSQProbability, LSQWeight, NormalizedActivation])
def test_a_scale_of_the_users_own_is_the_one_that_is_used(base):
    kind = type("Own", (PowersOfTwo, base), {})
    x = torch.rand(6, 8)
    quantizer = kind(bits=4, weight=x) if base is LSQWeight else kind(bits=4)
    quantizer.log_scale.data.fill_(math.log(0.27))
    step = 0.25 * (quantizer.moments(x)[1][:, None] if base is NormalizedActivation else 1)
    out = quantizer(x)
    out.sum().backward()
    torch.testing.assert_close((out / step).round() * step, out, rtol=1e-6, atol=1e-6)
    assert quantizer.log_scale.grad.abs().sum() > 0
