"""Images by their seeds, drawn with one network: what a run, an evaluation and a diagnosis all do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdm_lightning.diffusion.sampling import sample, timesteps
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.quantization.layers import cached_weights


@dataclass(kw_only=True)
class ImageSampler:
    """Draws images by their seeds.

    Args:
        network: noise estimator in eval mode, on `device`: a `Denoiser`, or a module with the same call.
        sampler, diffusion: settings of the sampler and of the process.
        shape: (C, H, W) of an image.
        device: where the network runs.
    """

    network: Any
    sampler: SamplerConfig
    diffusion: DiffusionConfig
    shape: tuple[int, int, int]
    device: torch.device

    def steps(self, count: int) -> int:
        """Calls of the network for `count` images that are drawn together."""
        return -(-count // self.sampler.batch_size) * len(timesteps(self.sampler, self.diffusion))

    def draw(
        self,
        seeds: Sequence[int],
        on_step: Callable[[], None] | None = None,
        on_state: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Images (len(seeds), C, H, W) float32 in [-1, 1] on the CPU; arguments as in `diffusion.sampling.sample`."""
        with cached_weights(self.network):
            return sample(
                self.network,
                self.sampler,
                self.diffusion,
                shape=self.shape,
                seeds=seeds,
                device=self.device,
                on_step=on_step,
                on_state=on_state,
            )
