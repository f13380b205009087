import pytest
import torch
from torch import nn

from qdm_lightning.diagnosis.trajectory_error import trajectory_error
from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.models.image_sampler import ImageSampler

SHAPE = (1, 2, 2)


class Linear(nn.Module):
    """eps(x, t) = factor x + shift: a trajectory that can be written down."""

    def __init__(self, factor, shift=0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x, t):
        return self.factor * x + self.shift


def image_sampler(network, steps=5):
    sampler = SamplerConfig(steps=steps, batch_size=4, clip_sample=False)
    return ImageSampler(network=network, sampler=sampler, diffusion=DiffusionConfig(), shape=SHAPE, device=torch.device("cpu"))


def test_a_network_has_no_error_against_itself():
    same = image_sampler(Linear(0.9))
    error = trajectory_error(same, image_sampler(Linear(0.9)), range(6), points=3)
    assert error.t == [800, 400, 0]
    assert error.mse == error.noise_mse == error.step_mse == [0, 0, 0]
    assert error.cosine == pytest.approx([1, 1, 1])
    assert (error.image_mse, error.image_cosine) == (0, pytest.approx(1))


def test_accumulated_error_and_error_of_one_step_by_hand():
    teacher, student, calls = Linear(0.8), Linear(0.8, shift=0.1), []
    error = trajectory_error(
        image_sampler(teacher, 3), image_sampler(student, 3), [4, 5, 6, 7, 8], points=50, on_step=lambda: calls.append(1)
    )
    alpha_bars = alphas_cumprod(DiffusionConfig()).double()
    x = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)) for s in (4, 5, 6, 7, 8)]).double()
    x_q = x.clone()
    steps = [666, 333, 0]
    assert error.t == steps
    for k, t in enumerate(steps):
        assert error.mse[k] == pytest.approx((x - x_q).square().mean().item(), rel=1e-4, abs=1e-12)
        assert error.step_mse[k] == pytest.approx(0.01, rel=1e-4)
        eps, eps_q = 0.8 * x, 0.8 * x_q + 0.1
        assert error.noise_mse[k] == pytest.approx((eps - eps_q).square().mean().item(), rel=1e-4)
        cosine = ((x * x_q).sum((1, 2, 3)) / (x.flatten(1).norm(dim=1) * x_q.flatten(1).norm(dim=1))).mean().item()
        assert error.cosine[k] == pytest.approx(cosine, rel=1e-5)
        now, after = alpha_bars[t], alpha_bars[steps[k + 1]] if k < 2 else torch.tensor(1.0)
        x, x_q = (
            after.sqrt() * (s - (1 - now).sqrt() * e) / now.sqrt() + (1 - after).sqrt() * e for s, e in ((x, eps), (x_q, eps_q))
        )
    assert error.image_mse == pytest.approx((x.clamp(-1, 1) - x_q.clamp(-1, 1)).square().mean().item(), rel=1e-4)
    assert error.mse[0] == 0
    assert error.noise_mse[2] > 2 * error.step_mse[2]  # it accumulates
    assert len(calls) == 2 * 2 * 3
