"""eps(x_t, t) as a plain call, from a diffusers U-Net: an adapter for each kind of estimate."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qdm_lightning.diffusion.process import alphas_cumprod
from qdm_lightning.diffusion.spec import LEARNED, DiffusionConfig
from qdm_lightning.models.spec import check_variance_channels
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


class LearnedVarianceDenoiser(Denoiser):
    """The same of a U-Net with twice the channels out: the noise, then the variance (Nichol and Dhariwal, arXiv 2102.09672).

    The second half v in [-1, 1] says where log sigma^2 lies between its bounds: (v + 1) / 2 log beta_t + (1 - v) / 2 log of the
    posterior's (their eq. 15, with v scaled as their code has it).
    """

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.both(x, t, labels)[:, : x.shape[1]]

    def both(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noise and variance, (B, 2 C, H, W)."""
        return super().forward(x, t, labels)


class WithVariance(nn.Module):
    """What `LearnedVarianceDenoiser.both` estimates, for a sampler that takes it."""

    def __init__(self, network: LearnedVarianceDenoiser) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, 2 C, H, W)."""
        return self.network.both(x, t, labels)


class Guided(nn.Module):
    """Classifier-free guidance of a denoiser: eps = eps_null + w (eps_label - eps_null), two calls (arXiv 2207.12598).

    Args:
        network: trained with dropped labels. Its variance, where it gives one, is the label's.
        null_label: stands for no class.
        scale: w; 1 is the estimate of the label, 0 that of no class.
    """

    def __init__(self, network: nn.Module, null_label: int, scale: float) -> None:
        super().__init__()
        self.network, self.null_label, self.scale = network, null_label, scale

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """As `Denoiser.forward`."""
        channels = x.shape[1]
        free = self.network(x, t, torch.full_like(labels, self.null_label))[:, :channels]
        given = self.network(x, t, labels)
        return torch.cat([free + self.scale * (given[:, :channels] - free), given[:, channels:]], dim=1)


def denoiser(unet: nn.Module, diffusion: DiffusionConfig) -> Denoiser:
    """The adapter for what the network estimates: `diffusion.prediction_type`, `diffusion.variance_type`.

    Raises:
        ValueError: the process says that the network estimates its variance, and it does not, or the other way round.
    """
    check_channels(unet, diffusion)
    if diffusion.variance_type == LEARNED:
        return LearnedVarianceDenoiser(unet, diffusion)
    return (Denoiser if diffusion.prediction_type == "epsilon" else VelocityDenoiser)(unet, diffusion)


def check_channels(unet: nn.Module, diffusion: DiffusionConfig) -> None:
    """Raise ValueError unless the channels of a U-Net are those of `diffusion.variance_type`."""
    config = getattr(unet, "config", None)
    channels, estimated = (getattr(config, name, None) for name in ("in_channels", "out_channels"))
    if channels is not None and estimated is not None:
        check_variance_channels(channels, estimated, diffusion.variance_type)
