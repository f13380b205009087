"""U-Nets from their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from qdm_lightning.models.spec import UNetConfig

_LISTS = ("block_out_channels", "down_block_types", "up_block_types")


def build_unet(**settings: Any) -> UNet2DModel:
    """Build a U-Net with random weights: `unet(x, t).sample` has the shape of x, (B, C, H, W); t is (B,).

    Args:
        settings: fields of `UNetConfig`; sequences of any kind.

    Raises:
        ValueError: a setting that is unknown, missing or not allowed.
    """
    try:
        config = UNetConfig(**settings)
    except TypeError as error:
        raise ValueError(f"model: {str(error).removeprefix('UNetConfig.__init__() ')}") from None
    arguments = {name: tuple(value) if name in _LISTS else value for name, value in vars(config).items()}
    del arguments["_target_"]
    return UNet2DModel(**arguments)


def label_rows(unet: Any) -> int | None:
    """How many labels, the null label among them, a U-Net takes; None where it takes none."""
    rows: int | None = getattr(getattr(unet, "config", None), "num_class_embeds", None)
    return rows


def example_inputs(unet: Any, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """One image (1, C, H, W) of zeros, a timestep, and a label where the network takes one: arguments of its forward."""
    label = () if label_rows(unet) is None else (torch.zeros(1, dtype=torch.int64),)
    return (torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64), *label)
