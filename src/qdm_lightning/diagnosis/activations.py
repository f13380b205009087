"""The first claim: activations oscillate over the timesteps. Their distribution at each t, and on the quantizer's grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qdm_lightning.diffusion.images import to_float
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization.quantizer import ActivationQuantizer, LSQProbability

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
VALUES = 2**17
"""At most so many values of one layer at one timestep are looked at, taken evenly."""

CHOSEN = 6


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
        moments: (mean, deviation) of x and of x / s + z.
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

        `center`: deviation over t of the mean, over the mean deviation. `spread`: largest deviation over the least.
        """
        if not self.moments[which]:
            return None
        mean, deviation = torch.tensor(self.moments[which], dtype=torch.float64).T
        return {
            "center": float(mean.std(correction=0) / deviation.mean()),
            "spread": float(deviation.max() / deviation.min()),
        }


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """Layers whose input can be watched, by name: quantizers of activations, or the float layers of a network without any."""
    quantizers: dict[str, nn.Module] = {n: m for n, m in network.named_modules() if isinstance(m, ActivationQuantizer)}
    found = quantizers or {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {_label(name): module for name, module in found.items()}


def _label(name: str) -> str:
    return name.removeprefix("unet.").removesuffix(".input_quantizer").replace(".processor.", ".")


def choose_layers(layers: Mapping[str, nn.Module], patterns: Sequence[str] | None) -> list[str]:
    """Names that match a pattern; without patterns six: the first attention's query and value, others spread over the network.

    Raises:
        ValueError: a pattern matches nothing.
    """
    if patterns is not None:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                some = ", ".join(list(layers)[:4])
                raise ValueError(f"layers: the pattern {pattern!r} matches no layer: they are named like {some}")
        return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]
    attention = [name for name in layers if name.endswith((".query", ".value"))][:2]
    bits = {name: getattr(module, "bits", 0) for name, module in layers.items()}
    others = [
        name
        for name, module in layers.items()
        if not name.endswith((".query", ".key", ".value"))
        and not isinstance(module, LSQProbability)
        and bits[name] == min(bits.values())  # the network's edges have more
    ]
    wanted = min(CHOSEN - len(attention), len(others))
    picked = [others[round(k * (len(others) - 1) / max(wanted - 1, 1))] for k in range(wanted)]
    return [name for name in layers if name in {*attention, *picked}]


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
    on_step: Callable[[], None] | None = None,
) -> list[Distribution]:
    """Distributions of the inputs of some layers while held-out images are noised to each of `timesteps`.

    Args:
        network: in eval mode, on `device`.
        names: of `layers_of(network)`.
        images: (N, C, H, W) uint8; the noise is the same at each timestep and for each network.
        batch_size: images that go through the network together.
        on_step: called after every timestep.
    """
    layers = layers_of(network)
    watched = {name: _Watch(name, layers[name]) for name in names}
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    scheduler = noise_scheduler(diffusion)
    hooks = [watch.attach(layers[name]) for name, watch in watched.items()]
    try:
        for t in timesteps:
            for x0, eps in zip(images.split(batch_size), noise.split(batch_size), strict=True):
                times = torch.full((len(x0),), t, dtype=torch.int64)
                x = add_noise(scheduler, to_float(x0), eps, times)
                network(x.to(device, memory_format=torch.channels_last), times.to(device))
            for watch in watched.values():
                watch.close(t)
            if on_step is not None:
                on_step()
    finally:
        for hook in hooks:
            hook.remove()
    return [watch.seen for watch in watched.values()]


class _Watch:
    """Gathers what one layer gets at one timestep after the other."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        quantized = isinstance(layer, ActivationQuantizer)
        self.seen = Distribution(name, type(layer).__name__ if quantized else None, None)
        if quantized and _grid_of(layer) is not None:
            self.seen.levels = int(layer.qmax)  # type: ignore[arg-type]
        self.parts: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    def attach(self, layer: nn.Module) -> Any:
        if isinstance(layer, ActivationQuantizer):
            return layer.register_forward_hook(lambda module, args, output: self._see(module, args[0], output))
        return layer.register_forward_pre_hook(lambda module, args: self._see(module, args[0], None))

    def _see(self, layer: nn.Module, x: Tensor, quantized: Tensor | None) -> None:
        grid, place = _grid_of(layer), None
        if isinstance(layer, ActivationQuantizer):
            x = layer.operand(x)
        if grid is not None:
            scale, zero_point = (value.reshape(-1, *[1] * (x.ndim - 1)) for value in grid(x))
            place = x.float() / scale + zero_point
        self.parts.append((_some(x), None if place is None else _some(place), None if quantized is None else _some(quantized)))

    def close(self, t: int) -> None:
        raw, grid, quantized = (
            None if column[0] is None else _some(torch.cat(column)) for column in zip(*self.parts, strict=True)
        )
        self.parts = []
        assert raw is not None
        seen = self.seen
        seen.t.append(t)
        seen.raw.append(_quantiles(raw))
        seen.moments["raw"].append((float(raw.mean()), float(raw.std())))
        if grid is not None:
            seen.grid.append(_quantiles(grid))
            seen.moments["grid"].append((float(grid.mean()), float(grid.std())))
            assert seen.levels is not None
            seen.clipped.append(float(((grid.round() < 0) | (grid.round() > seen.levels)).double().mean()))
        if quantized is not None:
            seen.quantized.append(_quantiles(quantized))
            seen.error.append(float((quantized - raw).square().mean() / raw.var()))


def _grid_of(layer: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """x to scale and zero point, where the quantizer tells them."""
    if hasattr(layer, "grid"):
        return layer.grid  # type: ignore[return-value]
    if isinstance(layer, LSQProbability):
        return lambda x: (layer.scale, layer.zero_point)
    return None


def _some(x: Tensor) -> Tensor:
    """At most `VALUES` of x, evenly taken, float64 on the CPU."""
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // VALUES)].cpu().double()


def _quantiles(values: Tensor) -> list[float]:
    return [float(q) for q in torch.quantile(values, torch.tensor(QUANTILES, dtype=values.dtype))]
