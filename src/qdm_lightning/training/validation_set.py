"""A fixed held-out set of (x_0, t, eps): what `val/loss` is measured on, whatever the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qdm_lightning.diffusion.images import to_float

BUCKETS = 10


@dataclass(frozen=True)
class ValidationSet:
    """x0 (N, C, H, W) in [-1, 1], t (N,) spread evenly over all timesteps, eps (N, C, H, W)."""

    x0: Tensor
    t: Tensor
    eps: Tensor
    num_train_timesteps: int

    @classmethod
    def from_images(cls, images: Tensor, num_train_timesteps: int, size: int = 1024, seed: int = 0) -> ValidationSet:
        """From held-out uint8 images (M, C, H, W), repeated as needed; the same for the same images and seed."""
        generator = torch.Generator().manual_seed(seed)
        x0 = to_float(images[torch.arange(size) % len(images)])
        steps = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        t = (steps * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
        order = torch.randperm(size, generator=generator)
        return cls(x0, t[order], torch.randn(x0.shape, generator=generator), num_train_timesteps)

    def batches(self, batch_size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(x0, t, eps) in equal batches; the last may be short."""
        return list(self._batches(batch_size))

    def _batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield from zip(self.x0.split(batch_size), self.t.split(batch_size), self.eps.split(batch_size), strict=True)

    def by_bucket(self, errors: Tensor) -> list[float]:
        """Means of `errors` (N,) over `BUCKETS` equal ranges of t, from t = 0 up."""
        bucket = self.t * BUCKETS // self.num_train_timesteps
        return [float(errors[bucket == b].double().mean()) for b in range(BUCKETS)]
