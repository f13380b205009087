"""eps(x_t, t) as a plain call, from a diffusers U-Net."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


class Denoiser(nn.Module):
    """A diffusers `UNet2DModel`, prepared or not, as `network(x, t) -> eps`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise estimate, (B, C, H, W), of x_t (B, C, H, W) at timesteps t (B,)."""
        return cast(Tensor, self.unet(x, t, return_dict=False)[0])
