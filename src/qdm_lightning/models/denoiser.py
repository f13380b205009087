"""eps(x_t, t) as a plain call, from a diffusers U-Net: an adapter for each kind of estimate."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.models.unet import label_rows


class Denoiser(nn.Module):
    """A diffusers `UNet2DModel` that estimates the noise, prepared or not, as `network(x, t) -> eps`.

    A class-conditional one is `network(x, t, labels)`; without labels it raises ValueError, as diffusers does.

    Attributes:
        classes: how many the U-Net was trained on; None where it takes no labels.
        null_label: what stands for no class, beyond them; None where the U-Net was not trained with dropped labels.
    """

    classes: int | None
    null_label: int | None

    def __init__(self, unet: nn.Module, diffusion: DiffusionConfig | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.label_dropout = 0.0 if diffusion is None else diffusion.label_dropout
        self.classes, self.null_label = label_rows(unet), None
        if self.classes is not None and self.label_dropout:
            self.classes = self.null_label = self.classes - 1

    def drop_labels(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Labels (B,), on the CPU, of which the share `diffusion.label_dropout` is the null label, as in training."""
        if self.null_label is None:
            return labels
        return labels.masked_fill(torch.rand(len(labels), generator=generator) < self.label_dropout, self.null_label)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The noise estimate, (B, C, H, W), of x_t (B, C, H, W) at timesteps t (B,), of classes `labels` (B,)."""
        given = () if labels is None else (labels,)
        return cast(Tensor, self.unet(x, t, *given, return_dict=False)[0])


class VelocityDenoiser(Denoiser):
    """The same of a U-Net that estimates v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho, arXiv 2202.00512).

    eps = sqrt(abar) v + sqrt(1 - abar) x_t, in float32. An error of v counts abar times as much as one of the noise.
    """

    alpha_bars: Tensor

    def __init__(self, unet: nn.Module, diffusion: DiffusionConfig) -> None:
        super().__init__(unet, diffusion)
        device = next((p.device for p in unet.parameters()), torch.device("cpu"))
        self.register_buffer("alpha_bars", alphas_cumprod(diffusion).to(device), persistent=False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        alpha_bar = self.alpha_bars[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * super().forward(x, t, labels).float() + (1 - alpha_bar).sqrt() * x.float()


class Guided(nn.Module):
    """Classifier-free guidance of a denoiser: eps = eps_null + w (eps_label - eps_null), two calls (arXiv 2207.12598).

    Args:
        network: trained with dropped labels.
        scale: w; 1 is the estimate of the label, 0 that of no class.
    """

    def __init__(self, network: Denoiser, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """As `Denoiser.forward`."""
        free = self.network(x, t, torch.full_like(labels, cast(int, self.network.null_label)))
        return cast(Tensor, free + self.scale * (self.network(x, t, labels) - free))


def denoiser(unet: nn.Module, diffusion: DiffusionConfig) -> Denoiser:
    """The adapter for what the network estimates, `diffusion.prediction_type`."""
    kind = Denoiser if diffusion.prediction_type == "epsilon" else VelocityDenoiser
    return kind(unet, diffusion)
