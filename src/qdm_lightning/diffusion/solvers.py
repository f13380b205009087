"""Samplers as what one batch of images is stepped by. A multistep solver remembers estimates, so each batch has its own."""

from __future__ import annotations

import inspect
import math
import warnings
from itertools import pairwise
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from qdm_lightning.base.checks import one_line
from qdm_lightning.diffusion.process import alphas_cumprod, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig, check_variance


class Solver:
    """Steps one batch of images from noise to images. `copy.deepcopy` gives one that goes on from the same state.

    Attributes:
        timesteps: of the network's calls, never rising; a solver that corrects its steps calls it twice at one timestep.
    """

    timesteps: list[int]

    def start(self, noise: Tensor) -> Tensor:
        """The first state, from standard normal noise (B, C, H, W)."""
        return noise

    def network_input(self, x: Tensor, t: int) -> Tensor:
        """x_t, which the network is given, of the state x."""
        return x

    def step(self, eps: Tensor, t: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The next state from the estimate `eps` at x and t, of 2 C channels where `sampler.variance` is learned.

        Noise comes from each image's own generator.
        """
        raise NotImplementedError


def make_solver(sampler: SamplerConfig, diffusion: DiffusionConfig) -> Solver:
    """A solver for one batch.

    Raises:
        ValueError: more steps than T, or settings that a scheduler of diffusers does not take.
    """
    total = diffusion.num_train_timesteps
    check_variance(sampler.kind, sampler.variance, diffusion.variance_type)
    if sampler.steps > total:
        raise ValueError(
            f"sampler.steps={sampler.steps} is not allowed: it must be at most diffusion.num_train_timesteps={total}"
        )
    if sampler.kind == "diffusers":
        return DiffusersSolver(sampler, diffusion)
    if sampler.kind == "ddpm":
        return AncestralSolver(sampler, diffusion)
    even = sampler.spacing == "uniform" and total % sampler.steps == 0
    return (DDIMSolver if even else UnevenDDIMSolver)(sampler, diffusion)


def spaced_timesteps(sampler: SamplerConfig, diffusion: DiffusionConfig) -> list[int]:
    """Timesteps of DDPM and DDIM, strictly falling, ending at 0.

    `uniform`: floor(i T / steps), i = 0..steps-1. `quadratic`: floor of the squares of `steps` numbers evenly spaced over
    [0, sqrt(0.8 T)] (DDIM, arXiv 2010.02502, appendix D.2); numbers that fall together are called once, so that 100 steps
    at T = 1000 are 96 calls.
    """
    steps, total = sampler.steps, diffusion.num_train_timesteps
    if sampler.spacing == "uniform":
        return [i * total // steps for i in reversed(range(steps))]
    spacing = math.sqrt(0.8 * total) / max(steps - 1, 1)
    return sorted({min(int((spacing * i) ** 2), total - 1) for i in range(steps)}, reverse=True)


class AncestralSolver(Solver):
    """DDPM's ancestral sampling, by diffusers' scheduler."""

    def __init__(self, sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
        self.timesteps = spaced_timesteps(sampler, diffusion)
        self.scheduler = noise_scheduler(diffusion, variance_type=sampler.variance, clip_sample=sampler.clip_sample)
        self.scheduler.set_timesteps(timesteps=self.timesteps)

    def step(self, eps: Tensor, t: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        after: Tensor = self.scheduler.step(eps, t, x, generator=generators).prev_sample
        return after


class DDIMSolver(Solver):
    """DDIM over even timesteps, by diffusers' scheduler."""

    def __init__(self, sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
        self.timesteps = spaced_timesteps(sampler, diffusion)
        self.scheduler = DDIMScheduler.from_config(
            noise_scheduler(diffusion).config,
            clip_sample=sampler.clip_sample,
            set_alpha_to_one=True,
            timestep_spacing="leading",
        )
        self.scheduler.set_timesteps(sampler.steps)
        self.options = {"eta": sampler.eta, "use_clipped_model_output": sampler.clip_sample}

    def step(self, eps: Tensor, t: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        after: Tensor = self.scheduler.step(eps, t, x, generator=generators, **self.options).prev_sample
        return after


class UnevenDDIMSolver(Solver):
    """DDIM over uneven timesteps, which diffusers' scheduler cannot step."""

    def __init__(self, sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
        self.timesteps = spaced_timesteps(sampler, diffusion)
        self.sampler, self.alpha_bars = sampler, alphas_cumprod(diffusion)
        below = {t: self.alpha_bars[lower] for t, lower in pairwise(self.timesteps)}
        self.alpha_bars_below = below | {self.timesteps[-1]: torch.tensor(1.0)}

    def step(self, eps: Tensor, t: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        noise = randn_tensor(x.shape, generators, x.device, x.dtype) if self.sampler.eta else None
        return ddim_step(
            eps,
            x,
            alpha_bar=self.alpha_bars[t],
            alpha_bar_prev=self.alpha_bars_below[t],
            eta=self.sampler.eta,
            clip=self.sampler.clip_sample,
            noise=noise,
        )


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


FIRST_IS_NOISE = 0.04
"""The greatest abar at a first timestep before the last of the process: images are started from noise alone."""


class DiffusersSolver(Solver):
    """A scheduler of diffusers, one of `spec.SOLVERS`, over its own timesteps."""

    def __init__(self, sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
        options = dict(sampler.scheduler)
        kind = getattr(diffusers, options.pop("_target_").rpartition(".")[2])
        self.name = kind.__name__
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")  # what a Denoiser estimates is the noise
        schedule = {name: getattr(diffusion, name) for name in names}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of their schedulers about numpy
                self.scheduler = kind(**schedule, **self._clipping(kind, sampler), **self._known(kind, options))
                self.scheduler.set_timesteps(sampler.steps)
        except (ValueError, TypeError, NotImplementedError, ArithmeticError, LookupError, AssertionError) as error:
            raise ValueError(f"sampler.scheduler: {self.name} refuses these settings: {one_line(error)}") from error
        self.timesteps = self._integral(self.scheduler.timesteps, diffusion.num_train_timesteps)
        first, last = self.timesteps[0], diffusion.num_train_timesteps - 1
        if first < last and alphas_cumprod(diffusion)[first] > FIRST_IS_NOISE:
            raise ValueError(
                f"sampler.scheduler: {self.name} would begin at t={first}, where an image is no "
                "noise yet: type sampler.scheduler.timestep_spacing=trailing, or fewer sampler.steps"
            )
        self.own = dict(zip(self.timesteps, self.scheduler.timesteps, strict=True))  # some take nothing but these
        self.draws = "generator" in inspect.signature(kind.step).parameters
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)

    def _known(self, kind: type, options: dict[str, Any]) -> dict[str, Any]:
        """`options`, which must be arguments of the scheduler."""
        names = list(inspect.signature(kind).parameters)
        unknown = next((name for name in options if name not in names), None)
        if unknown is not None:
            raise ValueError(f"{unknown} is none of {', '.join(names)}")
        return options

    def _clipping(self, kind: type, sampler: SamplerConfig) -> dict[str, Any]:
        """How the scheduler says `clip_sample`: thresholding to at most 1 is clipping."""
        names = inspect.signature(kind).parameters
        name = next((name for name in ("thresholding", "clip_sample") if name in names), None)
        if name is None and sampler.clip_sample:
            raise ValueError("it does not clip the predicted x_0, type sampler.clip_sample=false")
        return {} if name is None else {name: sampler.clip_sample}

    def _integral(self, timesteps: Tensor, total: int) -> list[int]:
        found = [float(t) for t in timesteps]
        if any(t != int(t) or not 0 <= t < total for t in found):
            some = next(t for t in found if t != int(t) or not 0 <= t < total)
            raise ValueError(
                f"sampler.scheduler: {self.name} would call the network at t={some:g}, which is no timestep of its process: "
                "type sampler.scheduler.timestep_spacing=trailing, and no other spacing of sigmas"
            )
        if found != sorted(found, reverse=True) or len(set(found)) < 2:
            raise ValueError(f"sampler.scheduler: {self.name} has no falling timesteps at these settings: take other steps")
        return [int(t) for t in found]

    def start(self, noise: Tensor) -> Tensor:
        return noise * self.scheduler.init_noise_sigma

    def network_input(self, x: Tensor, t: int) -> Tensor:
        scaled: Tensor = self.scheduler.scale_model_input(x, self.own[t])
        return scaled

    def step(self, eps: Tensor, t: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        options = {"generator": generators} if self.draws else {}
        after: Tensor = self.scheduler.step(eps, self.own[t], x, **options).prev_sample
        return after
