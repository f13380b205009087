"""What calibration sees of each quantizer's input, a bounded sample, and what chooses a grid for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from qdm_lightning.quantization.timestep import given_timesteps

SAMPLES_PER_ROW = 128
"""Values drawn at random of each sample of a calibration batch. Its least and greatest are kept apart: as two of so few they
would weigh a hundred times what they do in the activation, and widen the range of least squared error."""


class Calibrator(Protocol):
    """Chooses scales and zero points."""

    def search(self, values: Tensor, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Scale and integer zero point, each (R,), for each row of `values` (R, M), on the integer grid [qmin, qmax].

        With `symmetric` the zero point is 0.
        """
        ...


class Watcher(Protocol):
    """What an activation quantizer shows its inputs to, while it lets them pass."""

    def see(self, quantizer: Any, x: Tensor) -> None:
        """x, (B, ...), is about to be quantized by `quantizer`, an `ActivationQuantizer`."""
        ...


@dataclass
class Observer:
    """A bounded sample of one quantizer's inputs over the calibration batches.

    `values` is (rows, SAMPLES_PER_ROW or fewer), one row for each sample that passed; `ends` (rows, 2) its least and greatest
    value; `timesteps` (rows,) or empty where no timestep was given; memory is bounded whatever the size of the activations.
    """

    generator: torch.Generator
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """`values`, `ends` and `timesteps` of one pass each."""

    def see(self, quantizer: Any, x: Tensor) -> None:
        """Keep some of what calibration sees of x."""
        self.add(quantizer.observe(x))

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Keep some values of x, (B, ...)."""
        rows = x.detach().flatten(1)
        ends = torch.stack(torch.aminmax(rows, dim=1), dim=1)
        if rows.shape[1] > SAMPLES_PER_ROW:
            rows = rows[:, torch.randint(rows.shape[1], (SAMPLES_PER_ROW,), generator=self.generator).to(rows.device)]
        times = given_timesteps(x.shape[0])
        self.parts.append(
            (rows.float().cpu(), ends.float().cpu(), torch.empty(0, dtype=torch.int64) if times is None else times.cpu())
        )

    @property
    def values(self) -> Tensor:
        return torch.cat([values for values, _, _ in self.parts])

    @property
    def ends(self) -> Tensor:
        return torch.cat([ends for _, ends, _ in self.parts])

    @property
    def timesteps(self) -> Tensor:
        return torch.cat([times for _, _, times in self.parts])

    def pool(self, chosen: Tensor | None = None) -> Tensor:
        """What a calibrator searches over, (1, M): the values of all rows, or of those in the mask `chosen` (rows,), and once
        the least and the greatest value that passed in them."""
        values, ends = (table if chosen is None else table[chosen] for table in (self.values, self.ends))
        return torch.cat([values.flatten(), ends.min()[None], ends.max()[None]])[None]


@dataclass
class ChannelSquares:
    """Sum of squares of each input channel of a layer, (C,) float64, over what passed; with `axis` None it keeps nothing."""

    axis: int | None = None
    total: Tensor | None = None
    count: int = 0

    @torch.no_grad()
    def see(self, quantizer: Any, x: Tensor) -> None:
        """Add x, (B, ...), whose channels lie along `axis`."""
        if self.axis is not None:
            rows = x.detach().movedim(self.axis, -1).flatten(0, -2).double()
            squares = rows.square().sum(0).cpu()
            self.total = squares if self.total is None else self.total + squares
            self.count += len(rows)

    def root_mean_square(self) -> Tensor:
        """(C,) float64."""
        assert self.total is not None
        return (self.total / self.count).sqrt()
