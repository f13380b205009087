"""eps(x_t, t) as a plain call, from a diffusers U-Net: an adapter for each kind of estimate."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.spec import DiffusionConfig


class Denoiser(nn.Module):
    """A diffusers `UNet2DModel` that estimates the noise, prepared or not, as `network(x, t) -> eps`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise estimate, (B, C, H, W), of x_t (B, C, H, W) at timesteps t (B,)."""
        return cast(Tensor, self.unet(x, t, return_dict=False)[0])


class VelocityDenoiser(Denoiser):
    """The same of a U-Net that estimates v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho, arXiv 2202.00512).

    eps = sqrt(abar) v + sqrt(1 - abar) x_t, in float32. An error of v counts abar times as much as one of the noise.
    """

    alpha_bars: Tensor

    def __init__(self, unet: nn.Module, diffusion: DiffusionConfig) -> None:
        super().__init__(unet)
        device = next((p.device for p in unet.parameters()), torch.device("cpu"))
        self.register_buffer("alpha_bars", alphas_cumprod(diffusion).to(device), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self.alpha_bars[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * super().forward(x, t).float() + (1 - alpha_bar).sqrt() * x.float()


def denoiser(unet: nn.Module, diffusion: DiffusionConfig) -> Denoiser:
    """The adapter for what the network estimates, `diffusion.prediction_type`."""
    return Denoiser(unet) if diffusion.prediction_type == "epsilon" else VelocityDenoiser(unet, diffusion)
