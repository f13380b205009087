"""Where TaQ can help: what a grid for each group of timesteps, or for each sample, gains over one grid for all t.

All are searched for on the activations of the full-precision network, so that it can be asked before anything is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from qdm_lightning.diffusion.images import to_float
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization.calibration import MSESearch, observe, set_channel_scales
from qdm_lightning.quantization.preparation import prepare
from qdm_lightning.quantization.quantizer import ActivationQuantizer
from qdm_lightning.quantization.spec import QuantConfig, TaQNormalize
from qdm_lightning.quantization.summary import text_table
from qdm_lightning.quantization.timestep import current_timesteps

SAMPLES, VALUES = 256, 128
"""Noised images, one at each of as many timesteps spread over the process, and values that are kept of each."""

SEARCH = MSESearch(steps=8)
"""For the grids: coarser than calibration's, which makes some 0.01 dB."""


@dataclass(frozen=True)
class Gain:
    """Of one quantized activation, or the mean over those of a kind.

    Attributes:
        name: of the layer or attention's operand, as TaQ's scope takes it; or the kind.
        count: how many it stands for.
        bits: of its grid.
        one: signal to quantization noise by one grid for all t, dB.
        groups, normalize: what is gained by a grid for each group of t (`taq=scale`), by the sample's own moments
            (`taq=normalize`), dB.
        most: the greatest gain by groups among those it stands for.
    """

    name: str
    count: int
    bits: int
    one: float
    groups: float
    normalize: float
    most: float

    columns: ClassVar[tuple[str, ...]] = ("input of", "layers", "bits", "one grid dB", "groups of t", "up to", "own moments")

    def row(self) -> list[Any]:
        """As `columns`."""
        return [self.name, self.count, self.bits, self.one, self.groups, self.most, self.normalize]


@dataclass
class _Rows:
    """Some values of each sample, its moments (those of `taq=normalize`) and its timestep."""

    generator: torch.Generator
    parts: list[tuple[Tensor, ...]] = field(default_factory=list)

    @torch.no_grad()
    def see(self, quantizer: Any, x: Tensor) -> None:
        rows = x.detach().flatten(1).float()
        mean, std = rows.mean(1), (rows.var(1, correction=0) + TaQNormalize.psi).sqrt()
        if quantizer.symmetric:
            mean, std = torch.zeros_like(mean), rows.amax(1).clamp(min=TaQNormalize.psi)
        if rows.shape[1] > VALUES:
            rows = rows[:, torch.randint(rows.shape[1], (VALUES,), generator=self.generator).to(rows.device)]
        times = current_timesteps(len(rows))
        assert times is not None
        self.parts.append(tuple(part.cpu() for part in (rows, mean, std, times)))


@torch.no_grad()
def grid_gains(
    network: Denoiser,
    quant: QuantConfig,
    images: Tensor,
    diffusion: DiffusionConfig,
    *,
    device: torch.device,
    batch_size: int,
    groups: int,
    labels: Tensor | None = None,
) -> list[Gain]:
    """What each quantized activation of a network would gain, in order of registration.

    Args:
        network: the full-precision network, in eval mode, on `device`; it is left as it is.
        quant: the bits to ask for.
        images: (N, C, H, W) uint8, noised with the same noise in every call.
        groups: of timesteps.
        labels: classes of the images (N,), where the network takes them.
    """
    model = copy.deepcopy(network.unet)
    prepare(model, quant)
    prepared = Denoiser(model).eval()
    total, scheduler = diffusion.num_train_timesteps, noise_scheduler(diffusion)
    t = torch.arange(SAMPLES) * total // SAMPLES
    noise = torch.randn((SAMPLES, *images.shape[1:]), generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(SAMPLES) % len(images)
    x = add_noise(scheduler, to_float(images[chosen]), noise, t)
    inputs = [x, t, *([] if labels is None else [labels[chosen]])]

    def run() -> None:
        for part, *given in zip(*(values.split(batch_size) for values in inputs), strict=True):
            prepared(part.to(device, memory_format=torch.channels_last), *(values.to(device) for values in given))

    quantizers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    rows = {name: _Rows(torch.Generator().manual_seed(0)) for name in quantizers}
    set_channel_scales(model, run)
    observe(model, rows, run)
    return [_gain(name, quantizers[name], seen, groups, total) for name, seen in rows.items()]


def _gain(name: str, quantizer: Any, seen: _Rows, groups: int, total: int) -> Gain:
    x, mean, std, t = (torch.cat(parts) for parts in zip(*seen.parts, strict=True))
    mean, std, group = mean[:, None], std[:, None], t * groups // total
    present = group.unique()
    pools = [x[group == g].flatten() for g in present]
    width = max(len(pool) for pool in pools)
    equal = torch.stack([pool.repeat(-(-width // len(pool)))[:width] for pool in pools])

    def search(values: Tensor) -> tuple[Tensor, Tensor]:
        return SEARCH.search(values, quantizer.qmin, quantizer.qmax, symmetric=quantizer.symmetric)

    def noise(scale: Tensor, zero: Tensor) -> float:
        """Mean squared error by grids (1,) or (R, 1)."""
        codes = (torch.round(x / scale) + zero).clamp(quantizer.qmin, quantizer.qmax)
        return float(((codes - zero) * scale - x).double().square().mean())

    place = torch.searchsorted(present, group)
    one = noise(*search(x.reshape(1, -1)))
    by_group = noise(*(values[place][:, None] for values in search(equal)))
    scale, zero = search(((x - mean) / std).reshape(1, -1))
    own = scale * std
    shifted = zero if quantizer.symmetric else torch.round(zero - mean / own)
    if quantizer.padded:
        shifted = shifted.clamp(quantizer.qmin, quantizer.qmax)
    by_sample = noise(own, shifted)
    signal, groups_gain = float(x.double().square().mean()), _decibels(one, by_group)
    label = name.removesuffix(".input_quantizer").replace(".processor.", ".")
    return Gain(label, 1, quantizer.bits, _decibels(signal, one), groups_gain, _decibels(one, by_sample), groups_gain)


def _decibels(more: float, less: float) -> float:
    tiny = torch.finfo(torch.float64).tiny
    return float(10 * torch.log10(torch.tensor(max(more, tiny) / max(less, tiny), dtype=torch.float64)))


def kind(name: str) -> str:
    """What an activation is the input of, whichever block it stands in.

    >>> kind("down_blocks.0.downsamplers.0.conv"), kind("mid_block.attentions.0.to_out.0")
    ('downsampler', 'to_out')
    """
    words = [word for word in name.split(".") if not word.isdigit()]
    return words[-2].removesuffix("s") if words[-1] == "conv" and len(words) > 1 else words[-1] if words else name


def by_kind(gains: Sequence[Gain]) -> list[Gain]:
    """Means over the layers of a kind and width, the greatest gain by groups first."""
    found: dict[tuple[str, int], list[Gain]] = {}
    for gain in gains:
        found.setdefault((kind(gain.name), gain.bits), []).append(gain)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    means = [
        Gain(
            name=name,
            count=len(own),
            bits=bits,
            one=mean([g.one for g in own]),
            groups=mean([g.groups for g in own]),
            normalize=mean([g.normalize for g in own]),
            most=max(g.groups for g in own),
        )
        for (name, bits), own in found.items()
    ]
    return sorted(means, key=lambda gain: -gain.groups)


def table(gains: Sequence[Gain]) -> str:
    """`by_kind` as columns of text."""
    lines = [[str(v) if isinstance(v, str | int) else f"{v:+.2f}" for v in gain.row()] for gain in by_kind(gains)]
    return text_table([Gain.columns, *lines], left=1)
