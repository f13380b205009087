"""TaQ, timestep-aware quantization of activations: three readings of the paper's idea (the equations are ours).

All see a batch whose every sample has its own timestep t; the group of t is g = floor(t G / T). `normalize` needs no t, the
others read it from `timesteps(t)`. With `symmetric`, as attention probabilities are quantized, the zero point is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from qdm_lightning.base.ranks import training_rank
from qdm_lightning.quantization import compiled
from qdm_lightning.quantization.observer import Calibrator, Observer
from qdm_lightning.quantization.quantizer import LSQActivation, fusible
from qdm_lightning.quantization.spec import TaQEma, TaQNormalize, TaQScale
from qdm_lightning.quantization.timestep import current_timesteps


class NormalizedActivation(LSQActivation):
    """`taq=normalize`: the grid follows each sample's own mean mu_n and standard deviation sigma_n = sqrt(var_n + psi).

    s_n = s sigma_n; z_n = round(z - mu_n / s_n), held to the grid where zeros are padded;
    x_hat = s_n (clip(round(x / s_n) + z_n, 0, 2^b - 1) - z_n). mu_n and sigma_n are taken over all axes but the first, in
    float32 and without gradient. s and z are learned in units of the normalized activation (x - mu_n) / sigma_n.

    With `symmetric`, as probabilities are quantized, mu_n = 0 and sigma_n is the sample's greatest value (at least psi; that of
    probabilities over N keys is 1 / N or more): it leaves less error than root mean square or deviation.
    """

    def __init__(self, *, bits: int, padded: bool = False, symmetric: bool = False, psi: float = TaQNormalize.psi) -> None:
        super().__init__(bits=bits, padded=padded, symmetric=symmetric)
        self.psi, self.holds_zero = psi, padded

    @torch.no_grad()
    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu_n and sigma_n of x (B, ...), each (B,), float32, no gradient."""
        if self.symmetric:
            greatest = x.flatten(1).amax(1).float().clamp(min=self.psi)
            return torch.zeros_like(greatest), greatest
        return compiled.row_moments(x, self.psi)

    def learned_grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.moments(x)
        if self.symmetric:
            return self.scale * std, self.zero_point.expand(len(std))
        # s acts through z_n too: LSQ's factor belongs on that path of its gradient as well.
        factor = compiled.gradient_factor(x.shape, self.qmax)
        return _SampleGrid.apply(self.scale, self.zero_point, mean, std, factor)

    def observe(self, x: Tensor) -> Tensor:
        mean, std = (values.view(-1, *[1] * (x.ndim - 1)) for values in self.moments(x))
        return (x - mean) / std


class _SampleGrid(torch.autograd.Function):
    """s_n = s sigma_n and z_n = z - mu_n / s_n, of s and z (1,), mu and sigma (B,): one operation for ten small ones."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, scale: Tensor, zero_point: Tensor, mean: Tensor, std: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        own = scale * std
        shift = mean / own
        ctx.save_for_backward(scale, std, shift)
        ctx.factor = factor  # type: ignore[attr-defined]
        return own, zero_point - shift

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_scale: Tensor, grad_zero: Tensor) -> tuple[Tensor | None, ...]:
        scale, std, shift = ctx.saved_tensors  # type: ignore[attr-defined]
        # d s_n / d s = sigma_n, and d z_n / d s = mu_n / (s_n s).
        through_zero = ctx.factor * (grad_zero @ shift) / scale  # type: ignore[attr-defined]
        return grad_scale @ std + through_zero, grad_zero.sum(0, keepdim=True), None, None, None


def across_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over the processes that train together; `values` itself where there is one."""
    if training_rank()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


class Grouped(nn.Module):
    """Timestep groups: which group a sample belongs to, and which groups were ever seen."""

    seen: Tensor

    def set_groups(self, groups: int, num_train_timesteps: int) -> None:
        """Set G and T; no group was seen."""
        self.groups, self.num_train_timesteps = groups, num_train_timesteps
        self.register_buffer("seen", torch.zeros(groups, dtype=torch.bool))

    def group_of(self, t: Tensor) -> Tensor:
        """g = floor(t G / T) of timesteps t, (rows,) int64.

        Raises:
            ValueError: a timestep outside [0, T).
        """
        total = self.num_train_timesteps
        if bool(((t < 0) | (t >= total)).any()):
            raise ValueError(f"timesteps {t.min().item()}..{t.max().item()} lie outside [0, {total})")
        return torch.div(t.long() * self.groups, total, rounding_mode="floor")

    def current_group(self, rows: int) -> Tensor:
        """The group of each row of the running pass, (rows,) int64.

        Raises:
            RuntimeError: no timestep was given.
            ValueError: a timestep outside [0, T).
        """
        t = current_timesteps(rows)
        if t is None:
            raise RuntimeError(f"{type(self).__name__} needs the timesteps: run the model under `with timesteps(t):`")
        return self.group_of(t.to(self.seen.device))

    def check_seen(self, group: Tensor) -> None:
        """Raise RuntimeError if a group was neither calibrated nor trained."""
        unseen = group[~self.seen[group]].unique().tolist()
        if unseen:
            raise RuntimeError(
                f"{type(self).__name__}: timestep groups {unseen} of {self.groups} were never seen in calibration or training: "
                "train or calibrate on all timesteps, or take fewer groups (taq.groups=...)"
            )


class EMANormalizedActivation(NormalizedActivation, Grouped):
    """`taq=ema`: as `normalize`, with mu_g and sigma_g read from tables by the timestep's group: static at each step.

    In training the tables follow the groups' own means and standard deviations by an exponential average ("smoothing").

    Args:
        groups: number of timestep groups, G.
        num_train_timesteps: timesteps of the process, T.
        momentum: share of the old value at each update.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        bits: int,
        padded: bool = False,
        symmetric: bool = False,
        psi: float = TaQEma.psi,
        groups: int = TaQEma.groups,
        momentum: float = TaQEma.momentum,
        num_train_timesteps: int = TaQEma.num_train_timesteps,
    ) -> None:
        super().__init__(bits=bits, padded=padded, symmetric=symmetric, psi=psi)
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(groups))
        self.register_buffer("std", torch.ones(groups))
        self.set_groups(groups, num_train_timesteps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}deviation" in state_dict:  # its name in version 0.1
            state_dict[f"{prefix}std"] = state_dict.pop(f"{prefix}deviation")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        group = self.current_group(x.shape[0])
        if self.training or self.observer is not None:
            self._update(group, *super().moments(x))
        self.check_seen(group)
        return self.mean[group], self.std[group]

    def _update(self, group: Tensor, mean: Tensor, std: Tensor) -> None:
        count = torch.bincount(group, minlength=self.groups)
        sums = [torch.zeros_like(self.mean).index_add_(0, group, values) for values in (mean, std)]
        if self.observer is None:  # a step's batch lies in shares on the ranks, calibration's is whole on each
            *sums, count = across_ranks(torch.stack([*sums, count.to(mean.dtype)]))
        here = count > 0
        for table, total in zip((self.mean, self.std), sums, strict=True):
            average = total / count.clamp(min=1)
            updated = torch.where(self.seen, self.momentum * table + (1 - self.momentum) * average, average)
            table.copy_(torch.where(here, updated, table))
        self.seen.logical_or_(here)


class GroupedActivation(LSQActivation, Grouped):
    """`taq=scale`: a learned s_g, z_g for each timestep group (as TDQ, arXiv 2306.02316, and EfficientDM, arXiv 2310.03270).

    `log_scale` and `zero_point` are (G,). A group that is absent from a batch has zero gradient, and the optimizer must leave
    its row alone (`training.optimizer.QuantizerAdam` does; the parameters carry `rows_move_alone = True`).
    """

    def __init__(
        self,
        *,
        bits: int,
        padded: bool = False,
        symmetric: bool = False,
        groups: int = TaQScale.groups,
        num_train_timesteps: int = TaQScale.num_train_timesteps,
    ) -> None:
        super().__init__(bits=bits, padded=padded, symmetric=symmetric)
        self.learn(groups)
        for parameter in self.parameters():
            parameter.rows_move_alone = True  # type: ignore[attr-defined]
        self.set_groups(groups, num_train_timesteps)

    @fusible
    def learned_grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        group = self.current_group(x.shape[0])
        if self.training:
            self.seen.logical_or_(across_ranks(torch.bincount(group, minlength=self.groups)) > 0)
        else:
            self.check_seen(group)
        return self.scale[group], self.zero_point[group]

    def observe(self, x: Tensor) -> Tensor:
        self.current_group(x.shape[0])  # raises where no timestep was given
        return x

    @torch.no_grad()
    def initialize(self, observer: Observer, calibrator: Calibrator) -> None:
        """Each group from its own samples; groups without any start from all of them, and stay unseen."""
        group = self.group_of(observer.timesteps)
        present = group.unique()
        pools = [observer.pool(group == g)[0] for g in present]
        width = max(pool.numel() for pool in pools)
        equal = torch.stack([pool.repeat(-(-width // pool.numel()))[:width] for pool in pools])
        scale, zero_point = calibrator.search(equal, self.qmin, self.qmax, symmetric=self.symmetric)
        if len(present) < self.groups:
            own = scale, zero_point
            rest = calibrator.search(observer.pool(), self.qmin, self.qmax, symmetric=self.symmetric)
            scale, zero_point = (result.repeat(self.groups) for result in rest)
            scale[present], zero_point[present] = own
        self.seen[present] = True
        self.set_grid(scale, zero_point)
