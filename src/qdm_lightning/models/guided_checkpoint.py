"""Checkpoints of improved-diffusion and guided-diffusion (openai; arXiv 2102.09672, 2105.05233): with classes or without, a
learned variance or without.

Their U-Net is `UNet2DModel` under other names, with q, k, v of all heads in one 1x1 convolution. The file does not say the size
of the images, the heads, in which order q, k, v lie, and the process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from qdm_lightning.models.ddim_checkpoint import check_keys
from qdm_lightning.models.unet import build_unet

CODE = "the improved-diffusion or guided-diffusion code's U-Net"

GROUPS = 32
"""Of every norm."""

_FIXED = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "class_embedding.": "label_emb.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
}


def is_guided(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of this code."""
    return "time_embed.0.weight" in state


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The attention heads of a network, which its file does not say: one of the two.

    Args:
        count: heads of every attention (`num_heads`).
        channels: of a head (`num_head_channels`).
        new_order: q, k, v of all heads lie side by side (`use_new_attention_order`), not head by head.
    """

    count: int | None = None
    channels: int | None = None
    new_order: bool = False

    def dim(self, widths: set[int]) -> int | None:
        """`attention_head_dim` of the U-Net whose attentions have these widths; None: one head.

        Raises:
            ValueError: neither is given, or both are, they do not divide a width, or heads would differ in width, which
                `UNet2DModel` cannot hold.
        """
        if not widths or self.count == 1:
            return None
        if (self.count is None) == (self.channels is None):
            raise ValueError(
                "the checkpoint does not say how many heads its attentions have: give --num-heads or --num-head-channels"
            )
        dims = {self.channels} if self.count is None else {width / self.count for width in widths}
        several = " and ".join(f"{dim:g}" for dim in sorted(filter(None, dims)))
        if len(dims) > 1:
            raise ValueError(
                f"heads of {several} channels in one network are not supported: UNet2DModel has heads of one width"
            )
        (dim,) = dims
        if dim is None or dim < 1 or any(width % dim for width in widths):
            raise ValueError(f"heads of {several} channels do not divide attentions of {sorted(widths)}")
        return int(dim)


def unet_from_guided(state: Mapping[str, Tensor], image_size: int | None, heads: Heads) -> UNet2DModel:
    """The U-Net of a state dict; its architecture is read off names and shapes.

    Args:
        state: from `read_checkpoint`.
        image_size: in pixels.
        heads: of the attentions.

    Raises:
        ValueError: no `image_size`, heads that do not fit, or keys that are missing, unknown or of another shape.
    """
    if image_size is None:
        raise ValueError("the checkpoint does not say for which size of images it is: give --image-size")
    settings, per_level = _architecture(state, image_size, heads)
    unet = build_unet(**settings)
    names = {key: _their_key(key, per_level, settings) for key in unet.state_dict()}
    check_keys(missing=set(names.values()) - set(state), unknown=set(state) - set(names.values()), code=CODE)
    converted = {}
    for key, own in unet.state_dict().items():
        value = state[names[key]].float()
        if names[key].rpartition(".")[0].endswith("qkv"):
            value = _part(value, key, settings["attention_head_dim"], heads.new_order)
        if value.dim() == own.dim() + 1 and value.shape[-1] == 1:
            value = value[..., 0]
        if value.shape != own.shape:
            raise ValueError(f"checkpoint has {names[key]} of shape {tuple(value.shape)}, expected {tuple(own.shape)}")
        converted[key] = value
    unet.load_state_dict(converted)
    return unet.eval()


def _architecture(state: Mapping[str, Tensor], image_size: int, heads: Heads) -> tuple[dict[str, Any], int]:
    """Settings of `build_unet`, and the residual layers of a level."""
    needed = {"input_blocks.0.0.weight", "input_blocks.1.0.emb_layers.1.weight", "out.2.weight"}
    check_keys(missing=needed - set(state), unknown=set(), code=CODE)
    blocks = 1 + max(int(match[1]) for key in state if (match := re.match(r"input_blocks\.(\d+)\.", key)))
    ends = [match for key in state if (match := re.fullmatch(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.2)\.weight", key))]
    per_level = min((int(match[1]) for match in ends), default=blocks - 1)  # of a level, that with the upsampler is the last
    kind = "resnet" if any(match[2] != "conv" for match in ends) else "conv"
    first = range(1, blocks, per_level + 1)  # block of each level's first residual layer
    check_keys(missing={f"input_blocks.{k}.0.out_layers.3.weight" for k in first} - set(state), unknown=set(), code=CODE)
    widths = [state[f"input_blocks.{k}.0.out_layers.3.weight"].shape[0] for k in first]
    attends = [f"input_blocks.{k}.1.qkv.weight" in state for k in first]
    plain = ("DownBlock2D", "UpBlock2D") if kind == "conv" else ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    wide = state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
    attention = {value.shape[1] for key, value in state.items() if key.endswith("qkv.weight")}
    return {
        "sample_size": image_size,
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if there else plain[0] for there in attends],
        "up_block_types": ["AttnUpBlock2D" if there else plain[1] for there in reversed(attends)],
        "layers_per_block": per_level,
        "attention_head_dim": heads.dim(attention),
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "downsample_type": kind,
        "upsample_type": kind,
        "resnet_time_scale_shift": "scale_shift" if wide else "default",
        "num_class_embeds": len(state["label_emb.weight"]) if "label_emb.weight" in state else None,
    }, per_level


def _their_key(key: str, per_level: int, settings: Mapping[str, Any]) -> str:
    """Their name of a `UNet2DModel` parameter."""
    for prefix, theirs in _FIXED.items():
        if key.startswith(prefix):
            return theirs + _their_layer(key.removeprefix(prefix))
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    assert match is not None
    way, level, part, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    resizes = part.endswith("samplers")
    block = level * (per_level + 1) + (per_level if resizes else place) + (way == "down")
    sub = 1 if part == "attentions" else 0
    if part == "upsamplers":
        sub = 2 if settings["up_block_types"][level].startswith("Attn") else 1
    if resizes and rest.startswith("conv."):
        rest = rest.replace("conv.", "op." if way == "down" else "conv.", 1)
        return f"{'input' if way == 'down' else 'output'}_blocks.{block}.{sub}.{rest}"
    return f"{'input' if way == 'down' else 'output'}_blocks.{block}.{sub}.{_their_layer(rest)}"


def _their_layer(name: str) -> str:
    for ours, theirs in _LAYERS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def _part(qkv: Tensor, key: str, head_dim: int | None, new_order: bool) -> Tensor:
    """The rows of q, k or v, (C, ...), of those of all three, (3 C, ...): head by head, or one after another."""
    which = "qkv".index(key.rpartition(".")[0][-1])
    width = len(qkv) // 3
    if new_order:
        return qkv[which * width : (which + 1) * width]
    dim = head_dim or width
    return torch.cat([head[which * dim : (which + 1) * dim] for head in qkv.split(3 * dim)])
