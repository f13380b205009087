"""Images on their way through the steps of sampling: states, noise estimates, and the images that they predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.sampling import spread, timesteps
from qdm_lightning.diffusion.solvers import predicted_x0
from qdm_lightning.models.image_sampler import ImageSampler


@dataclass(frozen=True)
class Trajectory:
    """N images at S of their steps.

    Attributes:
        t: timesteps (S,), falling.
        x, eps, x0: states, noise estimates and predicted images, each (S, N, C, H, W).
        images: finished images (N, C, H, W).
    """

    t: list[int]
    x: Tensor
    eps: Tensor
    x0: Tensor
    images: Tensor


def follow(
    image_sampler: ImageSampler, seeds: Sequence[int], points: int, on_step: Callable[[], None] | None = None
) -> Trajectory:
    """Draw images and keep what they are at no more than `points` of their steps, the first and the last among them.

    Args:
        on_step: called after every step, as by `ImageSampler.draw`.
    """
    calls = timesteps(image_sampler.sampler, image_sampler.diffusion)
    t = spread(list(dict.fromkeys(calls)), points)
    states: dict[int, list[tuple[Tensor, Tensor]]] = {step: [] for step in t}

    def on_state(step: int, x: Tensor, eps: Tensor) -> None:
        if step in states:
            states[step].append((x.cpu(), eps.cpu()))

    images = image_sampler.draw(seeds, on_step, on_state)
    x, eps = (torch.stack([torch.cat([pair[k] for pair in states[step]]) for step in t]) for k in (0, 1))
    alpha_bars = alphas_cumprod(image_sampler.diffusion)[t].reshape(-1, 1, 1, 1, 1)
    return Trajectory(t, x, eps, predicted_x0(x, eps, alpha_bars, image_sampler.sampler.clip_sample), images)
