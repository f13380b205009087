"""Checkpoints of the original PyTorch code of DDIM (ermongroup/ddim; the converted DDPM weights have the same layout).

Their U-Net is `UNet2DModel` under other names, with attention in 1x1 convolutions instead of linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from qdm_lightning.base.trust import load_tensors
from qdm_lightning.models.unet import build_unet

ATTENTION_SIZE = 16
"""Where DDPM's and DDIM's networks attend: at 16x16, whatever the size of the image."""

_PREFIXES = (
    (r"conv_norm_out\.", "norm_out."),
    (r"time_embedding\.linear_1\.", "temb.dense.0."),
    (r"time_embedding\.linear_2\.", "temb.dense.1."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block."),
    (r"(down|up)_blocks\.(\d+)\.attentions\.", r"\1.\2.attn."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
)
_LAYERS = (
    ("time_emb_proj", "temb_proj"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
)
_SHOWN_KEYS = 6


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Read a state dict, or the list [model, optimizer, epoch, step, ema] that the training code saves.

    Args:
        path: a file of `torch.save`; it is read with `weights_only=True`, so that no code in it runs.

    Returns:
        Names without `module.` and their tensors, and which of the list's weights they are (empty for a plain state dict).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tensors, or neither of the two forms.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: give a checkpoint, such as model-790000.ckpt")
    try:
        content = load_tensors(path)
    except Exception as error:  # what torch.load raises depends on the bytes
        raise ValueError(f"{path} cannot be read: it must be a file of torch.save that holds tensors alone") from error
    which = ""
    if isinstance(content, list) and len(content) == 5:
        content, which = content[4], "EMA weights"
    elif isinstance(content, list) and len(content) == 4:
        content, which = content[0], "raw weights (the checkpoint holds no EMA)"
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected one, or a list [model, optimizer, epoch, step, ema]")
    return {str(name).removeprefix("module."): value for name, value in content.items()}, which


def unet_from_ddim(state: Mapping[str, Tensor], image_size: int | None = None) -> UNet2DModel:
    """The U-Net of a state dict of the DDIM code's `Model`; its architecture is read off the shapes.

    Args:
        state: from `read_checkpoint`.
        image_size: in pixels; None takes the size whose single level with attention is 16x16.

    Raises:
        ValueError: keys that are missing, unknown or of another shape, or a size that does not follow from them.
    """
    unet = build_unet(**_architecture(state, image_size))
    levels = len(unet.down_blocks)
    given = {_plain_shortcut(key, value): value for key, value in state.items()}
    names = {key: _ddim_key(key, levels) for key in unet.state_dict()}
    check_keys(missing=set(names.values()) - set(given), unknown=set(given) - set(names.values()))
    converted = {}
    for key, own in unet.state_dict().items():
        value = given[names[key]].float()
        if value.dim() == 4 and own.dim() == 2 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]
        if value.shape != own.shape:
            raise ValueError(f"checkpoint has {names[key]} of shape {tuple(value.shape)}, expected {tuple(own.shape)}")
        converted[key] = value
    unet.load_state_dict(converted)
    return unet.eval()


def _architecture(state: Mapping[str, Tensor], image_size: int | None) -> dict[str, Any]:
    """Settings of `build_unet`."""
    levels = 1 + max((int(match[1]) for key in state if (match := re.match(r"down\.(\d+)\.", key))), default=0)
    widths = [f"down.{level}.block.0.conv1.weight" for level in range(levels)]
    check_keys(missing={"conv_in.weight", "conv_out.weight", *widths} - set(state), unknown=set())
    channels, estimated = state["conv_in.weight"].shape[1], state["conv_out.weight"].shape[0]
    if channels != estimated:
        what = f"{channels} channels in and {estimated} out (a learned variance?)"
        raise ValueError(f"checkpoint has {what}: a network that estimates the noise alone is supported")
    attention = [f"down.{level}.attn.0.norm.weight" in state for level in range(levels)]
    if image_size is None:
        if sum(attention) != 1:
            raise ValueError(
                f"checkpoint has attention at {sum(attention)} levels, so its image size is open: give --image-size"
            )
        image_size = ATTENTION_SIZE << attention.index(True)
    return {
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": estimated,
        "block_out_channels": [state[name].shape[0] for name in widths],
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        "layers_per_block": sum(bool(re.fullmatch(r"down\.0\.block\.\d+\.conv1\.weight", key)) for key in state),
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    }


def _ddim_key(key: str, levels: int) -> str:
    """The DDIM code's name of a `UNet2DModel` parameter; its `up` counts from the finest level, diffusers' to it.

    >>> _ddim_key("up_blocks.0.attentions.2.to_out.0.bias", levels=4)
    'up.3.attn.2.proj_out.bias'
    """
    for pattern, prefix in _PREFIXES:
        key = re.sub(f"^{pattern}", prefix, key)
    for theirs, original in _LAYERS:
        key = key.replace(f".{theirs}.", f".{original}.")
    return re.sub(r"^up\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)


def _plain_shortcut(key: str, value: Tensor) -> str:
    """Their two names of a shortcut are one layer where it is 1x1; a 3x3 `conv_shortcut` keeps its name and is refused."""
    wide = value.dim() == 4 and value.shape[2:] != (1, 1)
    return key if wide else key.replace(".conv_shortcut.", ".nin_shortcut.")


def check_keys(missing: set[str], unknown: set[str], code: str = "the DDIM code's U-Net") -> None:
    """Raise ValueError where keys of a state dict are missing or unknown; `code` is whose network it should be."""
    parts = [
        f"{len(keys)} {what} keys: {', '.join(sorted(keys)[:_SHOWN_KEYS])}{', ...' if len(keys) > _SHOWN_KEYS else ''}"
        for what, keys in (("missing", missing), ("unknown", unknown))
        if keys
    ]
    if parts:
        raise ValueError(f"checkpoint is not one of {code}: {'; '.join(parts)}")
