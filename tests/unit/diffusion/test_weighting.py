"""Weights of the loss over the timesteps."""

import pytest
import torch

from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig
from qdm_lightning.diffusion.weighting import MinSNR, Propagation, Uniform

DIFFUSION = DiffusionConfig()


def unused():
    raise AssertionError("nothing is to be measured")


def test_uniform():
    assert torch.equal(Uniform()(DIFFUSION, unused), torch.ones(1000))


def test_min_snr_is_the_papers_formula_scaled_to_mean_1():
    weights = MinSNR(gamma=5)(DIFFUSION, unused)
    bar = alphas_cumprod(DIFFUSION)
    formula = torch.minimum(bar / (1 - bar), torch.tensor(5.0)) * (1 - bar) / bar
    torch.testing.assert_close(weights / weights[999], formula / formula[999])
    assert float(weights.mean()) == pytest.approx(1)


def test_propagation_is_the_root_of_s_with_a_floor():
    s = torch.full((1000,), 4.0)
    s[:100] = 1e-9
    weights = Propagation()(DIFFUSION, lambda: s)
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[0] / weights[999]) == pytest.approx(0.05 * 0.9, rel=1e-3)
    twice = Propagation(power=1, floor=0)(DIFFUSION, lambda: torch.tensor([1.0, 3.0]))
    assert twice.tolist() == [0.5, 1.5]
    assert Propagation(power=0)(DIFFUSION, lambda: s).unique().tolist() == [1.0]


@pytest.mark.parametrize("make", [lambda: MinSNR(gamma=0), lambda: Propagation(power=-1), lambda: Propagation(floor=2)])
def test_bad_settings(make):
    with pytest.raises(ValueError, match=r"nem\.weighting\."):
        make()


def test_a_weighting_without_mimicking_is_refused():
    with pytest.raises(ValueError, match="type nem=replace"):
        NeMConfig(mode="off", weighting={"_target_": "qdm_lightning.diffusion.weighting.MinSNR"})
    with pytest.raises(ValueError, match="nem/weighting=uniform"):
        NeMConfig(weighting="propagation")
