"""The forward process q(x_t | x_0) of DDPM (Ho et al. 2020, arXiv 2006.11239)."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from qdm_lightning.diffusion.spec import DiffusionConfig


def noise_scheduler(config: DiffusionConfig, **overrides: Any) -> DDPMScheduler:
    """Diffusers' scheduler of this process, for `add_noise` and for ancestral sampling.

    Args:
        config: T and the betas.
        overrides: further arguments of `DDPMScheduler`, such as `variance_type`.
    """
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        **overrides,
    )


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), shape (T,), float32, falling from nearly 1 towards 0."""
    return noise_scheduler(config).alphas_cumprod


def add_noise(scheduler: DDPMScheduler, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM, eq. 4).

    Args:
        scheduler: from `noise_scheduler`.
        x0: images in [-1, 1], (B, C, H, W).
        eps: standard normal noise of the same shape.
        t: timesteps 0..T-1, (B,), int64.
    """
    return scheduler.add_noise(x0, eps, t)
