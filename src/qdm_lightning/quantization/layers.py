"""Convolution and linear layers with fake-quantized weight and input, swapped in by `prepare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer

if TYPE_CHECKING:
    from qdm_lightning.quantization.calibration import Calibrator

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)  # a fused optimizer writes weights and raises no version counter


class QuantizedLayer(nn.Module):
    """What `QuantConv2d`, `QuantConv1d` and `QuantLinear` share: a weight, its quantizer, the input's quantizer.

    With gradients on, the weight is quantized at every forward pass, once a step. Without gradients in eval mode it is
    quantized once and kept until the weight or its scales change (their version counters tell), an optimizer takes a step, or
    `train()` or `eval()` is called. A write through `.data` raises no version counter: call `eval()` after it.
    """

    weight: Tensor
    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None

    def attach(self, weight_quantizer: WeightQuantizer | None, input_quantizer: ActivationQuantizer | None) -> None:
        """Set the quantizers; None leaves weight or input in float."""
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        self.calibrating = False
        self._cached: tuple[Any, Tensor, list[Tensor]] | None = None

    def quantized_weight(self) -> Tensor:
        """w_hat, of the weight's shape."""
        if self.weight_quantizer is None or self.calibrating:
            return self.weight
        if torch.is_grad_enabled() or self.training:
            self._cached = None
            return cast(Tensor, self.weight_quantizer(self.weight))
        state = [self.weight, *self.weight_quantizer.parameters(), *self.weight_quantizer.buffers()]
        if any(t.is_inference() for t in state):  # these count no versions
            return cast(Tensor, self.weight_quantizer(self.weight))
        key = [_optimizer_steps, *((t.data_ptr(), t._version, t.dtype) for t in state)]
        if self._cached is None or self._cached[0] != key:
            # The tensors are held too: freed, their addresses would come again with other values.
            self._cached = (key, self.weight_quantizer(self.weight), [t.detach() for t in state])
        return self._cached[1]

    def quantized_input(self, x: Tensor) -> Tensor:
        """x_hat, of x's shape."""
        return x if self.input_quantizer is None else cast(Tensor, self.input_quantizer(x))

    def initialize_weight(self, calibrator: Calibrator) -> None:
        """Start the weight's scales from the weight."""
        if self.weight_quantizer is not None:
            self.weight_quantizer.initialize(self.weight, calibrator)

    def train(self, mode: bool = True) -> QuantizedLayer:
        self._cached = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # a copy quantizes its own weight


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
