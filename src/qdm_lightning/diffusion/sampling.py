"""The sampling loop: image of seed s is a function of s alone (and of machine, versions, threads and batch size).

Each image has its own CPU generator, which draws its initial noise and the noise of every step. The network always runs on
batches of one size, because a U-Net's float32 result changes with the batch size but not with neighbors or position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from qdm_lightning.base.checks import between
from qdm_lightning.diffusion.finite import NotFiniteError, explain_estimate
from qdm_lightning.diffusion.solvers import make_solver
from qdm_lightning.diffusion.spec import SEEDS, DiffusionConfig, SamplerConfig

Network = Callable[..., Tensor]
"""network(x, t) -> eps, a class-conditional one network(x, t, labels): x, eps (B, C, H, W), t and labels (B,) int64."""


def timesteps(sampler: SamplerConfig, diffusion: DiffusionConfig) -> list[int]:
    """Timesteps at which the network is called, falling; a solver that corrects its steps calls it twice at one.

    Raises:
        ValueError: more steps than T, or settings that a scheduler of diffusers does not take.
    """
    return make_solver(sampler, diffusion).timesteps


def spread(values: Sequence[Any], points: int) -> list[Any]:
    """At most `points` of `values`, evenly spread, first and last among them.

    >>> spread([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 4)
    [9, 6, 3, 0]
    """
    if len(values) <= points:
        return list(values)
    return [values[round(i * (len(values) - 1) / (points - 1))] for i in range(points)]


def image_seeds(seed: int, count: int, start: int = 0) -> list[int]:
    """Seeds of images `start`..`start + count - 1` of run `seed`, all different; run 0 has 0, 1, 2, ...

    Runs lie 2654435761 (an odd number near 2^32 / golden ratio) apart modulo 2^32, so that small run seeds do not overlap.

    Raises:
        ValueError: a run seed outside 0..2^32-1, or an image beyond the 2^32nd: they would repeat images.
    """
    between("seed", seed, 0, SEEDS - 1)
    between("num_samples", start + count, 0, SEEDS)
    return [(seed * 2654435761 + index) % SEEDS for index in range(start, start + count)]


def batch_labels(labels: Sequence[int] | None, first: int, size: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """What a network is given beside x and t: the labels (size,) of images `first` and on, the last repeated; () of None."""
    if labels is None:
        return ()
    own = list(labels[first : first + size])
    return (torch.tensor(own + own[-1:] * (size - len(own)), dtype=torch.int64, device=device),)


@torch.no_grad()
def sample(
    network: Network,
    sampler: SamplerConfig,
    diffusion: DiffusionConfig,
    *,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] | None = None,
    on_state: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draw one image for each seed, without gradients.

    Args:
        network: noise estimator on `device`, in eval mode (dropout would break the promise of a seed). With
            `sampler.variance=learned_range` the channels of the variance come after those of the noise.
        sampler, diffusion: how; see their docstrings.
        shape: (C, H, W) of an image.
        seeds: one for each image, 0..2^32-1; see `image_seeds`. Any order and any subset gives the same images.
        labels: class of each image; None for a network that takes none.
        device: where the network runs; noise is always drawn on the CPU.
        on_step: called after every step of every batch: `batches * len(timesteps(...))` times.
        on_state: called at each timestep with t, x_t and the estimate (n, C, H, W), of real images only; where the network is
            called twice at one t, at the second call, of the corrected state.

    Returns:
        Images in [-1, 1], (len(seeds), C, H, W), float32, on the CPU, in the order of `seeds`.

    Raises:
        NotFiniteError: the network's estimate is NaN or infinite, with timestep and layer.
        ValueError: a sampler that `timesteps` refuses, or a seed outside 0..2^32-1.
    """
    outside = [seed for seed in seeds if not 0 <= seed < SEEDS]
    if outside:
        raise ValueError(f"seed {outside[0]} of an image is not allowed: it must lie in [0, {SEEDS - 1}]")
    calls, images = timesteps(sampler, diffusion), [torch.empty(0, *shape)]
    for first in range(0, len(seeds), sampler.batch_size):
        chunk = list(seeds[first : first + sampler.batch_size])
        padded = chunk + chunk[-1:] * (sampler.batch_size - len(chunk))
        generators = [torch.Generator().manual_seed(seed) for seed in padded]
        classes = batch_labels(labels, first, sampler.batch_size, device)
        solver = make_solver(sampler, diffusion)
        x = solver.start(randn_tensor((len(padded), *shape), generators, torch.device(device), torch.float32))
        for t, after in zip(calls, [*calls[1:], None], strict=True):
            times = torch.full((len(padded),), t, dtype=torch.int64, device=device)
            x_t = solver.network_input(x, t)
            eps = network(x_t, times, *classes).float()
            if not eps.isfinite().all():  # clipping x_0 would hide an infinite one
                where = explain_estimate(network, x_t, times, *classes)
                raise NotFiniteError(f"the noise estimate of seeds {chunk[0]} to {chunk[-1]} is not finite{where}: no image")
            if on_state is not None and t != after:
                on_state(t, x_t[: len(chunk)], eps[: len(chunk), : shape[0]])
            x = solver.step(eps, t, x, generators)
            if on_step is not None:
                on_step()
        images.append(x[: len(chunk)].clamp(-1, 1).cpu())
    return torch.cat(images)
