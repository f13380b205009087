"""diffusers' U-Net blocks over integer layers, with as few passes over the activations as they need.

They hold the children of the blocks whose place they take, under the same names. Group norm, SiLU and rounding are one pass;
skip connections are rounded where they lie, without being concatenated; the residual is added by the convolution; an image is
upsampled after it is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.integer.encoding import encode
from qdm_lightning.integer.grids import Padding, Target
from qdm_lightning.integer.layers import IntegerConv2d


def fuse(model: nn.Module) -> None:
    """Replace the blocks of `model` that run on integer codes with static grids throughout, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            for kind in (IntegerResnetBlock, IntegerDownsample, IntegerUpsample):
                if type(child).__name__ == kind.replaces and kind.suits(child):
                    setattr(parent, name, kind(child))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in ("UpBlock2D", "AttnUpBlock2D") and IntegerUpBlock.suits(child):
                setattr(parent, name, IntegerUpBlock(child))
        if type(parent).__name__ == "UNet2DModel" and IntegerEnd.suits(parent):
            parent.conv_out = IntegerEnd(cast(Any, parent))
            parent.conv_norm_out, parent.conv_act = nn.Identity(), nn.Identity()


def _static(layer: object) -> bool:
    return isinstance(layer, IntegerConv2d) and layer.grid.static and not layer.flat


def _adopt(new: nn.Module, old: Any, *names: str) -> None:
    for name in names:
        setattr(new, name, getattr(old, name))


class IntegerResnetBlock(nn.Module):
    """`ResnetBlock2D`: conv2(silu(norm2(conv1(silu(norm1(x))) + time))) + shortcut(x)."""

    replaces = "ResnetBlock2D"

    @staticmethod
    def suits(block: Any) -> bool:
        """True where its convolutions have static grids and nothing else stands between them."""
        plain = block.upsample is None and block.downsample is None and block.time_embedding_norm == "default"
        layers = [block.conv1, block.conv2, *([] if block.conv_shortcut is None else [block.conv_shortcut])]
        return plain and isinstance(block.nonlinearity, nn.SiLU | nn.Identity) and all(map(_static, layers))

    def __init__(self, block: Any) -> None:
        super().__init__()
        _adopt(self, block, "norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut", "nonlinearity")
        _adopt(self, block, "skip_time_act", "output_scale_factor")

    def forward(self, input_tensor: Tensor | tuple[Tensor, ...], temb: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), or two of them whose channels stand side by side; temb (B, E)."""
        parts = input_tensor if isinstance(input_tensor, tuple) else (input_tensor,)
        silu = isinstance(self.nonlinearity, nn.SiLU)  # else it is the convolutions' own
        first, second, shortcut = (cast(Any, m) for m in (self.conv1, self.conv2, self.conv_shortcut))
        grid = first.grid.at(parts[0])
        targets = [Target(grid, first.padding, norm=True, silu=silu or first.silu, channels=first.channels)]
        if shortcut is not None:
            direct = shortcut.grid.at(parts[0])
            targets.append(Target(direct, shortcut.padding, silu=shortcut.silu, channels=shortcut.channels))
        codes, *rest = encode(parts, targets, cast(nn.GroupNorm, self.norm1))
        hidden = first.compute(codes, grid)
        grid = second.grid.at(hidden)
        target = Target(grid, second.padding, norm=True, silu=silu or second.silu, channels=second.channels)
        codes = encode([hidden], [target], cast(nn.GroupNorm, self.norm2), self._time(temb))[0]
        if shortcut is not None:
            out = second.compute(codes, grid, shortcut.compute(rest[0], direct), overwrite=True)
        else:
            out = second.compute(codes, grid, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor

    def _time(self, temb: Tensor | None) -> Tensor | None:
        if self.time_emb_proj is None or temb is None:
            return None
        project, act = cast(nn.Module, self.time_emb_proj), cast(nn.Module, self.nonlinearity)
        return cast(Tensor, project(temb if self.skip_time_act else act(temb)))


class IntegerUpBlock(nn.Module):
    """`UpBlock2D`, `AttnUpBlock2D`: residual layers that each take a skip connection, attention where there is one."""

    @staticmethod
    def suits(block: Any) -> bool:
        """True where a fused layer can take its skip connection unconcatenated."""
        free = all(getattr(block, name, None) is None for name in ("s1", "s2", "b1", "b2"))
        resnet = getattr(block, "upsample_type", "conv") == "resnet"
        return free and not resnet and any(isinstance(r, IntegerResnetBlock) for r in block.resnets)

    def __init__(self, block: Any) -> None:
        super().__init__()
        _adopt(self, block, "resnets", "upsamplers")
        self.attentions = getattr(block, "attentions", None)

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Sequence[Tensor],
        temb: Tensor | None = None,
        upsample_size: int | None = None,
    ) -> Tensor:
        """As the block whose place it takes."""
        resnets = cast(Sequence[Any], self.resnets)
        attentions = cast(Sequence[Any], self.attentions or [None] * len(resnets))
        for resnet, attention, skip in zip(resnets, attentions, reversed(res_hidden_states_tuple), strict=False):
            pair = (hidden_states, skip)
            hidden_states = resnet(pair if isinstance(resnet, IntegerResnetBlock) else torch.cat(pair, dim=1), temb)
            hidden_states = hidden_states if attention is None else attention(hidden_states)
        for upsampler in cast(Sequence[Any], self.upsamplers or []):
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


class IntegerSampler(nn.Module):
    """What changes the size of an image by a convolution."""

    conv: IntegerConv2d


class IntegerDownsample(IntegerSampler):
    """`Downsample2D`: a convolution of stride 2, perhaps padded on the right and below alone."""

    replaces = "Downsample2D"

    @staticmethod
    def suits(block: Any) -> bool:
        """True where it is a convolution with a static grid."""
        return block.use_conv and block.norm is None and _static(block.conv)

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv = block.conv
        self.more = (0, 1, 0, 1) if block.padding == 0 else (0, 0, 0, 0)

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        conv = self.conv
        grid = conv.grid.at(hidden_states)
        padding = cast(Padding, tuple(a + b for a, b in zip(conv.padding, self.more, strict=True)))
        target = Target(grid, padding, silu=conv.silu, channels=conv.channels)
        return conv.compute(encode([hidden_states], [target])[0], grid)


class IntegerUpsample(IntegerSampler):
    """`Upsample2D`: nearest neighbours and a convolution."""

    replaces = "Upsample2D"

    @staticmethod
    def suits(block: Any) -> bool:
        """True where it is an interpolation and a convolution with a static grid."""
        conv = getattr(block, block.name, None)
        return block.use_conv and not block.use_conv_transpose and block.interpolate and block.norm is None and _static(conv)

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv = getattr(block, block.name)

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *_: Any) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W), or to `output_size`."""
        conv = self.conv
        repeat = 2 if output_size is None else 1
        x = hidden_states if output_size is None else F.interpolate(hidden_states, size=output_size, mode="nearest")
        grid = conv.grid.at(x)
        target = Target(grid, conv.padding, silu=conv.silu, repeat=repeat, channels=conv.channels)
        return conv.compute(encode([x], [target])[0], grid)


class IntegerEnd(nn.Module):
    """The end of `UNet2DModel`: conv_out(silu(conv_norm_out(x)))."""

    @staticmethod
    def suits(model: Any) -> bool:
        """True where its convolution has a static grid."""
        return _static(model.conv_out) and isinstance(model.conv_act, nn.SiLU | nn.Identity)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.conv = model.conv_norm_out, model.conv_out
        self.silu = isinstance(model.conv_act, nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, O, H, W)."""
        grid = self.conv.grid.at(x)
        conv = self.conv
        target = Target(grid, conv.padding, norm=True, silu=self.silu or conv.silu, channels=conv.channels)
        return cast(Tensor, conv.compute(encode([x], [target], self.norm)[0], grid))
