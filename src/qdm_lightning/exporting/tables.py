"""Grids of quantizers that are not ours, as tables that a graph can hold: one row for all passes, or one for each timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qdm_lightning.base.checks import one_line
from qdm_lightning.integer.grids import GridSource, grid_source
from qdm_lightning.quantization.quantizer import ActivationQuantizer
from qdm_lightning.quantization.timestep import timesteps


class Table(NamedTuple):
    """Scales and integer zero points, float32, each (1,) for all timesteps, or (T,) by timestep."""

    scale: Tensor
    zero_point: Tensor


@torch.no_grad()
def tabulated(name: str, quantizer: ActivationQuantizer, shape: Sequence[int], num_train_timesteps: int) -> Table:
    """What `quantizer.grid(x)` gives at each timestep, if it looks at the timestep alone.

    Args:
        name: of the quantizer, for messages.
        shape: of a sample that it quantizes, without the batch.
        num_train_timesteps: T.

    Raises:
        ValueError: the grid is not what `quantize(x)` rounds to, cannot be asked for, or follows the values of x.
    """
    refused = f"{name}, a {type(quantizer).__name__}, has no form in ONNX"
    sizes = torch.tensor([1.0, 5.0]).view(2, *[1] * (len(shape) + 1))
    some, other = sizes * torch.randn((2, 1, *shape), generator=torch.Generator().manual_seed(0))
    all_t = torch.arange(num_train_timesteps)
    probed = all_t[[0, num_train_timesteps // 3, -1]].split(1)
    try:
        source = grid_source(quantizer, (2, *shape))
        pairs = [[_at(source, x, t) for x in (some, other)] for t in probed]
        if all(_same(*pair) for pair in pairs):
            table = _at(source, some.expand(num_train_timesteps, *shape), all_t)
            rows = [Table(*(values.expand(num_train_timesteps)[t] for values in table)) for t in probed]
            if all(_same(row, pair[0]) for row, pair in zip(rows, pairs, strict=True)):
                return table
    except Exception as error:  # what a user's own code raises, too
        raise ValueError(f"{refused}: {one_line(error)}") from error
    raise ValueError(
        f"{refused}: its grid(x) follows the values of x, and only one that is the same for all x, or depends on the timestep "
        "alone, is exported"
    )


def _at(source: GridSource, x: Tensor, t: Tensor) -> Table:
    with timesteps(t):
        grid = source.at(x)
    return Table(grid.scale, grid.zero_point)


def _same(a: Table, b: Table) -> bool:
    return all(torch.equal(*pair) for pair in zip(a, b, strict=True))
