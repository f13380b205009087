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

    The weight is quantized at every forward pass, but once in a `cached_weights` block.
    """

    weight: Tensor
    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None

    def attach(self, weight_quantizer: WeightQuantizer | None, input_quantizer: ActivationQuantizer | None) -> None:
        """Set the quantizers; None leaves weight or input in float."""
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.calibrating = False

    def quantized_weight(self) -> Tensor:
        """w_hat, of the weight's shape."""
        if self.weight_quantizer is None or self.calibrating:
            return self.weight
        weights = _cached.get().get(self)
        if weights is None or self.training or torch.is_grad_enabled():
            return cast(Tensor, self.weight_quantizer(self.weight))
        if not weights:
            weights.append(self.weight_quantizer(self.weight))
        return weights[0]

    def quantized_input(self, x: Tensor) -> Tensor:
        """x_hat, of x's shape."""
        return x if self.input_quantizer is None else cast(Tensor, self.input_quantizer(x))


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
    layer: nn.Module, weight_quantizer: WeightQuantizer | None, input_quantizer: ActivationQuantizer | None
) -> QuantizedLayer:
    """A quantized layer that holds the very parameters, buffers and hooks of `layer`, of a type in `SWAPS`."""
    kind = SWAPS[type(layer)]
    new = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)
    new._modules = dict(layer._modules)
    new.attach(weight_quantizer, input_quantizer)
    return new
