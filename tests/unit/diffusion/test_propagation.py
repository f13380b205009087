"""How far an error of the noise estimate travels, against the closed form of a linear network."""

import math

import pytest
import torch

from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.propagation import FIRST_SEED, SIZE, at_every_timestep, error_propagation, network_calls
from qdm_lightning.diffusion.sampling import sample, timesteps
from qdm_lightning.diffusion.spec import SOLVERS, DiffusionConfig, SamplerConfig

DIFFUSION = DiffusionConfig(num_train_timesteps=40)
SHAPE, SEEDS = (1, 4, 4), [3, 5, 6]


def linear(x, t):
    """eps = 0.97 x / sqrt(1 - abar): images stay within [-1, 1]."""
    return 0.97 * x / (1 - alphas_cumprod(DIFFUSION)[t]).sqrt()[:, None, None, None]


def expected(sampler, at):
    """The factor from e to the image of `linear`, step by step in double precision, squared."""
    bars, calls, factor = alphas_cumprod(DIFFUSION).double().tolist(), timesteps(sampler, DIFFUSION), 0.0
    for t, lower in zip(calls, [*calls[1:], None], strict=True):
        bar, below = bars[t], 1.0 if lower is None else bars[lower]
        eps = 0.97 * factor / math.sqrt(1 - bar) + (1.0 if t == at else 0.0)
        x0 = (factor - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        factor = math.sqrt(below) * x0 + math.sqrt(1 - below) * eps
    return factor**2


@pytest.mark.parametrize("steps", [10, 7])  # by the scheduler of diffusers, and ours
def test_a_linear_network(steps):
    sampler = SamplerConfig(steps=steps, batch_size=2, clip_sample=False)
    calls = []
    measured = error_propagation(
        linear, sampler, DIFFUSION, shape=SHAPE, seeds=SEEDS, points=5, on_step=lambda: calls.append(1)
    )
    assert list(measured) == sorted(measured, reverse=True)
    assert len(measured) == 5
    assert measured == {t: pytest.approx(expected(sampler, t), rel=1e-3) for t in measured}
    assert len(calls) == network_calls(sampler, DIFFUSION, len(SEEDS), 5)


def test_a_stochastic_sampler_draws_the_same_noise_with_the_error_and_without():
    sampler = SamplerConfig(kind="ddpm", steps=40, batch_size=4)
    measured = error_propagation(lambda x, t: torch.zeros_like(x), sampler, DIFFUSION, shape=SHAPE, seeds=SEEDS, points=3)
    assert max(measured.values()) < 1  # other noise in two images would make it hundreds
    assert measured[0] > 0


def test_every_timestep_lies_between_those_measured():
    s = at_every_timestep({8: 0.01, 4: 1.0, 2: 4.0}, 11)
    assert s[:3].tolist() == [4.0, 4.0, 4.0]
    assert s[8:].tolist() == pytest.approx([0.01] * 3)
    assert float(s[3]) == pytest.approx(2.0)
    assert float(s[6]) == pytest.approx(0.1)
    assert at_every_timestep({5: 0.5}, 3).tolist() == [0.5] * 3


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers under numpy 2
@pytest.mark.parametrize("name", ["dpmsolver", "heun", "eulerancestral"])  # remembers, calls twice, draws and counts in sigma
def test_solvers_of_diffusers_equal_two_runs_of_the_sampler(name):
    """One with the error in the network's own estimate at t, one without."""
    (target,) = (target for target, short in SOLVERS.items() if short == name)
    node, clips = {"_target_": target, "timestep_spacing": "trailing"}, name != "eulerancestral"
    sampler = SamplerConfig(kind="diffusers", steps=4, batch_size=3, clip_sample=clips, scheduler=node)
    drawn = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(FIRST_SEED + seed)) for seed in SEEDS]
    error, options, calls = SIZE * torch.stack(drawn), {"shape": SHAPE, "seeds": SEEDS}, []
    measured = error_propagation(linear, sampler, DIFFUSION, points=9, on_step=lambda: calls.append(1), **options)
    assert list(measured) == [39, 29, 19, 9]
    assert len(calls) == network_calls(sampler, DIFFUSION, len(SEEDS), 9)
    exact = sample(linear, sampler, DIFFUSION, **options)
    for t, found in measured.items():
        perturbed = sample(lambda x, s, t=t: linear(x, s) + error * (int(s[0]) == t), sampler, DIFFUSION, **options)
        squares = (perturbed - exact).double().square().sum() / error.double().square().sum()
        assert found == pytest.approx(float(squares), rel=1e-4, abs=1e-9)
