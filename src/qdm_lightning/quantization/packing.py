"""Weights at their bits: integer codes laid end to end in bytes, as a prepared model's state is stored, and back.

A layer's float weight W, (O, ...), becomes its codes c = w_hat / s: `<layer>.weight` becomes `<layer>.weight_codes`. From
there w_hat = s c is the same to the last bit, and quantizing it again changes nothing. With scales by input channel, the codes
are of r_c w_c, and r is stored beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdm_lightning.quantization.layers import QuantizedLayer

CODES = "_codes"
"""What the name of a packed tensor ends with, after that of the weight."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of -2^(b-1)..2^(b-1) - 1, any shape and dtype, in ceil(b N / 8) bytes, (bytes,) uint8.

    Code k, 2^(b-1) added, takes the bits k b..k b + b - 1 of the whole, the least first; in a byte too the least comes first.

    Raises:
        ValueError: a code that `bits` cannot hold.

    >>> pack(torch.tensor([-2, 1, 0, -1, 1]), 2).tolist()
    [108, 3]
    """
    unsigned = codes.reshape(-1).to(torch.int64) + 2 ** (bits - 1)
    if len(unsigned) and not 0 <= int(unsigned.min()) <= int(unsigned.max()) < 2**bits:
        raise ValueError(f"codes {int(codes.min())}..{int(codes.max())} do not fit into {bits} bits")
    spread = np.unpackbits(unsigned.to(torch.uint8).numpy()[:, None], axis=1, bitorder="little")[:, :bits]
    return torch.from_numpy(np.packbits(spread, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes that `pack` packed, int8 of `shape`.

    Raises:
        ValueError: the number of bytes does not fit.

    >>> unpack(torch.tensor([108, 3], dtype=torch.uint8), 2, (5,)).tolist()
    [-2, 1, 0, -1, 1]
    """
    count = int(np.prod(shape))
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * bits // 8),):
        raise ValueError(f"{count} codes of {bits} bits are {-(-count * bits // 8)} bytes, not {tuple(packed.shape)}")
    spread = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    unsigned = np.packbits(spread, axis=1, bitorder="little")[:, 0].astype(np.int16)
    return torch.from_numpy(unsigned - 2 ** (bits - 1)).to(torch.int8).reshape(shape)


@torch.no_grad()
def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a prepared model, on the CPU and contiguous, with the weights packed that are a scale times integers.

    As it is stays a weight in float, one that several layers share, and one whose quantizer (a user's own) is no grid with a
    `scale` for the tensor or for each output channel.
    """
    whole = torch.contiguous_format
    state = {name: value.detach().cpu().clone(memory_format=whole) for name, value in model.state_dict().items()}
    owners = Counter(id(layer.weight) for layer in {layer for _, layer in _layers(model)})
    for name, layer in _layers(model):
        codes = _codes(layer)
        if codes is not None and owners[id(layer.weight)] == 1:
            del state[f"{name}weight"]
            state[f"{name}weight{CODES}"] = pack(codes, layer.weight_quantizer.bits)  # type: ignore[union-attr]
    return state


def _codes(layer: QuantizedLayer) -> Tensor | None:
    """c with w_hat = s c to the last bit, of the weight's shape; None where there is no such c."""
    scale = getattr(layer.weight_quantizer, "scale", None)
    if layer.weight_quantizer is None or not isinstance(scale, Tensor) or scale.numel() not in (1, len(layer.weight)):
        return None
    quantized = layer.weight_quantizer(layer.scaled_weight())
    scale = scale.reshape(-1, *[1] * (quantized.ndim - 1))
    codes = (quantized / scale).round()
    inside = layer.weight_quantizer.qmin <= codes.min() and codes.max() <= layer.weight_quantizer.qmax
    return codes.cpu() if inside and torch.equal(scale * codes, quantized) else None


@torch.no_grad()
def load_packed(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load into a prepared model what `packed_state` returned, or a state with float weights, or one with both.

    Raises:
        ValueError: codes of another size.
        RuntimeError: names or shapes that are not the model's.
    """
    weights = {}
    for name, layer in _layers(model):
        packed = state.get(f"{name}weight{CODES}")
        quantizer: Any = layer.weight_quantizer
        if packed is not None and quantizer is not None:
            prefix = f"{name}weight_quantizer."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            quantizer.load_state_dict(own, strict=False)  # what is missing is told with its whole name below
            codes = unpack(packed, quantizer.bits, tuple(layer.weight.shape))
            weight = quantizer.scale.reshape(-1, *[1] * (codes.ndim - 1)) * codes.to(layer.weight.device)
            if layer.log_channel_scale is not None and f"{name}log_channel_scale" in state:
                layer.log_channel_scale.copy_(state[f"{name}log_channel_scale"])
                weight = weight / layer.weight_factors()  # times r_c its codes are the same again
            weights[f"{name}weight"] = weight
    rest = {name: value for name, value in state.items() if name.removesuffix(CODES) not in weights}
    model.load_state_dict({**rest, **weights})


def _layers(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """Quantized layers with the prefix of their names in the state, in every place where they stand."""
    named = model.named_modules(remove_duplicate=False)
    return [(f"{name}." if name else "", module) for name, module in named if isinstance(module, QuantizedLayer)]
