"""The second claim: quantization error accumulates over the steps. Student against teacher, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_lightning.diffusion.sampling import batch_labels
from qdm_lightning.evaluation.trajectory import follow
from qdm_lightning.models.image_sampler import ImageSampler


@dataclass(frozen=True)
class TrajectoryError:
    """How far the student's trajectories are from the teacher's, at timesteps `t` (S,), falling; lists have S entries.

    Attributes:
        mse, cosine: mean squared error and mean cosine between the states x_t; the first is the common noise.
        noise_mse, noise_cosine: the same between the noise estimates, each along its own trajectory.
        step_mse: error of the student's noise estimate at the teacher's states: that of one step, nothing accumulated.
        image_mse, image_cosine: the same between the finished images.
    """

    t: list[int]
    mse: list[float]
    cosine: list[float]
    noise_mse: list[float]
    noise_cosine: list[float]
    step_mse: list[float]
    image_mse: float
    image_cosine: float


def trajectory_error(
    teacher: ImageSampler, student: ImageSampler, seeds: Sequence[int], points: int, on_step: Callable[[], None] | None = None
) -> TrajectoryError:
    """Follow the images of `seeds` with both networks.

    Args:
        teacher, student: draw with one and the same sampler.
        points: at most so many timesteps are compared, first and last among them.
        on_step: called after every step of either.
    """
    exact, quantized = (follow(image_sampler, seeds, points, on_step) for image_sampler in (teacher, student))
    at_teacher = [_estimates(student, x, t, student.labels(seeds)) for x, t in zip(exact.x, exact.t, strict=True)]
    return TrajectoryError(
        t=exact.t,
        mse=list(map(_mse, exact.x, quantized.x)),
        cosine=list(map(_cosine, exact.x, quantized.x)),
        noise_mse=list(map(_mse, exact.eps, quantized.eps)),
        noise_cosine=list(map(_cosine, exact.eps, quantized.eps)),
        step_mse=list(map(_mse, exact.eps, at_teacher)),
        image_mse=_mse(exact.images, quantized.images),
        image_cosine=_cosine(exact.images, quantized.images),
    )


@torch.no_grad()
def _estimates(image_sampler: ImageSampler, x: Tensor, t: int, labels: Sequence[int] | None) -> Tensor:
    """The network's estimates (N, C, H, W) for given states, in batches of one size, as in sampling."""
    size, device = image_sampler.sampler.batch_size, image_sampler.device
    times = torch.full((size,), t, dtype=torch.int64, device=device)
    padded = torch.cat([x, x[-1:].expand(-len(x) % size, *x.shape[1:])])
    network, parts = image_sampler.estimator, []
    for first, part in zip(range(0, len(x), size), padded.split(size), strict=True):
        estimate = network(part.to(device), times, *batch_labels(labels, first, size, device))
        parts.append(estimate[:, : x.shape[1]].float().cpu())
    return torch.cat(parts)[: len(x)]


def _mse(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean())


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean over the images of the cosine between them."""
    return float(F.cosine_similarity(a.double().flatten(1), b.double().flatten(1), dim=1).mean())
