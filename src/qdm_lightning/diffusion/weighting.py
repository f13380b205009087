"""Weights of the student's loss over the timesteps (config group `nem/weighting`): where in t mimicking counts.

A weighting is a callable `weighting(diffusion, propagation) -> (T,)` of positive weights with mean 1; a user's own is named by
`nem.weighting._target_`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qdm_lightning.base.checks import between, positive
from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.spec import DiffusionConfig

Weighting = Callable[[DiffusionConfig, Callable[[], Tensor]], Tensor]
"""`propagation()` measures S(t), (T,), on the teacher with the run's sampler; who does not call it does not wait for it."""


class Uniform:
    """Every timestep counts alike: w(t) = 1, as in the paper."""

    def __call__(self, diffusion: DiffusionConfig, propagation: Callable[[], Tensor]) -> Tensor:
        return torch.ones(diffusion.num_train_timesteps)


class MinSNR:
    """w(t) ~ min(SNR(t), gamma) / SNR(t), SNR = abar / (1 - abar): Min-SNR (arXiv 2303.09556) where noise is predicted.

    Args:
        gamma: ratio of signal to noise above which a timestep counts less; 5 in the paper.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        positive("nem.weighting.gamma", gamma)
        self.gamma = gamma

    def __call__(self, diffusion: DiffusionConfig, propagation: Callable[[], Tensor]) -> Tensor:
        alpha_bar = alphas_cumprod(diffusion).double()
        snr = alpha_bar / (1 - alpha_bar)
        return normalized(snr.clamp(max=self.gamma) / snr)


class Propagation:
    """w(t) ~ S(t)^power, at least `floor` (ours): mimicking serves the errors that reach the image, see `error_propagation`.

    Args:
        power: 1/2 weights the error's root mean square; 0 is `Uniform`.
        floor: least weight, of a mean of 1.
    """

    def __init__(self, power: float = 0.5, floor: float = 0.05) -> None:
        between("nem.weighting.power", power, 0.0, 2.0)
        between("nem.weighting.floor", floor, 0.0, 1.0)
        self.power, self.floor = power, floor

    def __call__(self, diffusion: DiffusionConfig, propagation: Callable[[], Tensor]) -> Tensor:
        weights = normalized(propagation().double() ** self.power)
        return normalized(weights.clamp(min=self.floor))


def normalized(weights: Tensor) -> Tensor:
    """Weights (T,) of mean 1, float32."""
    return (weights / weights.mean()).float()
