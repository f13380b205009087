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


def predicted_x0(x: Tensor, eps: Tensor, alpha_bar: Tensor, clip: bool = False) -> Tensor:
    """x0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), the image that an estimate of the noise stands for (DDIM, eq. 9).

    Args:
        x: states x_t, (B, C, H, W).
        eps: estimated noise of the same shape.
        alpha_bar: abar_t, a scalar or of a shape that broadcasts, such as (B, 1, 1, 1).
        clip: clip the image to [-1, 1].
    """
    x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    return x0.clamp(-1, 1) if clip else x0
