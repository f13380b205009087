"""Convolution and linear layers with fake-quantized weight and input, swapped in by `prepare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer


class QuantizedLayer(nn.Module):
    """What `QuantConv2d`, `QuantConv1d` and `QuantLinear` share: a weight, its quantizer, the input's quantizer.

    The weight is quantized at every forward pass, but once in a `cached_weights` block. With scales by input channel, r (C,),
    x_c / r_c is quantized instead of x_c and r_c w_c instead of w_c: the same product, in other units.
    """

    weight: Tensor
    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None
    log_channel_scale: Tensor | None

    def attach(
        self,
        weight_quantizer: WeightQuantizer | None,
        input_quantizer: ActivationQuantizer | None,
        *,
        channel_scales: str = "off",
    ) -> None:
        """Set the quantizers; None leaves weight or input in float. `channel_scales` as in `QuantConfig`: log r starts at 0."""
        self._parameters.pop("log_channel_scale", None)  # of an earlier call
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.calibrating = False
        channels = self.weight.shape[1] * int(getattr(self, "groups", 1))
        start = None if channel_scales == "off" or input_quantizer is None else torch.zeros(channels, device=self.weight.device)
        if channel_scales == "learned" and start is not None:
            self.log_channel_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_channel_scale", start)

    @property
    def channel_scale(self) -> Tensor | None:
        """r, (C,), positive; None without scales by channel."""
        return None if self.log_channel_scale is None else self.log_channel_scale.exp()

    @property
    def channel_axis(self) -> int:
        """Of the input, from its end."""
        return 1 - self.weight.ndim

    def channel_factors(self) -> Tensor | None:
        """1 / r_c, which broadcasts against a sample of the input; None without scales by channel."""
        if self.log_channel_scale is None:
            return None
        return self.log_channel_scale.neg().exp().view(-1, *[1] * (self.weight.ndim - 2))

    def scaled_weight(self) -> Tensor:
        """r_c w_c, of the weight's shape: what is quantized; the weight itself without scales by channel."""
        if self.log_channel_scale is None:
            return self.weight
        return self.weight * self.weight_factors()

    def weight_factors(self) -> Tensor:
        """r_c, which broadcasts against the weight (O, C / groups, ...)."""
        assert self.log_channel_scale is not None
        groups = int(getattr(self, "groups", 1))
        scale = self.log_channel_scale.exp().view(groups, -1)
        if groups > 1:
            scale = scale.repeat_interleave(len(self.weight) // groups, dim=0)
        return scale.view(*scale.shape, *[1] * (self.weight.ndim - 2))

    def quantized_weight(self) -> Tensor:
        """w_hat, of the weight's shape, times r_c where there are scales by channel."""
        if self.calibrating or (self.weight_quantizer is None and self.log_channel_scale is None):
            return self.weight
        weights = _cached.get().get(self)
        if weights is None or self.training or torch.is_grad_enabled():
            return self._quantize_weight()
        if not weights:
            weights.append(self._quantize_weight())
        return weights[0]

    @torch.compiler.disable  # see `ActivationQuantizer.forward`
    def _quantize_weight(self) -> Tensor:
        weight = self.scaled_weight()
        return weight if self.weight_quantizer is None else cast(Tensor, self.weight_quantizer(weight))

    def quantized_input(self, x: Tensor) -> Tensor:
        """x_hat, of x's shape, over r_c where there are scales by channel."""
        if self.input_quantizer is None:
            return x
        if self.log_channel_scale is None:
            return cast(Tensor, self.input_quantizer(x))
        return cast(Tensor, self.input_quantizer(x, self.channel_factors()))


_cached: ContextVar[Mapping[QuantizedLayer, list[Tensor]]] = ContextVar("cached", default=MappingProxyType({}))
"""The quantized weight of each layer in a `cached_weights` block, an empty list before its first pass."""


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Within the block each weight of a prepared `model` is quantized once: for sampling, many passes with the same weights.

    It holds for passes in eval mode without gradients; others quantize as ever. The weights and their scales must not change
    within the block. A block within a block uses what the outer one has; a copy of the model caches nothing.
    """
    outer = _cached.get()
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    token = _cached.set({**outer, **{layer: outer.get(layer, []) for layer in layers}})
    try:
        yield
    finally:
        _cached.reset(token)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d` on quantized input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        # As torch's own convolution would: else the gradient keeps the layout of x, and with it all of the residual stream.
        if self.weight.stride(1) == 1 and self.weight.stride(3) == self.weight.shape[1]:
            x = x.contiguous(memory_format=torch.channels_last)
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """`nn.Conv1d` on quantized input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` on quantized input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)


SWAPS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv2d: QuantConv2d,
    nn.Conv1d: QuantConv1d,
    nn.Linear: QuantLinear,
}
"""Which float layer becomes which quantized layer."""


def swap(
    layer: nn.Module,
    weight_quantizer: WeightQuantizer | None,
    input_quantizer: ActivationQuantizer | None,
    *,
    channel_scales: str = "off",
) -> QuantizedLayer:
    """A quantized layer that holds the very parameters, buffers and hooks of `layer`, of a type in `SWAPS`; the quantizers and
    `channel_scales` as in `QuantizedLayer.attach`."""
    kind = SWAPS[type(layer)]
    new = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)
    new._modules, new._buffers, new._parameters = dict(layer._modules), dict(layer._buffers), dict(layer._parameters)
    new.attach(weight_quantizer, input_quantizer, channel_scales=channel_scales)
    return new
