"""SiLU and the fake quantization of its result in one pass, where diffusers' U-Nets compute the one right before the other."""

from __future__ import annotations

from typing import Any

from torch import nn

from qdm_lightning.quantization.layers import QuantizedLayer


def fuse_silu(model: nn.Module) -> None:
    """Move every SiLU that feeds quantized layers alone into those layers' quantizers, in place.

    The blocks are diffusers' `ResnetBlock2D` (without a sampler of its own, whose dropout is 0 and is removed: it would come
    between the two) and the end of `UNet2DModel`. A fused pass reads and writes each activation once instead of twice.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D" and _is_plain(module):
            takes_time = module.time_emb_proj is not None and not module.skip_time_act
            layers = [module.conv1, module.conv2, *([module.time_emb_proj] if takes_time else [])]
            _fuse(module, layers, "nonlinearity", "dropout")
        elif kind == "UNet2DModel" and isinstance(module.conv_act, nn.SiLU):
            _fuse(module, [module.conv_out], "conv_act")


def _is_plain(block: Any) -> bool:
    resamples = block.upsample is not None or block.downsample is not None
    return isinstance(block.nonlinearity, nn.SiLU) and not resamples and block.dropout.p == 0


def _fuse(module: nn.Module, layers: list[Any], *removed: str) -> None:
    """Where all of `layers` have a quantizer, they take over what the children `removed` do."""
    if all(isinstance(layer, QuantizedLayer) and layer.input_quantizer is not None for layer in layers):
        for layer in layers:
            layer.input_quantizer.silu = True
        for name in removed:
            setattr(module, name, nn.Identity())
