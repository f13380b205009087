"""The second claim: quantization error gathers over the steps. Student against teacher, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_lightning.diffusion.sampling import sample, timesteps
from qdm_lightning.evaluation.sample import spread
from qdm_lightning.models.image_sampler import ImageSampler


@dataclass(frozen=True)
class TrajectoryError:
    """How far the student's trajectories are from the teacher's, at timesteps `t` (S,), falling; lists have S entries.

    Attributes:
        mse, cosine: of the states x_t; the first is the common noise.
        noise_mse, noise_cosine: of the noise estimates along either one's own trajectory.
        step_mse: of the student's noise estimate at the teacher's states: the error of one step, without what gathered.
        image_mse, image_cosine: of the finished images.
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
        teacher, student: of one sampler.
        points: at most so many timesteps are compared, first and last among them.
        on_step: called after every step of either.
    """
    chosen = spread(timesteps(teacher.sampler, teacher.diffusion), points)
    (x, eps, images), (x_q, eps_q, images_q) = (
        _follow(image_sampler, seeds, chosen, on_step) for image_sampler in (teacher, student)
    )
    at_teacher = [_estimates(student, x[t], t) for t in chosen]
    return TrajectoryError(
        t=chosen,
        mse=[_mse(x[t], x_q[t]) for t in chosen],
        cosine=[_cosine(x[t], x_q[t]) for t in chosen],
        noise_mse=[_mse(eps[t], eps_q[t]) for t in chosen],
        noise_cosine=[_cosine(eps[t], eps_q[t]) for t in chosen],
        step_mse=[_mse(eps[t], estimate) for t, estimate in zip(chosen, at_teacher, strict=True)],
        image_mse=_mse(images, images_q),
        image_cosine=_cosine(images, images_q),
    )


def _follow(
    image_sampler: ImageSampler, seeds: Sequence[int], chosen: Sequence[int], on_step: Callable[[], None] | None
) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
    """States and noise estimates (N, C, H, W) at the chosen timesteps, and the images."""
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {t: [] for t in chosen}

    def keep(t: int, x: Tensor, eps: Tensor) -> None:
        if t in kept:
            kept[t].append((x.cpu(), eps.cpu()))

    images = sample(
        image_sampler.network,
        image_sampler.sampler,
        image_sampler.diffusion,
        shape=image_sampler.shape,
        seeds=seeds,
        device=image_sampler.device,
        on_step=on_step,
        on_state=keep,
    )
    x, eps = ({t: torch.cat([pair[k] for pair in pairs]) for t, pairs in kept.items()} for k in (0, 1))
    return x, eps, images


@torch.no_grad()
def _estimates(image_sampler: ImageSampler, x: Tensor, t: int) -> Tensor:
    """The network's estimates (N, C, H, W) for given states; micro-batches of one size, as in sampling."""
    parts = []
    for part in x.split(image_sampler.sampler.batch_size):
        padded = torch.cat([part, part[-1:].expand(image_sampler.sampler.batch_size - len(part), *part.shape[1:])])
        times = torch.full((len(padded),), t, dtype=torch.int64, device=image_sampler.device)
        parts.append(image_sampler.network(padded.to(image_sampler.device), times)[: len(part)].float().cpu())
    return torch.cat(parts)


def _mse(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean())


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean over the images of the cosine between them."""
    return float(F.cosine_similarity(a.double().flatten(1), b.double().flatten(1), dim=1).mean())
