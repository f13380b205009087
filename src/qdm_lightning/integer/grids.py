"""The grid of a quantizer at a pass: tables over the timestep groups where it is static, else asked of the quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.integer.report import Unsupported
from qdm_lightning.quantization.quantizer import ActivationQuantizer, LSQActivation, LSQProbability
from qdm_lightning.quantization.taq import EMANormalizedActivation, GroupedActivation, NormalizedActivation
from qdm_lightning.quantization.timestep import current_timesteps, timesteps


class Grid(NamedTuple):
    """x_hat = s (code - z) with codes in [0, qmax]; one s and z for all samples of a pass, or one for each.

    `scale`, `zero_point` are (1,) or (B,), float32, z integer; `group` names a static grid, None is one for this pass alone;
    `known` is a static grid's s and z as numbers.
    """

    scale: Tensor
    zero_point: Tensor
    qmax: int
    group: int | None = None
    known: tuple[float, float] | None = None

    @property
    def per_sample(self) -> bool:
        return self.scale.numel() > 1

    @property
    def step(self) -> float:
        """The one s as a number."""
        return self.scale.item() if self.known is None else self.known[0]

    @property
    def zero_points(self) -> tuple[float, float]:
        """The least and the greatest z."""
        if self.known is not None:
            return self.known[1], self.known[1]
        low, high = self.zero_point.aminmax()
        return low.item(), high.item()


Padding = tuple[int, int, int, int]
"""Left, right, above, below, as `torch.nn.functional.pad`."""


@dataclass(frozen=True)
class Target:
    """Codes wanted of an activation.

    Args:
        grid: of the codes.
        padding: rows and columns of the code of zero around an image.
        norm, silu: of the activation as group norm and SiLU leave it, or as it is.
        repeat: each pixel so many times, both ways: nearest-neighbour upsampling.
        channels: factor of each channel, (C,) float32, after the SiLU; None for none.
    """

    grid: Grid
    padding: Padding = (0, 0, 0, 0)
    norm: bool = False
    silu: bool = False
    repeat: int = 1
    channels: Tensor | None = None


class GridSource(nn.Module):
    """Where a layer's grid comes from.

    Attributes:
        static: it does not look at the values of x.
        silu: silu(x) is what is quantized.
        channels: factors of what is quantized, which broadcast against a sample; None for none.
    """

    static: bool
    channels: Tensor | None

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.qmax, self.bits, self.silu = quantizer.qmax, quantizer.bits, quantizer.silu
        self.register_buffer("channels", None)

    def operand(self, x: Tensor) -> Tensor:
        """What is quantized of the x that comes in, as `ActivationQuantizer.operand`, times the channels' factors."""
        x = F.silu(x) if self.silu else x
        return x if self.channels is None else x * self.channels

    def at(self, operand: Tensor) -> Grid:
        """The grid for the operand (B, ...) at the timesteps of the running pass."""
        raise NotImplementedError


class StaticGrid(GridSource):
    """One grid, or one for each group of timesteps."""

    static = True
    scale: Tensor
    zero_point: Tensor
    seen: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__(quantizer)
        self.kind = type(quantizer).__name__
        self.groups: int = getattr(quantizer, "groups", 1)
        self.num_train_timesteps: int = getattr(quantizer, "num_train_timesteps", 1)
        seen = getattr(quantizer, "seen", torch.ones(1, dtype=torch.bool))
        self.register_buffer("seen", seen.detach().clone())
        self.register_buffer("scale", torch.ones(self.groups))
        self.register_buffer("zero_point", torch.zeros(self.groups))
        for group in self.seen.nonzero().flatten().tolist():
            first = -(-group * self.num_train_timesteps // self.groups)  # the least t with floor(t G / T) = group
            with timesteps(torch.tensor([first])):
                scale, zero_point = quantizer.grid(torch.zeros(1, 1))  # type: ignore[operator]
            self.scale[group], self.zero_point[group] = scale.item(), zero_point.item()
        self._grids: dict[int, Grid] = {}

    def at(self, operand: Tensor) -> Grid:
        return self.of(self.current_groups(operand.shape[0]))

    def of(self, groups: list[int]) -> Grid:
        """The grid of a batch whose samples belong to these groups; one group stands for all."""
        if len(set(groups)) == 1:
            return self.single(groups[0])
        return Grid(self.scale[groups], self.zero_point[groups], self.qmax)

    def single(self, group: int) -> Grid:
        """The grid of one group."""
        if group not in self._grids:
            row = slice(group, group + 1)
            known = (self.scale[group].item(), self.zero_point[group].item())
            self._grids[group] = Grid(self.scale[row], self.zero_point[row], self.qmax, group, known)
        return self._grids[group]

    def current_groups(self, rows: int) -> list[int]:
        """The group of each sample of the running pass; one for all where there are no groups.

        Raises:
            RuntimeError: no timestep was given, or a group was never calibrated or trained.
            ValueError: a timestep outside [0, T).
        """
        if self.groups == 1 and self.num_train_timesteps == 1:
            return [0]
        t, total = current_timesteps(rows), self.num_train_timesteps
        if t is None:
            raise RuntimeError(f"{self.kind} needs the timesteps: run the model under `with timesteps(t):`")
        values = t.tolist()
        if min(values) < 0 or max(values) >= total:
            raise ValueError(f"timesteps {min(values)}..{max(values)} lie outside [0, {total})")
        groups = [int(value) * self.groups // total for value in values]
        unseen = sorted({group for group in groups if group not in self._grids and not self.seen[group]})
        if unseen:
            raise RuntimeError(
                f"{self.kind}: timestep groups {unseen} of {self.groups} were never seen in calibration or training: "
                "train or calibrate on all timesteps, or take fewer groups (taq.groups=...)"
            )
        return groups

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_grids": {}}  # a copy has tables of its own


class DynamicGrid(GridSource):
    """The quantizer itself says its grid for each x: `taq=normalize`, and a user's own quantizer with `grid(x)`."""

    static = False

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__(quantizer)
        self.quantizer = quantizer

    def at(self, operand: Tensor) -> Grid:
        scale, zero_point = self.quantizer.grid(operand)  # type: ignore[operator]
        sizes = {scale.numel(), zero_point.numel()}
        if not sizes <= {1, operand.shape[0]}:
            raise ValueError(
                f"{type(self.quantizer).__name__}.grid(x) gave {sorted(sizes)} values for {operand.shape[0]} samples"
            )
        rows = max(sizes)
        scale, zero_point = (v.detach().float().reshape(-1).expand(rows) for v in (scale, zero_point))
        if not bool(((zero_point == zero_point.round()) & scale.isfinite() & (scale > 0)).all()):
            raise ValueError(f"{type(self.quantizer).__name__}.grid(x) gave a scale or a zero point that is no grid's")
        return Grid(scale, zero_point, self.qmax)


_STATIC = (LSQActivation, LSQProbability, GroupedActivation, EMANormalizedActivation)


def grid_source(quantizer: ActivationQuantizer, shape: tuple[int, ...], channels: Tensor | None = None) -> GridSource:
    """The grids of a quantizer whose input has a shape like `shape`, times `channels` where there are factors by channel.

    Raises:
        Unsupported: it has no `grid(x)`, or one that is not what its `quantize(x)` computes.
    """
    source = _grid_source(quantizer, shape)
    source.channels = None if channels is None else channels.detach().clone()
    return source


def _grid_source(quantizer: ActivationQuantizer, shape: tuple[int, ...]) -> GridSource:
    kind = type(quantizer)
    if kind in _STATIC:
        return StaticGrid(quantizer)
    if not callable(getattr(quantizer, "grid", None)):
        raise Unsupported(f"its quantizer {kind.__name__} has no grid(x)")
    source = DynamicGrid(quantizer)
    if kind is not NormalizedActivation:
        _check_grid(quantizer, source, shape)
    return source


@torch.no_grad()
def _check_grid(quantizer: ActivationQuantizer, source: DynamicGrid, shape: tuple[int, ...]) -> None:
    """A user's `grid(x)` must be the grid that `quantize(x)` rounds to."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    total = getattr(quantizer, "num_train_timesteps", 1)
    try:
        with timesteps(torch.tensor([total // 2])):
            expected, grid = quantizer.quantize(x), source.at(x)
    except Exception as error:
        raise Unsupported(f"its quantizer {type(quantizer).__name__} failed on a probe: {error}") from error
    s, z = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in (grid.scale, grid.zero_point))
    own = (torch.clamp(torch.round(x / s) + z, 0, grid.qmax) - z) * s
    if not torch.allclose(own, expected, rtol=1e-5, atol=1e-6 * float(s.max())):
        raise Unsupported(f"the grid(x) of its quantizer {type(quantizer).__name__} is not what its quantize(x) computes")
