"""The first claim: activations oscillate over the timesteps. Their distribution at each t, and on the quantizer's grid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qdm_lightning.diffusion.images import to_float
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.sampling import spread
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization.quantizer import ActivationQuantizer

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
VALUES = 2**17
"""At most so many values of one layer at one timestep are looked at, taken evenly."""


@dataclass
class Distribution:
    """One layer's input over the timesteps `t` (S,). Lists have S entries; those about the grid are empty where it is float.

    Attributes:
        levels: last code of the grid, 2^b - 1; None where the layer is float.
        raw: quantiles `QUANTILES` of x.
        grid: quantiles of x / s + z, in levels: what the quantizer rounds, and clips to [0, levels].
        quantized: quantiles of x_hat.
        clipped: share of the values outside the grid.
        error: mean (x_hat - x)^2 over the variance of x.
        moments: (mean, std) of x and of x / s + z.
    """

    layer: str
    quantizer: str | None
    levels: int | None
    t: list[int] = field(default_factory=list)
    raw: list[list[float]] = field(default_factory=list)
    grid: list[list[float]] = field(default_factory=list)
    quantized: list[list[float]] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    moments: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {"raw": [], "grid": []})

    def oscillation(self, which: str) -> dict[str, float] | None:
        """How far `raw` or `grid` values wander over t; None where there is no grid.

        `center`: std over t of the mean, over the mean std. `spread`: largest std over the least.
        """
        if not self.moments[which]:
            return None
        mean, std = torch.tensor(self.moments[which], dtype=torch.float64).T
        return {"center": float(mean.std(correction=0) / std.mean()), "spread": float(std.max() / std.min())}


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """Layers whose input can be watched, by name: quantizers of activations, or the float layers of a network without any."""
    quantizers: dict[str, nn.Module] = {n: m for n, m in network.named_modules() if isinstance(m, ActivationQuantizer)}
    layers = quantizers or {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {
        name.removeprefix("unet.").removesuffix(".input_quantizer").replace(".processor.", "."): module
        for name, module in layers.items()
    }


def choose_layers(layers: Mapping[str, nn.Module], patterns: Sequence[str] | None) -> list[str]:
    """Names that match a pattern; without patterns six: the first attention's query and value, others spread over the network.

    Raises:
        ValueError: a pattern matches nothing.
    """
    if patterns is not None:
        unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in layers)]
        if unmatched:
            some = ", ".join(list(layers)[:4])
            raise ValueError(f"layers: the pattern {unmatched[0]!r} matches no layer: they are named like {some}")
        return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]
    attention = [name for name in layers if name.endswith((".query", ".value"))][:2]
    least = min((getattr(module, "bits", 0) for module in layers.values()), default=0)  # the network's edges have more
    others = [
        name
        for name, module in layers.items()
        if not name.endswith((".query", ".key", ".value", ".probabilities")) and getattr(module, "bits", 0) == least
    ]
    return [name for name in layers if name in {*attention, *spread(others, 6 - len(attention))}]


@torch.no_grad()
def activation_distributions(
    network: Denoiser,
    names: Sequence[str],
    images: Tensor,
    diffusion: DiffusionConfig,
    timesteps: Sequence[int],
    *,
    device: torch.device,
    batch_size: int,
    labels: Tensor | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, Distribution]:
    """Distributions of the inputs of some layers, by layer, while validation images are noised to each of `timesteps`.

    Args:
        network: in eval mode, on `device`.
        names: names of layers, as in `layers_of(network)`.
        images: (N, C, H, W) uint8; the noise is the same at each timestep and for each network.
        batch_size: images that go through the network together.
        labels: classes of the images (N,), where the network takes them.
        on_step: called after every timestep.
    """
    layers = layers_of(network)
    watches = [_Watch(name, layers[name]) for name in names]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    scheduler, parts = noise_scheduler(diffusion), [images, noise, *([] if labels is None else [labels])]
    hooks = [layers[watch.distribution.layer].register_forward_hook(watch) for watch in watches]
    try:
        for t in timesteps:
            for x0, eps, *given in zip(*(part.split(batch_size) for part in parts), strict=True):
                times = torch.full((len(x0),), t, dtype=torch.int64)
                x = add_noise(scheduler, to_float(x0), eps, times)
                network(x.to(device, memory_format=torch.channels_last), times.to(device), *(y.to(device) for y in given))
            for watch in watches:
                watch.close(t)
            on_step()
    finally:
        for hook in hooks:
            hook.remove()
    return {watch.distribution.layer: watch.distribution for watch in watches}


class _Watch:
    """A forward hook that collects what one layer gets, timestep by timestep."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        quantizer = type(layer).__name__ if isinstance(layer, ActivationQuantizer) else None
        self.distribution = Distribution(name, quantizer, int(layer.qmax) if hasattr(layer, "grid") else None)  # type: ignore[arg-type]
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0]
        if isinstance(layer, ActivationQuantizer):
            x = layer.operand(x)
            x = x * args[1] if len(args) > 1 else x  # scales by input channel
            self.parts["quantized"].append(_thinned(output))
        if hasattr(layer, "grid"):
            scale, zero_point = (value.reshape(-1, *[1] * (x.ndim - 1)) for value in layer.grid(x))  # type: ignore[operator]
            self.parts["grid"].append(_thinned(x.float() / scale + zero_point))
        self.parts["raw"].append(_thinned(x))

    def close(self, t: int) -> None:
        """Sum up what came in at t."""
        values = {name: _thinned(torch.cat(parts)) for name, parts in self.parts.items()}
        self.parts.clear()
        self.distribution.t.append(t)
        for name, x in values.items():
            getattr(self.distribution, name).append(_quantiles(x))
            if name in self.distribution.moments:
                self.distribution.moments[name].append((float(x.mean()), float(x.std())))
        if "grid" in values:
            codes = values["grid"].round()
            self.distribution.clipped.append(float(((codes < 0) | (codes > (self.distribution.levels or 0))).double().mean()))
        if "quantized" in values:
            square = (values["quantized"] - values["raw"]).square().mean()
            self.distribution.error.append(float(square / values["raw"].var()))


def _thinned(x: Tensor) -> Tensor:
    """At most `VALUES` of x, evenly taken, float64 on the CPU."""
    return x.reshape(-1)[:: max(1, x.numel() // VALUES)].cpu().double()


def _quantiles(values: Tensor) -> list[float]:
    return [float(q) for q in torch.quantile(values, torch.tensor(QUANTILES, dtype=values.dtype))]
