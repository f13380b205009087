"""The validation set: fixed (x_0, t, eps) on which every run measures its errors, over all t and by bucket of t."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdm_lightning.diffusion.images import to_float
from qdm_lightning.diffusion.losses import per_sample_mse
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization.layers import cached_weights

BUCKETS = 10
"""Number of equal ranges of t."""


def spread_timesteps(count: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,) int64 spread evenly over 0..T-1 (one drawn from each of `count` equal ranges), shuffled."""
    position = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    t = (position * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
    return t[torch.randperm(count, generator=generator)]


@dataclass(frozen=True)
class ValidationSet:
    """x0 (N, C, H, W) in [-1, 1], t (N,) spread evenly over all timesteps, eps (N, C, H, W), classes (N,) where there are."""

    x0: Tensor
    t: Tensor
    eps: Tensor
    num_train_timesteps: int
    labels: Tensor | None = None

    @classmethod
    def from_images(
        cls, images: Tensor, num_train_timesteps: int, size: int = 1024, seed: int = 0, labels: Tensor | None = None
    ) -> ValidationSet:
        """From held-out uint8 images (M, C, H, W), repeated as needed, and their classes (M,); the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.arange(size) % len(images)
        x0 = to_float(images[chosen])
        t = spread_timesteps(size, num_train_timesteps, generator)
        eps = torch.randn(x0.shape, generator=generator)
        return cls(x0, t, eps, num_train_timesteps, None if labels is None else labels[chosen])

    def batches(self, batch_size: int) -> list[tuple[Tensor, ...]]:
        """(x0, t, eps), or (x0, t, eps, labels), in equal batches; the last may be short."""
        parts = [self.x0, self.t, self.eps, *([] if self.labels is None else [self.labels])]
        return list(zip(*(part.split(batch_size) for part in parts), strict=True))

    def by_bucket(self, errors: Tensor) -> list[float]:
        """Means of `errors` (N,) over `BUCKETS` equal ranges of t, from t = 0 up."""
        bucket = self.t * BUCKETS // self.num_train_timesteps
        return [float(errors[bucket == b].double().mean()) for b in range(BUCKETS)]


@torch.no_grad()
def nem_error(
    student: Denoiser, teacher: Denoiser, validation_set: ValidationSet, diffusion: DiffusionConfig, batch_size: int
) -> list[float]:
    """L_NeM on the validation set by bucket of t, from t = 0 up; both networks in eval mode on one device."""
    scheduler, device = noise_scheduler(diffusion), next(student.parameters()).device
    errors = []
    with cached_weights(student):
        for x0, t, eps, *labels in validation_set.batches(batch_size):
            x = add_noise(scheduler, x0, eps, t).to(device, memory_format=torch.channels_last)
            given = [value.to(device) for value in (t, *labels)]
            errors.append(per_sample_mse(teacher(x, *given), student(x, *given)).cpu())
    return validation_set.by_bucket(torch.cat(errors))
