"""Settings of the networks. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdm_lightning.base.checks import at_least, between, one_of, positive

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")


@dataclass(kw_only=True)
class UNetConfig:
    """A diffusers `UNet2DModel` (config group `model`); a preset gives what has no default here.

    Args:
        sample_size: height and width of an image in pixels; halved between two levels.
        in_channels: channels of an image.
        out_channels: as many, because the network estimates the noise of each pixel, or twice as many, where it estimates the
            variance too (`diffusion.variance_type`).
        block_out_channels: channels of each level, from the finest.
        down_block_types, up_block_types: block of each level, downwards from the finest and upwards to it.
        layers_per_block: residual layers of a level (one more on the way up).
        attention_head_dim: channels of an attention head; None: one head of all channels.
        add_attention: attention in the middle block.
        norm_num_groups, norm_eps: groups and epsilon of every GroupNorm.
        dropout: probability inside each residual layer while the teacher trains.
        downsample_padding: 1 pads both sides, 0 pads right and bottom alone, as DDPM's code.
        freq_shift, flip_sin_to_cos: form of the sinusoidal time embedding; 1 and false are DDPM's.
        resnet_time_scale_shift: `default` adds the time embedding, `scale_shift` modulates the norm with it.
        downsample_type, upsample_type: of blocks with attention, `conv` or `resnet`: a residual layer halves or doubles.
        attn_norm_num_groups: groups of the norm before the middle block's attention; None: `norm_num_groups` where the time
            embedding is added, no norm where it modulates, as diffusers has it.
        num_class_embeds: labels that a class-conditional network takes: the classes of the data, and one more, the null
            label, where `diffusion.label_dropout` drops some. None: a network without labels.

    Raises:
        ValueError: lists of different length, an unknown block, a size that cannot be halved, groups or heads that do not
            divide the channels, or a value outside its range.
    """

    _target_: str = "qdm_lightning.models.unet.build_unet"
    sample_size: int
    in_channels: int
    out_channels: int
    block_out_channels: list[int]
    down_block_types: list[str]
    up_block_types: list[str]
    layers_per_block: int = 2
    attention_head_dim: int | None = None
    add_attention: bool = True
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    downsample_padding: int = 1
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    resnet_time_scale_shift: str = "default"
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attn_norm_num_groups: int | None = None
    num_class_embeds: int | None = None

    def __post_init__(self) -> None:
        for name in ("sample_size", "in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
            at_least(f"model.{name}", getattr(self, name), 1)
        positive("model.norm_eps", self.norm_eps)
        between("model.dropout", self.dropout, 0.0, 0.999)
        one_of("model.downsample_padding", self.downsample_padding, (0, 1))
        one_of("model.freq_shift", self.freq_shift, (0, 1))
        for name in ("downsample_type", "upsample_type"):
            one_of(f"model.{name}", getattr(self, name), ("conv", "resnet"))
        for name in ("num_class_embeds", "attn_norm_num_groups"):
            if getattr(self, name) is not None:
                at_least(f"model.{name}", getattr(self, name), 1)
        if self.attn_norm_num_groups is not None and self.block_out_channels[-1] % self.attn_norm_num_groups:
            raise ValueError(
                f"model.attn_norm_num_groups={self.attn_norm_num_groups} does not divide {self.block_out_channels[-1]} of "
                "model.block_out_channels"
            )
        one_of("model.resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        levels = len(self.block_out_channels)
        at_least("number of model.block_out_channels", levels, 1)
        for name, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            blocks = getattr(self, name)
            if len(blocks) != levels:
                raise ValueError(f"model.{name} has {len(blocks)} entries, model.block_out_channels {levels}: give as many")
            for block in blocks:
                one_of(f"model.{name}", block, allowed)
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"model.out_channels={self.out_channels} is not allowed: give model.in_channels={self.in_channels}, or twice "
                "as many for a learned variance"
            )
        if self.sample_size % 2 ** (levels - 1):
            raise ValueError(
                f"model.sample_size={self.sample_size} cannot be halved {levels - 1} times: "
                f"it must be a multiple of {2 ** (levels - 1)}"
            )
        for channels in self.block_out_channels:
            at_least("model.block_out_channels", channels, 1)
            for name in ("norm_num_groups", "attention_head_dim"):
                divisor = getattr(self, name)
                if divisor is not None and (divisor < 1 or channels % divisor):
                    raise ValueError(f"model.{name}={divisor} does not divide {channels} of model.block_out_channels")


ADDED = {"downsample_type": "conv", "upsample_type": "conv", "attn_norm_num_groups": None, "num_class_embeds": None}
"""Settings of `UNetConfig` that came after version 0.1, and how its networks were."""


def key_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a network for the key of a cache: what came after version 0.1 where it makes another network."""
    return {name: value for name, value in model.items() if name not in ADDED or value != ADDED[name]}


def check_classes(rows: int | None, classes: int | None, label_dropout: float) -> None:
    """Raise ValueError unless network and data have the same classes, and a null label where labels are dropped.

    Args:
        rows: `num_class_embeds` of the network.
        classes: of the data's labels; None where they have none.
        label_dropout: `diffusion.label_dropout`.
    """
    if rows is None and label_dropout:
        way = f"type model.num_class_embeds={classes + 1}, or " if classes else ""
        raise ValueError(
            f"diffusion.label_dropout={label_dropout:g} drops class labels, and this network takes none: {way}leave it out"
        )
    if rows is None:
        return
    if classes is None:
        raise ValueError(
            f"the network takes class labels (num_class_embeds={rows}), and the data have none: "
            "take data=digits, cifar10 or imagenet64, or a network without"
        )
    wanted = classes + (label_dropout > 0)
    if rows != wanted:
        has = f"{classes}, and a null label for those that are dropped" if label_dropout else str(classes)
        null = ", or diffusion.label_dropout=0.1 where its last one stands for no class" if rows == classes + 1 else ""
        raise ValueError(
            f"the network takes {rows} class labels (num_class_embeds), the data have {has}: "
            f"type model.num_class_embeds={wanted}{null}"
        )


def check_variance_channels(channels: int, estimated: int, variance_type: str) -> None:
    """Raise ValueError unless the channels of a network, in and out, are those of `diffusion.variance_type`."""
    learned = estimated == 2 * channels
    if learned and variance_type == "fixed":
        raise ValueError(
            f"the network has {estimated} channels out, for {channels} of an image: it estimates its variance too, type "
            "diffusion.variance_type=learned_range"
        )
    if not learned and variance_type != "fixed":
        raise ValueError(
            f"the network has {estimated} channels out, for {channels} of an image: it estimates no variance, leave out "
            f"diffusion.variance_type={variance_type}"
        )


@dataclass(kw_only=True)
class PretrainedConfig:
    """`model=pretrained`: architecture and weights of a diffusers folder or hub id, `model.path=<folder>`."""

    _target_: str = "qdm_lightning.models.diffusers_io.load_unet"
    path: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("model=pretrained needs a path: type model.path=<folder>")
