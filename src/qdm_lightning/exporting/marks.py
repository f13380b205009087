"""Quantizers as marks in a traced graph: each becomes one operator that the export lowers by what the quantizer is."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.quantization.attention import QuantizedAttention
from qdm_lightning.quantization.layers import QuantizedLayer


@torch.library.custom_op("qdm_lightning::mark", mutates_args=())
def mark(x: Tensor, index: int) -> Tensor:
    """x, to be quantized by the quantizer of this number."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, index: int) -> Tensor:
    return torch.empty_like(x)


class Mark(nn.Module):
    """Stands for the quantizer of a number, whose SiLU and factors by channel it keeps."""

    channels: Tensor | None

    def __init__(self, index: int, silu: bool, channels: Tensor | None = None) -> None:
        super().__init__()
        self.index, self.silu = index, silu
        self.register_buffer("channels", channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x) if self.silu else x
        return cast(Tensor, mark(x if self.channels is None else x * self.channels, self.index))


class MarkedAttention(QuantizedAttention):
    """Q-attention whose operands are laid out for their products before they are quantized: no copy of the codes."""

    def __init__(self, operands: list[nn.Module | None], probabilities: nn.Module | None) -> None:
        super().__init__(None, None, None, None)
        self.operands, self.marked_probabilities = nn.ModuleList(m or nn.Identity() for m in operands), probabilities

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.operands
        scores = query(q) @ key(k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        probabilities = (scores if mask is None else scores + mask).softmax(dim=-1)
        if self.marked_probabilities is not None:
            probabilities = self.marked_probabilities(probabilities)
        return cast(Tensor, probabilities @ value(v))


def marked(student: nn.Module) -> tuple[nn.Module, list[tuple[str, nn.Module]]]:
    """A copy of a prepared model with marks for its quantizers, and those with their names, by the numbers of the marks."""
    quantizers: list[tuple[str, nn.Module]] = []

    def stand_in(name: str, quantizer: nn.Module | None, channels: Tensor | None = None) -> Mark | None:
        if quantizer is None:
            return None
        quantizers.append((name, quantizer))
        return Mark(len(quantizers) - 1, bool(getattr(quantizer, "silu", False)), channels)

    copied = copy.deepcopy(student)
    for name, module in list(copied.named_modules()):
        processor: Any = getattr(module, "processor", None)
        if isinstance(module, QuantizedLayer):
            channels = module.channel_factors()
            if channels is not None:  # r_c goes into the weight for good
                channels = channels.detach()
                module.weight, module.log_channel_scale = nn.Parameter(module.scaled_weight().detach()), None
            for part in ("weight_quantizer", "input_quantizer"):
                own = channels if part == "input_quantizer" else None
                setattr(module, part, stand_in(f"{name}.{part}", getattr(module, part), own))
        elif isinstance(processor, QuantizedAttention):
            parts = ("query", "key", "value", "probabilities")
            *operands, last = (stand_in(f"{name}.{part}", getattr(processor, part)) for part in parts)
            module.set_processor(MarkedAttention(list(operands), last))
    return copied, quantizers
