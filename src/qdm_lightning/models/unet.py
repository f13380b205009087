"""U-Nets from their settings."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DModel

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
