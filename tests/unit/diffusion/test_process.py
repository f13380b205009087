import torch

from qdm_lightning.diffusion.process import add_noise, alphas_cumprod, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig


def test_alphas_cumprod_is_product_of_linear_betas():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(alphas_cumprod(DiffusionConfig()).double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-7)


def test_each_sample_is_noised_at_its_own_timestep():
    config = DiffusionConfig(num_train_timesteps=10)
    x0, eps, t = torch.rand(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 9, 4])
    noisy = add_noise(noise_scheduler(config), x0, eps, t)
    for i in range(3):
        abar = alphas_cumprod(config)[t[i]]
        torch.testing.assert_close(noisy[i], abar.sqrt() * x0[i] + (1 - abar).sqrt() * eps[i])
