import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdm_lightning import convert
from qdm_lightning.models.ddim_checkpoint import read_checkpoint, unet_from_ddim
from qdm_lightning.models.diffusers_io import load_diffusion, load_unet


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Resnet(nn.Module):
    def __init__(self, ins, outs, temb):
        super().__init__()
        self.norm1, self.conv1 = norm(ins), nn.Conv2d(ins, outs, 3, padding=1)
        self.temb_proj = nn.Linear(temb, outs)
        self.norm2, self.conv2 = norm(outs), nn.Conv2d(outs, outs, 3, padding=1)
        if ins != outs:
            self.nin_shortcut = nn.Conv2d(ins, outs, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


def module(**children):
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


class OriginalUNet(nn.Module):
    """The layout of the DDIM code's network: DDPM's (Ho et al. 2020, appendix B), `up` counted from the finest level."""

    def __init__(self, ch, multipliers, blocks, attention_levels, channels=3):
        super().__init__()
        self.ch, temb = ch, 4 * ch
        widths, self.levels = [ch * m for m in multipliers], range(len(multipliers))
        self.temb = module(dense=nn.ModuleList([nn.Linear(ch, temb), nn.Linear(temb, temb)]))
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        self.down, self.up, last, skips = nn.ModuleList(), nn.ModuleList(), ch, [ch]
        for level in self.levels:
            block, attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                block.append(Resnet(last, widths[level], temb))
                last = widths[level]
                skips.append(last)
                if level in attention_levels:
                    attn.append(Attention(last))
            self.down.append(module(block=block, attn=attn))
            if level != self.levels[-1]:
                self.down[-1].downsample = module(conv=nn.Conv2d(last, last, 3, stride=2))
                skips.append(last)
        self.mid = module(block_1=Resnet(last, last, temb), attn_1=Attention(last), block_2=Resnet(last, last, temb))
        ups = []
        for level in reversed(self.levels):
            block, attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + 1):
                block.append(Resnet(last + skips.pop(), widths[level], temb))
                last = widths[level]
                if level in attention_levels:
                    attn.append(Attention(last))
            ups.insert(0, module(block=block, attn=attn))
            if level:
                ups[0].upsample = module(conv=nn.Conv2d(last, last, 3, padding=1))
        self.up.extend(ups)
        self.norm_out, self.conv_out = norm(last), nn.Conv2d(last, channels, 3, padding=1)

    def forward(self, x, t):
        half = self.ch // 2
        angles = t[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], 1))))
        h = self.conv_in(x)
        skips = [h]
        for level in self.levels:
            for i, block in enumerate(self.down[level].block):
                h = block(h, temb)
                h = self.down[level].attn[i](h) if self.down[level].attn else h
                skips.append(h)
            if level != self.levels[-1]:
                h = self.down[level].downsample.conv(F.pad(h, (0, 1, 0, 1)))
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        for level in reversed(self.levels):
            for i, block in enumerate(self.up[level].block):
                h = block(torch.cat([h, skips.pop()], 1), temb)
                h = self.up[level].attn[i](h) if self.up[level].attn else h
            if level:
                h = self.up[level].upsample.conv(F.interpolate(h, scale_factor=2.0))
        return self.conv_out(F.silu(self.norm_out(h)))


def original(ch=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), channels=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = OriginalUNet(ch, multipliers, blocks, attention_levels, channels)
        for name, parameter in network.named_parameters():  # defaults would leave norms alike and hide a swap
            if "norm" in name:
                nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
        return network.eval()


SHAPES = {
    "two levels, attention at 16": ({}, 32),
    "finest level attends, gray": ({"attention_levels": (0,), "channels": 1}, 16),
    "celeba's kind": ({"multipliers": (1, 2, 2, 4), "blocks": 2, "attention_levels": (2,)}, 64),
}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_converted_network_gives_the_same_output(name):
    settings, size = SHAPES[name]
    network = original(**settings)
    unet = unet_from_ddim(network.state_dict())
    assert unet.config.sample_size == size
    x = torch.randn(2, settings.get("channels", 3), size, size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 977])
    torch.testing.assert_close(unet(x, t).sample, network(x, t), rtol=0, atol=1e-5)


def test_layout_has_the_published_parameters():
    with torch.device("meta"):
        network = OriginalUNet(128, (1, 2, 2, 2), blocks=2, attention_levels=(1,))
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307


def test_command_writes_a_folder_that_is_read(tmp_path, capsys):
    network = original()
    torch.save(network.state_dict(), tmp_path / "model.ckpt")
    assert convert.main([str(tmp_path / "model.ckpt"), str(tmp_path / "out")]) == 0
    assert "parameters, images 3x32x32\n" in capsys.readouterr().out
    assert load_diffusion(tmp_path / "out") == {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "variance_type": "fixed",
    }
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    with torch.no_grad():
        torch.testing.assert_close(load_unet(tmp_path / "out")(x, t).sample, network(x, t), rtol=0, atol=1e-5)


def test_training_list_gives_its_average_and_loses_the_prefix(tmp_path):
    raw = {f"module.{name}": value for name, value in original().state_dict().items()}
    ema = {name: value + 1 for name, value in original().state_dict().items()}
    optimizer = torch.optim.Adam(original().parameters()).state_dict()
    torch.save([raw, optimizer, 3, 500, ema], tmp_path / "ckpt.pth")
    state, which = read_checkpoint(tmp_path / "ckpt.pth")
    assert which == "EMA weights"
    assert torch.equal(state["conv_in.weight"], ema["conv_in.weight"])
    torch.save([raw, optimizer, 3, 500], tmp_path / "ckpt.pth")
    state, which = read_checkpoint(tmp_path / "ckpt.pth")
    assert which.startswith("raw weights")
    assert torch.equal(state["conv_in.weight"], raw["module.conv_in.weight"])


def test_shortcut_under_its_other_name():
    state = original().state_dict()
    renamed = {key.replace("nin_shortcut", "conv_shortcut"): value for key, value in state.items()}
    for (key, a), b in zip(
        unet_from_ddim(renamed).state_dict().items(), unet_from_ddim(state).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key


def widened(state):
    key = "down.1.block.0.nin_shortcut."
    return {**state, key.replace("nin", "conv") + "weight": torch.zeros(64, 32, 3, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "logvar": torch.zeros(1000)}, "1 unknown keys: logvar$"),
        (lambda s: {k: v for k, v in s.items() if "mid.attn" not in k}, r"10 missing keys: mid\.attn_1\.k\.bias, .*\.\.\.$"),
        (lambda s: {k: v for k, v in s.items() if "downsample" not in k}, r"2 missing keys: down\.0\.downsample\.conv\.bias"),
        (
            lambda s: {**s, "conv_out.weight": torch.zeros(6, 32, 3, 3), "conv_out.bias": torch.zeros(6)},
            r"3 channels in and 6 out \(a learned variance\?\)",
        ),
        (lambda s: {"weight": torch.zeros(1)}, r"missing keys: conv_in\.weight, conv_out\.weight, down\.0"),
        (widened, r"1 unknown keys: down\.1\.block\.0\.conv_shortcut\.weight"),
        (
            lambda s: {**s, "mid.attn_1.q.weight": torch.zeros(64, 64, 3, 3)},
            r"mid\.attn_1\.q\.weight of shape \(64, 64, 3, 3\)",
        ),
    ],
)
def test_other_keys_are_listed(change, message):
    with pytest.raises(ValueError, match=message):
        unet_from_ddim(change(original().state_dict()))


def test_open_image_size_is_asked_for():
    state = original(attention_levels=()).state_dict()
    with pytest.raises(ValueError, match="attention at 0 levels, so its image size is open: give --image-size"):
        unet_from_ddim(state)
    assert unet_from_ddim(state, image_size=8).config.sample_size == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file"),
        (b"no checkpoint", "cannot be read"),
        (SimpleNamespace(code=1), "tensors alone"),
        ({"epoch": 3}, "holds no state dict"),
        ({"conv.weight": torch.zeros(1)}, "missing keys: conv_in.weight"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, content, message):
    file = tmp_path / "model.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    assert convert.main([str(file), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()
