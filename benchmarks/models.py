"""The networks that the benchmarks compare."""

from __future__ import annotations

import copy
import math

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.quantization import GroupedActivation, LSQActivation, LSQWeight, QuantConfig, Quantizers, prepare
from qdm_lightning.quantization.layers import QuantizedLayer


def build(name: str) -> nn.Module:
    """The U-Net of a `model` config with random weights, dropout off, channels-last."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("train", overrides=[f"model={name}"])
    torch.manual_seed(0)
    model: nn.Module = instantiate(config.model, dropout=0.0)
    return model.to(memory_format=torch.channels_last)


DEFAULT = Quantizers.with_taq(LSQWeight, LSQActivation, GroupedActivation, "all")
"""What a run trains: TaQ `scale` on every quantized activation."""


def quantized(model: nn.Module, quantizers: Quantizers) -> nn.Module:
    """A W4A4 copy with scales of a plausible size (their values do not change the cost)."""
    copied = copy.deepcopy(model)
    prepare(copied, QuantConfig(), quantizers)
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, GroupedActivation):
                module.seen.fill_(True)
            if isinstance(module, LSQActivation) and not module.symmetric:
                module.log_scale.fill_(math.log(4 / module.qmax))
                module.zero_point.fill_(module.qmax // 2)
            elif isinstance(module, QuantizedLayer) and isinstance(module.weight_quantizer, LSQWeight):
                widest = module.weight.flatten(1).abs().amax(1)
                module.weight_quantizer.log_scale.copy_((widest / module.weight_quantizer.qmax).log())
    return copied
