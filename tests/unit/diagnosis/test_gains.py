"""Where TaQ would help, on activations whose oscillation over t is known."""

import math

import pytest
import torch

from qdm_lightning.diagnosis.gains import Gain, _gain, _Rows, by_kind, table
from qdm_lightning.quantization.quantizer import LSQActivation, LSQProbability
from qdm_lightning.quantization.timestep import timesteps

T = torch.arange(0, 1000, 5)


def gain(quantizer, scales, name="conv1.input_quantizer"):
    """Of one activation whose samples are noise times `scales`, (200,)."""
    rows, draw = _Rows(torch.Generator().manual_seed(0)), torch.rand if quantizer.symmetric else torch.randn
    with timesteps(T):
        rows.see(quantizer, draw(len(T), 2, 60, generator=torch.Generator().manual_seed(1)) * scales.view(-1, 1, 1))
    return _gain(name, quantizer, rows, 20, 1000)


@pytest.mark.parametrize("quantizer", [LSQActivation(bits=4), LSQProbability(bits=4)])
def test_what_is_steady_gains_nothing_and_what_oscillates_does(quantizer):
    steady = gain(quantizer, torch.ones(len(T)))
    assert abs(steady.groups) < 0.3
    assert abs(steady.normalize) < 0.3
    slow = gain(quantizer, torch.logspace(0, 2, len(T)))
    # By t and by the sample alike: within a group the scale changes by a quarter.
    assert slow.groups > 3
    assert slow.normalize == pytest.approx(slow.groups, abs=1)
    fast = gain(quantizer, torch.logspace(0, 2, len(T))[torch.randperm(len(T), generator=torch.Generator().manual_seed(2))])
    assert fast.normalize == pytest.approx(slow.normalize, abs=0.5)
    assert fast.groups < fast.normalize - 1  # no group of t knows it


def test_a_kind_is_the_mean_of_its_layers_and_the_greatest_gain_comes_first():
    names = ["down.0.conv1", "up.0.downsamplers.0.conv", "down.1.conv1", "mid.attentions.0.probabilities"]
    gains = [Gain(name, 1, 4, 20.0, value, -value, value) for name, value in zip(names, (1.0, 2.0, 5.0, 4.0), strict=True)]
    kinds = by_kind(gains)
    assert [(kind.name, kind.count, kind.groups, kind.most) for kind in kinds] == [
        ("probabilities", 1, 4.0, 4.0),
        ("conv1", 2, 3.0, 5.0),
        ("downsampler", 1, 2.0, 2.0),
    ]
    assert math.isclose(kinds[1].normalize, -3.0)
    assert [line.split()[0] for line in table(gains).splitlines()] == ["input", "probabilities", "conv1", "downsampler"]
