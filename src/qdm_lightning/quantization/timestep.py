"""The explicit context by which a forward pass tells its quantizers the timesteps of its samples.

A prepared network whose `forward` takes the timestep sets it for its own pass; around other modules stands `timesteps(t)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("timestep", "timesteps", "t")
"""What networks call the argument of their `forward` that is the timestep; the first that one has."""

_timesteps: ContextVar[Tensor | None] = ContextVar("timesteps", default=None)


@contextmanager
def timesteps(t: Tensor | int | float) -> Iterator[None]:
    """Within the block, a forward pass runs at timesteps t: (B,) integers, or a scalar for the whole batch.

    Numbers of floating point must be integral: a quantizer that depends on the timestep refuses others.
    """
    token = _timesteps.set(t if isinstance(t, Tensor) else torch.tensor(t))
    try:
        yield
    finally:
        _timesteps.reset(token)


def given_timesteps(rows: int) -> Tensor | None:
    """The timesteps (rows,) as they were given; None outside a pass with timesteps, and where `rows` is no multiple of them."""
    t = _timesteps.get()
    if t is None or rows % max(t.numel(), 1):
        return None
    t = t.reshape(-1)
    return t if rows == t.numel() else t.repeat_interleave(rows // t.numel())


def current_timesteps(rows: int) -> Tensor | None:
    """The timesteps (rows,) of the running pass, integers; None outside a pass with timesteps.

    Where attention folds heads into the batch, rows is a multiple of B and each t is repeated for its heads.

    Raises:
        ValueError: `rows` is no multiple of the number of timesteps, or a timestep lies between two steps.
    """
    t, given = given_timesteps(rows), _timesteps.get()
    if t is None and given is not None:
        raise ValueError(
            f"a tensor of {rows} rows reached a quantizer under timesteps({given.numel()} values): give one t a sample"
        )
    if t is None or not t.is_floating_point():
        return t
    between = t[t != t.round()]
    if len(between):
        raise ValueError(f"timestep {between[0].item():g} lies between two steps of the process: give integral timesteps")
    return t.long()


class _OwnTimesteps:
    """Stands for the `forward` of a module, whose pass then runs within `timesteps(t)` of the t that it is given.

    A copy of the module has a copy of this: it refers to the module whose `forward` it stands for.
    """

    def __init__(self, module: nn.Module, name: str, place: int) -> None:
        self.module, self.name, self.place = module, name, place
        self.wrapped: Callable[..., Any] | None = module.__dict__.get("forward")  # of others, such as accelerate

    @property
    def forward(self) -> Callable[..., Any]:
        return self.wrapped or type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.forward)

    def __call__(self, *args: Any, **options: Any) -> Any:
        t: Any = args[self.place] if len(args) > self.place else options.get(self.name)
        one_a_sample = isinstance(t, Real) or (isinstance(t, Tensor) and t.ndim < 2)
        with timesteps(t) if one_a_sample else nullcontext():
            return self.forward(*args, **options)


def tell_own_timesteps(model: nn.Module) -> None:
    """Let `model` set the timesteps for each of its passes, where its `forward` takes them under one of `NAMES`."""
    names = list(inspect.signature(model.forward).parameters)
    name = next((name for name in NAMES if name in names), None)
    if name is not None:
        model.forward = _OwnTimesteps(model, name, names.index(name))
