"""SiLU and the fake quantization of its result in one pass, where diffusers' U-Nets compute the one right before the other."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn

from qdm_lightning.quantization.layers import QuantizedLayer


def fuse_silu(model: nn.Module) -> None:
    """Move every SiLU that feeds quantized layers alone into those layers' quantizers, in place.

    The blocks are diffusers' `ResnetBlock2D` (without a sampler of its own, whose dropout is 0 and is removed: it would come
    between the two) and the end of `UNet2DModel`. A fused pass reads and writes each activation once instead of twice.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            _fuse_block(module)
        elif kind == "UNet2DModel" and isinstance(module.conv_act, nn.SiLU) and _takes_silu(module.conv_out):
            module.conv_out.input_quantizer.silu = True
            module.conv_act = nn.Identity()


def _fuse_block(block: Any) -> None:
    layers = [block.conv1, block.conv2]
    if block.time_emb_proj is not None and not block.skip_time_act:
        layers.append(block.time_emb_proj)
    plain = isinstance(block.nonlinearity, nn.SiLU) and block.upsample is None and block.downsample is None
    if not plain or block.dropout.p > 0 or not all(map(_takes_silu, layers)):
        return
    for layer in layers:
        layer.input_quantizer.silu = True
    block.nonlinearity = nn.Identity()
    block.dropout = nn.Identity()


def _takes_silu(layer: Any) -> TypeGuard[Any]:
    return isinstance(layer, QuantizedLayer) and layer.input_quantizer is not None
