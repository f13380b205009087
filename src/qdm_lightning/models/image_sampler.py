"""Images by their seeds, drawn with one network: what a run, an evaluation and a diagnosis all do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdm_lightning.diffusion.sampling import sample, timesteps
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.models.denoiser import denoiser
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

    def call_seconds(self) -> float:
        """Seconds of one of those calls, at the batch size: the second of two, as the first one may compile."""
        x = torch.zeros(self.sampler.batch_size, *self.shape, device=self.device)
        t = torch.zeros(len(x), dtype=torch.int64, device=self.device)
        seconds = 0.0
        with torch.no_grad(), cached_weights(self.network):
            for _ in range(2):
                begin = time.perf_counter()
                self.network(x, t).sum().item()  # waits for the device
                seconds = time.perf_counter() - begin
        return seconds

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


def draw_images(
    unet: Any, seeds: Sequence[int], sampler: SamplerConfig | None = None, diffusion: DiffusionConfig | None = None
) -> Tensor:
    """Images of a U-Net in memory, (len(seeds), C, H, W) float32 in [-1, 1] on the CPU; image i depends on its seed alone.

    Args:
        unet: a `UNet2DModel` in eval mode, prepared or not, on any device.
        seeds: one for each image, 0..2^32-1.
        sampler: how; DDIM with 50 steps, 16 images together, where None.
        diffusion: the process that the network was trained on. None: what a student's files say, else DDPM's linear one.

    Raises:
        ValueError: settings that the sampler refuses, or a network in training mode, whose dropout would draw other images.
    """
    if unet.training:
        raise ValueError("the network is in training mode: call eval() before it draws")
    said = getattr(getattr(unet, "hf_quantizer", None), "settings", {}).get("diffusion")
    size = unet.config.sample_size
    diffusion = diffusion or DiffusionConfig(**(said or {}))
    return ImageSampler(
        network=denoiser(unet, diffusion),
        sampler=sampler or SamplerConfig(batch_size=16),
        diffusion=diffusion,
        shape=(unet.config.in_channels, *((size, size) if isinstance(size, int) else size)),
        device=next(iter(unet.state_dict().values())).device,
    ).draw(list(seeds))
