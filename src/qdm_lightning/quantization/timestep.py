"""The explicit context by which a forward pass tells its quantizers the timesteps of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_timesteps: ContextVar[Tensor | None] = ContextVar("timesteps", default=None)


@contextmanager
def timesteps(t: Tensor) -> Iterator[None]:
    """Within the block, a forward pass runs at timesteps t: (B,) integers, or a scalar for the whole batch."""
    token = _timesteps.set(t)
    try:
        yield
    finally:
        _timesteps.reset(token)


def current_timesteps(rows: int) -> Tensor | None:
    """The timesteps (rows,) of the running pass, None outside a `timesteps` block.

    Where attention folds heads into the batch, rows is a multiple of B and each t is repeated for its heads.

    Raises:
        ValueError: `rows` is no multiple of the number of timesteps.
    """
    t = _timesteps.get()
    if t is None:
        return None
    t = t.reshape(-1)
    if rows % t.numel():
        raise ValueError(
            f"a tensor of {rows} rows reached a quantizer under timesteps({t.numel()} values): give one t a sample"
        )
    return t if rows == t.numel() else t.repeat_interleave(rows // t.numel())
