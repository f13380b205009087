"""Learned-step quantizers of weights and activations, and the base classes that a user's own extend.

A quantizer is an `nn.Module` that maps a float tensor to its fake-quantized value of the same shape. An activation quantizer is
built as `factory(bits=..., padded=...)`, a weight quantizer as `factory(bits=..., weight=...)`; both start from data by
`initialize`. See "Your own quantizer" in the README for one of twenty lines.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.quantization import functional
from qdm_lightning.quantization.compiled import gradient_factor

if TYPE_CHECKING:
    from qdm_lightning.quantization.calibration import Calibrator
    from qdm_lightning.quantization.observer import Observer


class ActivationQuantizer(nn.Module):
    """Base of activation quantizers on the unsigned grid [0, 2^b - 1].

    Args:
        bits: b, 2..8.
        padded: True where zeros are padded to the input, so that zero must lie on the grid (every convolution).

    A subclass writes `quantize(x)` and `initialize(record, calibrator)`. While `record` is set, inputs are recorded and pass
    unchanged. Where `prepare` has folded the SiLU before the layer into it, `silu` is True and what is quantized is silu(x).
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if {"quantize", "learned_grid"} & cls.__dict__.keys() and "quantize_silu" not in cls.__dict__:
            cls.quantize_silu = ActivationQuantizer.quantize_silu  # type: ignore[method-assign]  # arithmetic of its own

    def __init__(self, *, bits: int, padded: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.padded = padded
        self.qmin, self.qmax = 0, 2**bits - 1
        self.observer: Observer | None = None
        self.silu = False

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            x = self.operand(x)
            self.observer.add(self.observe(x))
            return x
        return self.quantize_silu(x) if self.silu else self.quantize(x)

    def operand(self, x: Tensor) -> Tensor:
        """What is quantized of the x that comes in: silu(x) where a SiLU is folded in, else x."""
        return F.silu(x) if self.silu else x

    def quantize(self, x: Tensor) -> Tensor:
        """x, (B, ...), fake-quantized."""
        raise NotImplementedError(f"{type(self).__name__} must define quantize(x)")

    def quantize_silu(self, x: Tensor) -> Tensor:
        """silu(x) fake-quantized; a subclass may do both in one pass."""
        return self.quantize(F.silu(x))

    def observe(self, x: Tensor) -> Tensor:
        """What calibration sees of x, (B, ...): x itself, or x in the units of the scale."""
        return x

    def initialize(self, observer: Observer, calibrator: Calibrator) -> None:
        """Set scales and zero points from recorded inputs."""
        raise NotImplementedError(f"{type(self).__name__} must define initialize(record, calibrator)")

    def extra_repr(self) -> str:
        return f"bits={self.bits}, padded={self.padded}" + (", silu=True" if self.silu else "")


class LSQActivation(ActivationQuantizer):
    """LSQ+ (arXiv 2004.09576): one learned scale s and integer zero point z for the tensor.

    x_hat = s (clip(round(x / s) + z, 0, 2^b - 1) - z). The parameter is log s (ours): s stays positive, and one learning rate
    fits scales of any size; the gradient to s is LSQ's. z is a real parameter, rounded and held to the grid straight-through,
    so that zero is always representable.
    """

    def __init__(self, *, bits: int, padded: bool = False) -> None:
        super().__init__(bits=bits, padded=padded)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.zero_point = nn.Parameter(torch.zeros(1))

    @property
    def scale(self) -> Tensor:
        """s, (1,), positive."""
        return self.log_scale.exp()

    @property
    def holds_zero(self) -> bool:
        """True where the zero point is held to the grid, so that zero lies on it."""
        return True

    def learned_grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and real zero point for x (B, ...), each of 1 or B elements. A variant of the baseline overrides this."""
        return self.scale, self.zero_point

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and integer zero point for x (B, ...), each of 1 or B elements: what integer arithmetic uses."""
        scale, zero_point = self.learned_grid(x)
        return scale, functional.integer_zero_point(
            zero_point, self.qmin, self.qmax
        ) if self.holds_zero else functional.round_ste(zero_point)

    def quantize(self, x: Tensor) -> Tensor:
        return self._fake_quantize(x, silu=False)

    def quantize_silu(self, x: Tensor) -> Tensor:
        return self._fake_quantize(x, silu=True)

    def _fake_quantize(self, x: Tensor, *, silu: bool) -> Tensor:
        # log s itself goes in, unless a subclass has a scale or a grid of its own.
        log = type(self).scale is LSQActivation.scale and type(self).learned_grid is LSQActivation.learned_grid
        scale, zero_point = (self.log_scale, self.zero_point) if log else self.learned_grid(x)
        factor = gradient_factor(x.shape, self.qmax)
        return functional.fake_quantize(
            x, scale, zero_point, self.qmin, self.qmax, factor, hold=self.holds_zero, silu=silu, log=log
        )

    def initialize(self, observer: Observer, calibrator: Calibrator) -> None:
        scale, zero_point = calibrator.search(observer.pool(), self.qmin, self.qmax, symmetric=False)
        self.set_grid(scale, zero_point)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Overwrite s and z, each of the parameters' number of elements."""
        self.log_scale.copy_(scale.log().reshape(self.log_scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))


class LSQProbability(ActivationQuantizer):
    """Attention probabilities: a learned scale and zero point 0 (probabilities are in [0, 1], most of them near 0)."""

    zero_point: Tensor

    def __init__(self, *, bits: int, padded: bool = False) -> None:
        super().__init__(bits=bits, padded=padded)
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(self.qmax)))
        self.register_buffer("zero_point", torch.zeros(1), persistent=False)

    @property
    def scale(self) -> Tensor:
        """s, (1,), positive."""
        return self.log_scale.exp()

    def quantize(self, x: Tensor) -> Tensor:
        log = type(self).scale is LSQProbability.scale
        scale, factor = self.log_scale if log else self.scale, gradient_factor(x.shape, self.qmax)
        return functional.fake_quantize(x, scale, self.zero_point, self.qmin, self.qmax, factor, log=log)

    @torch.no_grad()
    def initialize(self, observer: Observer, calibrator: Calibrator) -> None:
        scale, _ = calibrator.search(observer.pool(), self.qmin, self.qmax, symmetric=True)
        self.log_scale.copy_(scale.log())


class WeightQuantizer(nn.Module):
    """Base of weight quantizers on the signed grid [-2^(b-1), 2^(b-1) - 1], zero point 0.

    Args:
        bits: b, 2..8.
        weight: the layer's weight, (O, ...), whose first axis is the output channel.

    A subclass writes `forward(weight)` and `initialize(weight, calibrator)`.
    """

    def __init__(self, *, bits: int, weight: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.qmin, self.qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def initialize(self, weight: Tensor, calibrator: Calibrator) -> None:
        """Set the scales from the weight."""
        raise NotImplementedError(f"{type(self).__name__} must define initialize(weight, calibrator)")

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class LSQWeight(WeightQuantizer):
    """LSQ (arXiv 1902.08153) with a learned scale for each output channel: w_hat = s_w clip(round(w / s_w), qmin, qmax)."""

    zero_point: Tensor

    def __init__(self, *, bits: int, weight: Tensor) -> None:
        super().__init__(bits=bits, weight=weight)
        self.log_scale = nn.Parameter(torch.zeros(weight.shape[0]))
        self.register_buffer("zero_point", torch.zeros(weight.shape[0]), persistent=False)
        self.factor = gradient_factor(weight.shape, self.qmax)

    @property
    def scale(self) -> Tensor:
        """s_w, (O,), positive."""
        return self.log_scale.exp()

    def forward(self, weight: Tensor) -> Tensor:
        log = type(self).scale is LSQWeight.scale
        scale = self.log_scale if log else self.scale
        return functional.fake_quantize(weight, scale, self.zero_point, self.qmin, self.qmax, self.factor, log=log)

    @torch.no_grad()
    def initialize(self, weight: Tensor, calibrator: Calibrator) -> None:
        scale, _ = calibrator.search(weight.detach().flatten(1), self.qmin, self.qmax, symmetric=True)
        self.log_scale.copy_(scale.log())
