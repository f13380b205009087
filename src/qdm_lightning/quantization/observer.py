"""What calibration sees of each quantizer's input, a bounded sample, and what chooses a grid for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from qdm_lightning.quantization.timestep import current_timesteps

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


@dataclass
class Observer:
    """A bounded sample of one quantizer's inputs over the calibration batches.

    `values` is (rows, SAMPLES_PER_ROW or fewer), one row for each sample that passed; `ends` (rows, 2) its least and greatest
    value; `timesteps` (rows,) or empty where no timestep was given; memory is bounded whatever the size of the activations.
    """

    generator: torch.Generator
    chunks: list[Tensor] = field(default_factory=list)
    end_chunks: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Keep some values of x, (B, ...)."""
        rows = x.detach().flatten(1)
        self.end_chunks.append(torch.stack(torch.aminmax(rows, dim=1), dim=1).float().cpu())
        if rows.shape[1] > SAMPLES_PER_ROW:
            rows = rows[:, torch.randint(rows.shape[1], (SAMPLES_PER_ROW,), generator=self.generator).to(rows.device)]
        self.chunks.append(rows.float().cpu())
        times = current_timesteps(x.shape[0])
        if times is not None:
            self.times.append(times.cpu())

    @property
    def values(self) -> Tensor:
        return torch.cat(self.chunks)

    @property
    def ends(self) -> Tensor:
        return torch.cat(self.end_chunks)

    def pool(self, chosen: Tensor | None = None) -> Tensor:
        """What a calibrator searches over, (1, M): the values of all rows, or of those in the mask `chosen` (rows,), and once
        the least and the greatest value that passed in them."""
        values, ends = (table if chosen is None else table[chosen] for table in (self.values, self.ends))
        return torch.cat([values.flatten(), ends.min()[None], ends.max()[None]])[None]

    @property
    def timesteps(self) -> Tensor:
        return torch.cat(self.times) if self.times else torch.empty(0, dtype=torch.int64)
