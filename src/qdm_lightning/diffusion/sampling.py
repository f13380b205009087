"""The sampling loop: image of seed s is a function of s alone (and of machine, versions, threads and batch size).

Each image has its own CPU generator, which draws its initial noise and the noise of every step. The network always runs on
batches of one size, because a U-Net's float32 result changes with the batch size but not with neighbors or position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from qdm_lightning.base.checks import between
from qdm_lightning.diffusion.finite import NotFiniteError, explain_estimate
from qdm_lightning.diffusion.process import alphas_cumprod, noise_scheduler
from qdm_lightning.diffusion.spec import SEEDS, DiffusionConfig, SamplerConfig

Network = Callable[[Tensor, Tensor], Tensor]
"""network(x, t) -> eps: x and eps (B, C, H, W), t (B,) int64."""

Step = Callable[[Tensor, int, Tensor, list[torch.Generator]], Tensor]
"""step(eps, t, x_t, generators) -> x at the next lower timestep of the list."""


def timesteps(sampler: SamplerConfig, diffusion: DiffusionConfig) -> list[int]:
    """Timesteps at which the network is called, strictly falling, ending at 0.

    `uniform`: floor(i T / steps), i = 0..steps-1. `quadratic`: floor of the squares of `steps` numbers evenly spaced over
    [0, sqrt(0.8 T)] (DDIM, arXiv 2010.02502, appendix D.2); numbers that fall together are called once, so that 100 steps
    at T = 1000 are 96 calls.

    Raises:
        ValueError: more steps than T.
    """
    steps, total = sampler.steps, diffusion.num_train_timesteps
    if steps > total:
        raise ValueError(f"sampler.steps={steps} is not allowed: it must be at most diffusion.num_train_timesteps={total}")
    if sampler.spacing == "uniform":
        return [i * total // steps for i in reversed(range(steps))]
    spacing = math.sqrt(0.8 * total) / max(steps - 1, 1)
    return sorted({min(int((spacing * i) ** 2), total - 1) for i in range(steps)}, reverse=True)


def spread(values: Sequence[Any], points: int) -> list[Any]:
    """At most `points` of `values`, evenly spread, first and last among them.

    >>> spread([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 4)
    [9, 6, 3, 0]
    """
    if len(values) <= points:
        return list(values)
    return [values[round(i * (len(values) - 1) / (points - 1))] for i in range(points)]


def predicted_x0(x: Tensor, eps: Tensor, alpha_bar: Tensor, clip: bool) -> Tensor:
    """x0 = (x - sqrt(1 - abar) eps) / sqrt(abar) (DDIM, eq. 9), clipped to [-1, 1] where `clip`.

    Args:
        x, eps: state at t and noise estimate, (B, C, H, W).
        alpha_bar: scalar at t.
    """
    x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    return x0.clamp(-1, 1) if clip else x0


def ddim_step(
    eps: Tensor, x: Tensor, *, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float, clip: bool, noise: Tensor | None
) -> Tensor:
    """One step of DDIM (eq. 12 and 16) between any two timesteps.

    x0 is `predicted_x0`; where it is clipped, eps follows the clipped x0;
    sigma = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev);
    x_prev = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma^2) eps + sigma noise.

    Args:
        eps, x: noise estimate and state, (B, C, H, W).
        alpha_bar, alpha_bar_prev: scalars at this timestep and at the next lower one (1 after the last).
        noise: standard normal, as `x`; None where eta is 0.
    """
    x0 = predicted_x0(x, eps, alpha_bar, clip)
    if clip:
        eps = (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = eta * variance**0.5
    mean = alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev - sigma**2).clamp(min=0) ** 0.5 * eps
    return mean if noise is None else mean + sigma * noise


def step_function(sampler: SamplerConfig, diffusion: DiffusionConfig) -> Step:
    """The update of `sampler`. Diffusers' schedulers make it, but for DDIM over uneven timesteps, which theirs cannot step."""
    calls = timesteps(sampler, diffusion)
    if sampler.kind == "ddpm":
        ancestral = noise_scheduler(diffusion, variance_type=sampler.variance, clip_sample=sampler.clip_sample)
        ancestral.set_timesteps(timesteps=calls)
        return lambda eps, t, x, generators: ancestral.step(eps, t, x, generator=generators).prev_sample
    if sampler.spacing == "uniform" and diffusion.num_train_timesteps % sampler.steps == 0:
        ddim = DDIMScheduler.from_config(
            noise_scheduler(diffusion).config,
            clip_sample=sampler.clip_sample,
            set_alpha_to_one=True,
            timestep_spacing="leading",
        )
        ddim.set_timesteps(sampler.steps)
        options = {"eta": sampler.eta, "use_clipped_model_output": sampler.clip_sample}
        return lambda eps, t, x, generators: ddim.step(eps, t, x, generator=generators, **options).prev_sample
    return _uneven_ddim(sampler, diffusion, calls)


def _uneven_ddim(sampler: SamplerConfig, diffusion: DiffusionConfig, calls: list[int]) -> Step:
    alpha_bars = alphas_cumprod(diffusion)
    after = {t: alpha_bars[lower] for t, lower in pairwise(calls)} | {calls[-1]: torch.tensor(1.0)}

    def step(eps: Tensor, t: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        noise = randn_tensor(x.shape, generators, x.device, x.dtype) if sampler.eta else None
        return ddim_step(
            eps,
            x,
            alpha_bar=alpha_bars[t],
            alpha_bar_prev=after[t],
            eta=sampler.eta,
            clip=sampler.clip_sample,
            noise=noise,
        )

    return step


def image_seeds(seed: int, count: int, start: int = 0) -> list[int]:
    """Seeds of images `start`..`start + count - 1` of run `seed`, all different; run 0 has 0, 1, 2, ...

    Runs lie 2654435761 (an odd number near 2^32 / golden ratio) apart modulo 2^32, so that small run seeds do not overlap.

    Raises:
        ValueError: a run seed outside 0..2^32-1, or an image beyond the 2^32nd: they would repeat images.
    """
    between("seed", seed, 0, SEEDS - 1)
    between("num_samples", start + count, 0, SEEDS)
    return [(seed * 2654435761 + index) % SEEDS for index in range(start, start + count)]


@torch.no_grad()
def sample(
    network: Network,
    sampler: SamplerConfig,
    diffusion: DiffusionConfig,
    *,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] | None = None,
    on_state: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draw one image for each seed, without gradients.

    Args:
        network: noise estimator on `device`, in eval mode (dropout would break the promise of a seed).
        sampler, diffusion: how; see their docstrings.
        shape: (C, H, W) of an image.
        seeds: one for each image, 0..2^32-1; see `image_seeds`. Any order and any subset gives the same images.
        device: where the network runs; noise is always drawn on the CPU.
        on_step: called after every step of every batch: `batches * len(timesteps(...))` times.
        on_state: called before every step with t, x_t and the estimate (n, C, H, W), of real images only.

    Returns:
        Images in [-1, 1], (len(seeds), C, H, W), float32, on the CPU, in the order of `seeds`.

    Raises:
        NotFiniteError: the network's estimate is NaN or infinite, with timestep and layer.
        ValueError: more steps than T, or a seed outside 0..2^32-1.
    """
    outside = [seed for seed in seeds if not 0 <= seed < SEEDS]
    if outside:
        raise ValueError(f"seed {outside[0]} of an image is not allowed: it must lie in [0, {SEEDS - 1}]")
    step, calls, images = step_function(sampler, diffusion), timesteps(sampler, diffusion), [torch.empty(0, *shape)]
    for first in range(0, len(seeds), sampler.batch_size):
        chunk = list(seeds[first : first + sampler.batch_size])
        padded = chunk + chunk[-1:] * (sampler.batch_size - len(chunk))
        generators = [torch.Generator().manual_seed(seed) for seed in padded]
        x = randn_tensor((len(padded), *shape), generators, torch.device(device), torch.float32)
        for t in calls:
            times = torch.full((len(padded),), t, dtype=torch.int64, device=device)
            eps = network(x, times).float()
            if not eps.isfinite().all():  # clipping x_0 would hide an infinite one
                where = explain_estimate(network, x, times)
                raise NotFiniteError(f"the noise estimate of seeds {chunk[0]} to {chunk[-1]} is not finite{where}: no image")
            if on_state is not None:
                on_state(t, x[: len(chunk)], eps[: len(chunk)])
            x = step(eps, t, x, generators)
            if on_step is not None:
                on_step()
        images.append(x[: len(chunk)].clamp(-1, 1).cpu())
    return torch.cat(images)
