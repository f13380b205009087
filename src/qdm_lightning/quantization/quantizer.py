"""Learned-step quantizers of weights and activations, and the base classes that a user's own extend.

A quantizer is an `nn.Module` that maps a float tensor to its fake-quantized value of the same shape. An activation quantizer is
built as `factory(bits=..., padded=...)`, a weight quantizer as `factory(bits=..., weight=...)`; both start from data by
`initialize`. Ours are put together from a grid (`scale`, `learned_grid`) and the arithmetic on it (`functional.fake_quantize`);
a variant overrides one of them. See "Your own quantizer" in the README for one of twenty lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.quantization import functional
from qdm_lightning.quantization.compiled import gradient_factor
from qdm_lightning.quantization.observer import Calibrator, Observer, Watcher

Method = TypeVar("Method", bound=Callable[..., Any])


def fusible(method: Method) -> Method:
    """Marks a method that may be given x from before its SiLU; what overrides it is given silu(x), unless marked too.

    A `learned_grid` with the mark looks at the shape of x alone; a `quantize` with it is what `quantize_silu` does in one pass.
    """
    method.fusible = True  # type: ignore[attr-defined]
    return method


class ActivationQuantizer(nn.Module):
    """Base of activation quantizers on the unsigned grid [0, 2^b - 1].

    Args:
        bits: b, 2..8.
        padded: True where zeros are padded to the input, so that zero must lie on the grid (every convolution).

    A subclass writes `quantize(x)` and `initialize(observer, calibrator)`. While `observer` is set, inputs are recorded and
    pass unchanged. Where `prepare` has fused the SiLU before the layer, `silu` is True and what is quantized is silu(x).
    """

    def __init__(self, *, bits: int, padded: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.padded = padded
        self.qmin, self.qmax = 0, 2**bits - 1
        self.observer: Watcher | None = None
        self.silu = False

    @torch.compiler.disable  # its kernels work on rows of memory, which a trace would get wrong
    def forward(self, x: Tensor, channels: Tensor | None = None) -> Tensor:
        """x_hat of x (B, ...); with `channels`, factors that broadcast against x, of channels silu(x) or channels x."""
        if self.observer is not None:
            x = self.operand(x)
            self.observer.see(self, x if channels is None else x * channels)
            return x
        if channels is not None:
            if channels.requires_grad and torch.is_grad_enabled():  # learned ones: a fused pass has no gradient for them
                return ActivationQuantizer.quantize_channels(self, x, channels)
            return self.quantize_channels(x, channels)
        return self.quantize_silu(x) if self.silu else self.quantize(x)

    def operand(self, x: Tensor) -> Tensor:
        """What is quantized of the x that comes in: silu(x) where a SiLU is fused, else x."""
        return F.silu(x) if self.silu else x

    def quantize(self, x: Tensor) -> Tensor:
        """x, (B, ...), fake-quantized."""
        raise NotImplementedError(f"{type(self).__name__} must define quantize(x)")

    def quantize_silu(self, x: Tensor) -> Tensor:
        """silu(x) fake-quantized; a subclass may do both in one pass."""
        return self.quantize(F.silu(x))

    def quantize_channels(self, x: Tensor, channels: Tensor) -> Tensor:
        """channels silu(x), or channels x, fake-quantized; a subclass may do all in one pass."""
        return self.quantize((self.operand(x).float() * channels).to(x.dtype))

    def observe(self, x: Tensor) -> Tensor:
        """What calibration sees of x, (B, ...): x itself, or x in the units of the scale."""
        return x

    def initialize(self, observer: Observer, calibrator: Calibrator) -> None:
        """Set scales and zero points from recorded inputs."""
        raise NotImplementedError(f"{type(self).__name__} must define initialize(observer, calibrator)")

    def extra_repr(self) -> str:
        return f"bits={self.bits}, padded={self.padded}" + (", silu=True" if self.silu else "")


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


class LearnedGrid(nn.Module):
    """Mixed into a quantizer: learned scales and zero points, and LSQ's arithmetic on them.

    The parameter is log s (ours): s stays positive, and one learning rate fits scales of any size; the gradient to s is LSQ's.
    The zero point is a real parameter, rounded straight-through; a `symmetric` grid has the constant 0 instead.
    """

    symmetric = False
    qmin: int
    qmax: int
    log_scale: Tensor
    zero_point: Tensor

    def learn(self, count: int) -> None:
        """Register `count` scales 1 and zero points 0."""
        self.log_scale = nn.Parameter(torch.zeros(count))
        if self.symmetric:
            self.register_buffer("zero_point", torch.zeros(count), persistent=False)
        else:
            self.zero_point = nn.Parameter(torch.zeros(count))

    @property
    def scale(self) -> Tensor:
        """s, as many as there are parameters, positive."""
        return functional.exp(self.log_scale)

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        *,
        hold: bool = False,
        silu: bool = False,
        channels: Tensor | None = None,
    ) -> Tensor:
        """x_hat of x, or of silu(x), with LSQ's factor on the scale's gradient; see `functional.fake_quantize`."""
        factor, ends = gradient_factor(x.shape, self.qmax), (self.qmin, self.qmax)
        return functional.fake_quantize(x, scale, zero_point, *ends, factor, hold=hold, silu=silu, channels=channels)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Overwrite s and z, each of the parameters' number of elements."""
        self.log_scale.copy_(scale.log().reshape(self.log_scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))


class LSQActivation(LearnedGrid, ActivationQuantizer):
    """LSQ+ (arXiv 2004.09576): one learned scale s and integer zero point z for the tensor.

    x_hat = s (clip(round(x / s) + z, 0, 2^b - 1) - z). With `holds_zero`, z is held to the grid, also straight-through, so that
    zero is always representable. `symmetric` fixes z = 0.
    """

    holds_zero = True

    def __init__(self, *, bits: int, padded: bool = False, symmetric: bool = False) -> None:
        super().__init__(bits=bits, padded=padded)
        self.symmetric = symmetric
        self.learn(1)

    @fusible
    def learned_grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and real zero point for x (B, ...), each of 1 or B elements. A variant of the baseline overrides this."""
        return self.scale, self.zero_point

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and integer zero point for x (B, ...), each of 1 or B elements: what integer arithmetic uses."""
        scale, zero_point = (value.detach() for value in self.learned_grid(x))
        return scale, (zero_point.clamp(self.qmin, self.qmax) if self.holds_zero else zero_point).round()

    @fusible
    def quantize(self, x: Tensor) -> Tensor:
        return self.fake_quantize(x, *self.learned_grid(x), hold=self.holds_zero)

    def quantize_silu(self, x: Tensor) -> Tensor:
        if not self._fusible:
            return super().quantize_silu(x)
        return self.fake_quantize(x, *self.learned_grid(x), hold=self.holds_zero, silu=True)

    def quantize_channels(self, x: Tensor, channels: Tensor) -> Tensor:
        if not self._fusible:
            return super().quantize_channels(x, channels)
        return self.fake_quantize(x, *self.learned_grid(x), hold=self.holds_zero, silu=self.silu, channels=channels)

    @property
    def _fusible(self) -> bool:
        return all(hasattr(method, "fusible") for method in (self.quantize, self.learned_grid))

    def initialize(self, observer: Observer, calibrator: Calibrator) -> None:
        self.set_grid(*calibrator.search(observer.pool(), self.qmin, self.qmax, symmetric=self.symmetric))


class LSQProbability(LSQActivation):
    """Attention probabilities: a learned scale and zero point 0 (probabilities are in [0, 1], most of them near 0)."""

    def __init__(self, *, bits: int, padded: bool = False) -> None:
        super().__init__(bits=bits, padded=padded, symmetric=True)
        nn.init.constant_(self.log_scale, -math.log(self.qmax))


class LSQWeight(LearnedGrid, WeightQuantizer):
    """LSQ (arXiv 1902.08153) with a learned scale for each output channel: w_hat = s_w clip(round(w / s_w), qmin, qmax)."""

    symmetric = True

    def __init__(self, *, bits: int, weight: Tensor) -> None:
        super().__init__(bits=bits, weight=weight)
        self.learn(weight.shape[0])

    def forward(self, weight: Tensor) -> Tensor:
        return self.fake_quantize(weight, self.scale, self.zero_point)

    def initialize(self, weight: Tensor, calibrator: Calibrator) -> None:
        self.set_grid(*calibrator.search(weight.detach().flatten(1), self.qmin, self.qmax, symmetric=True))
