"""Where a value that is not finite (NaN or infinite) first comes out of a network, and at which timesteps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qdm_lightning.base.checks import UserError

SHOWN = 3
"""Timesteps that a message names."""


class NotFiniteError(UserError):
    """A value is NaN or infinite: its message says which, in which layer and at which timesteps."""


@dataclass
class Found:
    """The first module whose output, and the first whose output's gradient, is not finite: name, and rows (B,) bool.

    None where all were finite; rows is None where the output has no axis of the batch (a quantized weight).
    """

    output: tuple[str, Tensor | None] | None = None
    gradient: tuple[str, Tensor | None] | None = None


@contextmanager
def watched(network: nn.Module, batch_size: int) -> Iterator[Found]:
    """Within the block every output of `network`'s modules is looked at, and its gradient where there is one. Slow.

    The innermost module comes first: a layer before the block that holds it.
    """
    found = Found()

    def rows(values: Tensor) -> Tensor | None:
        bad = ~values.detach().isfinite()
        return bad.flatten(1).any(1) if values.ndim > 1 and len(values) == batch_size else None

    def look_back(name: str, gradient: Tensor) -> None:
        if found.gradient is None and not gradient.isfinite().all():
            found.gradient = name, rows(gradient)

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        if not isinstance(values, Tensor) or not values.is_floating_point():
            return
        if found.output is None and not values.isfinite().all():
            found.output = name, rows(values)
        if values.requires_grad:
            values.register_hook(partial(look_back, name))

    handles = [module.register_forward_hook(partial(look, name)) for name, module in network.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def at_timesteps(t: Tensor, rows: Tensor | None = None) -> str:
    """`at timestep 7`, or some and how many more, of the samples (B,) bool in `rows`, or of all.

    >>> at_timesteps(torch.tensor([7, 900, 3, 5, 900]))
    'at timesteps 3, 5, 7 and 1 more'
    >>> at_timesteps(torch.tensor([7, 900]), torch.tensor([False, True]))
    'at timestep 900'
    """
    times = (t if rows is None else t[rows.to(t.device)]).unique().tolist()
    more = f" and {len(times) - SHOWN} more" if len(times) > SHOWN else ""
    return f"at timestep{'s' if len(times) > 1 else ''} {', '.join(map(str, times[:SHOWN]))}{more}"


def explain_estimate(network: Any, x: Tensor, t: Tensor, *labels: Tensor) -> str:
    """Which layer of a network whose estimate at (x, t) is not finite comes first, in words; the pass is made again."""
    layer = ""
    if isinstance(network, nn.Module):
        with watched(network, len(x)) as found, torch.no_grad():
            network(x, t, *labels)
        layer = f", first in {found.output[0]}" if found.output else ", but finite when the pass was made again"
    return f"{layer} {at_timesteps(t)}"
