"""An integer model against the simulation it was made of, layer by layer, on the activations of a pass of the simulation.

Each layer is given the same codes, so that its sums are compared, not what an earlier rounding left. And the codes are compared
that both make of the same activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdm_lightning.integer.attention import IntegerAttention
from qdm_lightning.integer.blocks import IntegerEnd, IntegerResnetBlock, IntegerSampler
from qdm_lightning.integer.encoding import pad, round_to_grid
from qdm_lightning.integer.grids import Grid
from qdm_lightning.integer.layers import IntegerConv2d, IntegerLayer
from qdm_lightning.quantization.layers import QuantizedLayer
from qdm_lightning.quantization.quantizer import ActivationQuantizer
from qdm_lightning.quantization.timestep import current_timesteps, timesteps


@dataclass(frozen=True)
class Comparison:
    """One layer of both models.

    Attributes:
        error: of the outputs from the same codes, the greatest, as a share of the greatest output.
        codes, flipped, farthest: codes that the model made of the same activation, how many differ from the simulation's, and
            by how much at most. An attention has none: its `error` is that of its output from the same q, k, v.
    """

    name: str
    error: float
    codes: int = 0
    flipped: int = 0
    farthest: int = 0


@torch.no_grad()
def verify(simulated: nn.Module, integer: nn.Module, run: Callable[[nn.Module], object]) -> list[Comparison]:
    """Compare the layers of both on what `run(simulated)` passes through it, once.

    Args:
        simulated: prepared model in eval mode.
        integer: what `to_integer(simulated)` gave.
        run: one pass of the model that it is given.

    Returns:
        A comparison for each integer layer and attention, in order of registration.
    """
    calls = _record(simulated, lambda: run(simulated))
    names = {id(m): name for name, m in integer.named_modules()}
    found: list[Comparison] = []
    for name, unit in _units(integer):
        source = name.removesuffix("conv_out") + "conv_norm_out" if isinstance(unit, IntegerEnd) else name
        inputs, _, t = calls[source]
        with _recorded(unit) as made, timesteps(t) if t is not None else nullcontext():
            unit(*inputs)
        found += [
            _compare(_simulated_name(names[id(layer)], integer), layer, codes, grid, calls, t) for layer, codes, grid in made
        ]
        if isinstance(getattr(unit, "processor", None), IntegerAttention):
            found.append(_compare_attention(name, unit, calls))
    return found


def _units(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost modules that make codes themselves."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        fused = isinstance(module, IntegerResnetBlock | IntegerSampler | IntegerEnd | IntegerLayer)
        if id(module) not in inside and (fused or isinstance(getattr(module, "processor", None), IntegerAttention)):
            inside |= {id(child) for child in module.modules()}
            yield name, module


def _simulated_name(name: str, integer: nn.Module) -> str:
    parent = name.rpartition(".")[0]
    return parent if isinstance(integer.get_submodule(parent), IntegerEnd) else name


def _record(model: nn.Module, run: Callable[[], object]) -> dict[str, tuple[Any, Any, Tensor | None]]:
    """Inputs, output and timesteps of each module's last call."""
    calls: dict[str, tuple[Any, Any, Tensor | None]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            x = next((value for value in inputs if isinstance(value, Tensor)), None)
            calls[name] = (inputs, output, None if x is None else current_timesteps(x.shape[0]))

        return record

    wanted = ("ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D", "GroupNorm")
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer | ActivationQuantizer)
        or type(module).__name__ in wanted
        or name.endswith("to_out.0")
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _recorded(unit: nn.Module) -> Iterator[list[tuple[IntegerLayer, Tensor, Grid]]]:
    """What the layers of `unit` are given as codes within the block."""
    made: list[tuple[IntegerLayer, Tensor, Grid]] = []
    layers = [module for module in unit.modules() if isinstance(module, IntegerLayer)]
    for layer in layers:
        own = layer.compute

        def record(
            codes: Tensor, grid: Grid, *args: Any, _layer: IntegerLayer = layer, _own: Any = own, **options: Any
        ) -> Tensor:
            made.append((_layer, codes, grid))
            return _own(codes, grid, *args, **options)

        layer.compute = record  # type: ignore[method-assign]
    try:
        yield made
    finally:
        for layer in layers:
            del layer.compute


def _compare(name: str, layer: IntegerLayer, codes: Tensor, grid: Grid, calls: dict[str, Any], t: Tensor | None) -> Comparison:
    (x,), expected, _ = calls[name]
    operand = layer.grid.operand(x)
    if not layer.grid.static:  # the grid of the simulation's own activation
        grid = layer.grid.at(operand)
    if isinstance(layer, IntegerConv2d):
        rounded = round_to_grid(operand.movedim(1, -1), grid).movedim(-1, 1)
        own = pad(rounded.unsqueeze(2) if layer.flat else rounded, grid, layer.padding)
        below, right = (a - b for a, b in zip(codes.shape[2:], own.shape[2:], strict=True))
        own = pad(own, grid, (0, right, 0, below))  # what the downsampler's block pads itself
    else:
        own = round_to_grid(operand, grid)
    difference = (codes.view(own.shape).int() - own.int()).abs()
    with timesteps(t) if t is not None else nullcontext():
        found = layer.compute(own, grid)
    error = (found.view(expected.shape) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return Comparison(name, float(error), own.numel(), int((difference > 0).sum()), int(difference.max()))


def _compare_attention(name: str, attention: Any, calls: dict[str, Any]) -> Comparison:
    processor: IntegerAttention = attention.processor
    parts = [calls[f"{name}.processor.{part}"][0][0] for part in ("query", "key", "value")]  # (B, heads, N, d)
    expected = calls[f"{name}.to_out.0"][0][0]
    t = calls[f"{name}.processor.query"][2]
    with timesteps(t) if t is not None else nullcontext():
        q, k, v = (part.transpose(1, 2).flatten(2) for part in parts)
        found = processor.attend(q, k, v, attention.heads)
    return Comparison(f"{name}.processor", float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)))
