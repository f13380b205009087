"""Convolution and linear layers on integer codes, made of the quantized layers that `prepare` put in."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from qdm_lightning.integer import kernels, native
from qdm_lightning.integer.encoding import encode, round_to_grid
from qdm_lightning.integer.grids import Grid, Padding, Target, grid_source
from qdm_lightning.integer.report import Unsupported
from qdm_lightning.quantization.layers import QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear
from qdm_lightning.quantization.quantizer import WeightQuantizer


@torch.no_grad()
def weight_codes(weight: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """int8 codes of the weight's shape and their scales (O,), float32: what the quantizer makes of it, scale times code.

    Raises:
        Unsupported: the quantizer has no `scale` for each output channel, or its result is no multiple of it.
    """
    kind, rows = type(quantizer).__name__, weight.shape[0]
    scale = getattr(quantizer, "scale", None)
    if not isinstance(scale, Tensor) or scale.numel() not in (1, rows):
        raise Unsupported(f"its weight quantizer {kind} has no scale of 1 or {rows} values")
    scale = scale.detach().float().reshape(-1).expand(rows).contiguous()
    values = quantizer(weight).detach().float().flatten(1)
    codes = torch.round(values / scale[:, None])
    if not bool(((codes >= quantizer.qmin) & (codes <= quantizer.qmax)).all()) or not torch.equal(
        codes * scale[:, None], values
    ):
        raise Unsupported(f"the weights of its quantizer {kind} are not scale * code with codes of {quantizer.bits} bits")
    return codes.to(torch.int8).reshape(weight.shape), scale


class IntegerLayer(nn.Module):
    """What the layers share: weight codes, their scales, the input's grid.

    y_o = s s_o (sum_i w_oi q_i - z sum_i w_oi) + b_o, of codes q with scale s and zero point z: the second sum is known before
    and goes into the bias.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_sum: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer, shape: tuple[int, ...]) -> None:
        super().__init__()
        if layer.weight_quantizer is None or layer.input_quantizer is None:
            raise ValueError("a layer on integer codes has a quantizer of its weight and one of its input")
        codes, scale = weight_codes(layer.scaled_weight(), layer.weight_quantizer)
        kernels.check_fits(layer.input_quantizer.qmax, codes)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer(
            "weight_sum", codes.flatten(1).sum(1, dtype=torch.int64).double() * scale.double(), persistent=False
        )
        bias = cast(Tensor | None, layer.bias)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.weight_bits, self.silu = layer.weight_quantizer.bits, layer.input_quantizer.silu
        self.grid = grid_source(layer.input_quantizer, shape, layer.channel_factors())
        self._folded: dict[int, Tensor] = {}
        self._packed: Any = None
        self._winograd: list[native.WinogradConv | None] = []  # empty before it was asked for

    def folded_bias(self, grid: Grid) -> Tensor:
        """b - s z s_o sum w_o, (O,), or (B, O) where each sample has a grid of its own."""
        if grid.group is not None and grid.group in self._folded:
            return self._folded[grid.group]
        offset = (grid.scale.double() * grid.zero_point.double())[:, None] * self.weight_sum
        bias = (-offset if self.bias is None else self.bias.double() - offset).float()
        if grid.per_sample:
            return bias
        if grid.group is not None:
            self._folded[grid.group] = bias[0]
        return bias[0]

    @property
    def channels(self) -> Tensor | None:
        """Factors of the input's channels, (C,), as `Target` has them."""
        return None if self.grid.channels is None else self.grid.channels.flatten()

    def compute(self, codes: Tensor, grid: Grid) -> Tensor:
        """The layer's output, float32, of the codes of its input."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> IntegerLayer:
        """What `to`, `cuda`, `half` do: nothing that the kernels could not take. Raises ValueError."""
        moved = fn(torch.empty(0))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            where = moved.dtype if moved.device.type == "cpu" else moved.device
            raise ValueError(f"{where} is not allowed: a network on integer codes runs on the CPU, from float32 to float32")
        return cast(IntegerLayer, super()._apply(fn, recurse))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": {}, "_packed": None, "_winograd": []}  # packed weights can't be copied


class IntegerConv2d(IntegerLayer):
    """A convolution, 2-d or 1-d, on integer codes. Zero padding is the code of zero, exactly."""

    def __init__(self, layer: QuantConv2d | QuantConv1d) -> None:
        if layer.padding_mode != "zeros":
            raise Unsupported(f"its padding_mode is {layer.padding_mode}")
        flat = isinstance(layer, QuantConv1d)
        kernel = layer.kernel_size
        super().__init__(layer, (2, layer.in_channels, *(4 + k for k in kernel)))
        self.flat, self.groups = flat, layer.groups
        if flat:
            self.weight = self.weight.unsqueeze(2)
        one = (1,) if flat else ()
        self.stride, self.dilation = (one + tuple(layer.stride), one + tuple(layer.dilation))
        around = (
            layer._reversed_padding_repeated_twice
            if isinstance(layer.padding, str)
            else [p for q in reversed(layer.padding) for p in (q, q)]
        )
        ones = all(n == 1 for n in (*self.stride, *self.dilation, self.groups))
        self.plain = ones and not flat
        self.padding = cast(Padding, (*around, *([0, 0] if flat else [])))

    @property
    def packed(self) -> kernels.PackedConv:
        """oneDNN's convolution."""
        if self._packed is None:
            self._packed = kernels.PackedConv(
                self.weight.contiguous(), cast(Any, self.stride), cast(Any, self.dilation), self.groups
            )
        return cast(kernels.PackedConv, self._packed)

    @property
    def winograd(self) -> native.WinogradConv | None:
        """The convolution in fewer products, where this processor gains by it and the codes are narrow enough."""
        if not self.plain or kernels.instruction_set() != "vnni" or not native.has_vnni():
            return None
        if not self._winograd:
            suits = native.WinogradConv.suits(self.weight, self.grid.qmax)
            self._winograd.append(native.WinogradConv(self.weight, self.grid.qmax) if suits else None)
        return self._winograd[0]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C, W) float, as the convolution it was."""
        image = x.unsqueeze(2) if self.flat else x
        if self.grid.static:
            grid = self.grid.at(x)
            codes = encode([image], [Target(grid, self.padding, silu=self.silu, channels=self.channels)])[0]
        else:
            operand = self.grid.operand(x)
            grid = self.grid.at(operand)
            codes = encode([operand.unsqueeze(2) if self.flat else operand], [Target(grid, self.padding)])[0]
        out = self.compute(codes, grid)
        return out.squeeze(2) if self.flat else out

    def compute(self, codes: Tensor, grid: Grid, residual: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
        """Of padded codes (B, C, H, W) channels-last: (B, O, H', W') float32 channels-last, plus `residual`.

        With `overwrite` the residual's memory may become the result's.
        """
        bias, scale = self.folded_bias(grid), 1.0 if grid.per_sample else grid.step
        own = None if grid.per_sample else bias
        winograd = self.winograd if codes.shape[2] % 2 == codes.shape[3] % 2 == 0 else None
        if winograd is not None and not grid.per_sample:
            return winograd(codes, self.weight_scale, bias, scale, residual)
        if residual is not None and overwrite and not grid.per_sample:
            return self.packed(codes, self.weight_scale, own, scale, residual)
        out = self.packed(codes, self.weight_scale, own, scale)
        if grid.per_sample:
            out.mul_(grid.scale[:, None, None, None]).add_(bias[:, :, None, None])
        return out if residual is None else out.add_(residual)

    @torch.no_grad()
    def check(self) -> None:
        """The kernels against sums in float64, on codes that make the extreme sums of the channel with the widest weights.

        Raises:
            Inexact: they differ.
        """
        weight = self.weight.double()
        probed = self.weight.flatten(1).int().abs().sum(1).argmax()
        positive = (self.weight[probed : probed + 1] > 0).repeat(1, self.groups, 1, 1)
        extremes = torch.cat([positive, ~positive, positive | True])
        codes = nn.functional.pad(extremes.to(torch.uint8), (0, 1, 0, 1)) * self.grid.qmax
        codes = codes.repeat_interleave(self.dilation[0], dim=2).repeat_interleave(self.dilation[1], dim=3)
        codes = codes.contiguous(memory_format=torch.channels_last)
        expected = torch.conv2d(codes.double(), weight, stride=self.stride, dilation=self.dilation, groups=self.groups)
        ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight))
        tried: list[Any] = [self.packed, *([] if self.winograd is None else [self.winograd])]
        for kernel in tried:
            kernels.check_exact(kernel(codes, ones, zeros, 1.0), expected, f"its {type(kernel).__name__}")


class IntegerLinear(IntegerLayer):
    """A linear layer on integer codes."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer, (2, layer.in_features))

    @property
    def packed(self) -> Tensor:
        if self._packed is None:
            self._packed = kernels.pack_linear(self.weight)
        return cast(Tensor, self._packed)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., I) float to (B, ..., O) float32."""
        if self.grid.static:
            grid = self.grid.at(x)
            return self.compute(round_to_grid(x, grid, self.silu, self.channels), grid)
        operand = self.grid.operand(x)
        grid = self.grid.at(operand)
        return self.compute(round_to_grid(operand, grid), grid)

    def compute(self, codes: Tensor, grid: Grid) -> Tensor:
        """Of codes (B, ..., I) uint8: (B, ..., O) float32."""
        rows = codes.reshape(-1, codes.shape[-1])
        bias = self.folded_bias(grid)
        if not grid.per_sample:
            out = kernels.linear(rows, self.packed, self.weight_scale, bias, grid.step)
            return out.view(*codes.shape[:-1], -1)
        out = kernels.linear(rows, self.packed, self.weight_scale, None, 1.0).view(*codes.shape[:-1], -1)
        middle = [1] * (codes.ndim - 2)
        return out.mul_(grid.scale.view(-1, *middle, 1)).add_(bias.view(len(bias), *middle, -1))

    @torch.no_grad()
    def check(self) -> None:
        """As `IntegerConv2d.check`."""
        probed = self.weight.int().abs().sum(1).argmax()
        positive = self.weight[probed : probed + 1] > 0
        codes = torch.cat([positive, ~positive, positive | True]).to(torch.uint8) * self.grid.qmax
        found = kernels.linear(codes, self.packed, torch.ones(len(self.weight)), None, 1.0)
        kernels.check_exact(found, codes.double() @ self.weight.double().T, "the linear layer")
