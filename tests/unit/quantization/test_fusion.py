"""A SiLU fused with the quantizer after it changes nothing but the number of passes."""

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdm_lightning.quantization import (
    LSQActivation,
    MSESearch,
    NormalizedActivation,
    QuantConfig,
    Quantizers,
    calibrate,
    compiled,
    preparation,
    prepare,
    timesteps,
)
from qdm_lightning.quantization.quantizer import ActivationQuantizer, LSQProbability
from qdm_lightning.quantization.taq import GroupedActivation


class Rounded(LSQActivation):
    """Overrides the arithmetic: a fused layer must use it too."""

    def quantize(self, x):
        return torch.round(x * 4) / 4


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )


def prepared(unet, factory=LSQActivation, **settings):
    model = copy.deepcopy(unet).eval()
    prepare(model, QuantConfig(**settings), Quantizers(activation=factory, attention=factory))
    return model


def forward(model, x, t):
    with timesteps(t):
        return model(x, t).sample


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([10, 300, 600, 900])


def fused(model):
    return {name.removesuffix(".input_quantizer") for name, m in model.named_modules() if getattr(m, "silu", False)}


@pytest.mark.parametrize("factory", [LSQActivation, NormalizedActivation, GroupedActivation, Rounded])
def test_fused_equals_unfused(unet, factory, monkeypatch):
    """Calibration, output and gradients; exactly but for the gradient through silu, which torch rounds in another order."""
    x, t = inputs()
    together = prepared(unet, factory)
    monkeypatch.setattr(preparation, "fuse_silu", lambda model: None)
    apart = prepared(unet, factory)
    assert fused(together)
    assert not fused(apart)
    for model in (together, apart):
        calibrate(model, lambda model=model: forward(model, x, t), MSESearch())
    assert all(torch.equal(a, b) for a, b in zip(together.state_dict().values(), apart.state_dict().values(), strict=True))
    outputs = [forward(model, x, t) for model in (together, apart)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_fused(unet):
    model = prepared(unet)
    blocks = [name for name, m in model.named_modules() if type(m).__name__ == "ResnetBlock2D"]
    leaves = ("conv1", "conv2", "time_emb_proj")
    assert fused(model) == {f"{block}.{leaf}" for block in blocks for leaf in leaves} | {"conv_out"}
    assert not any(isinstance(m, nn.SiLU) for block in blocks for m in model.get_submodule(block).modules())


def test_a_block_with_a_float_layer_or_dropout_keeps_its_silu(unet):
    name = "down_blocks.0.resnets.0"
    assert not any(n.startswith(name) for n in fused(prepared(unet, rules={f"{name}.conv2": 32})))
    dropping = copy.deepcopy(unet)
    dropping.get_submodule(name).dropout.p = 0.1
    model = prepared(dropping)
    assert not any(n.startswith(name) for n in fused(model))
    assert isinstance(model.get_submodule(name).nonlinearity, nn.SiLU)
    assert model.get_submodule(name).dropout.p == 0.1


def test_a_float_end_keeps_its_silu(unet):
    model = prepared(unet, rules={"conv_out": 32})
    assert isinstance(model.conv_act, nn.SiLU)


class Follows(LSQActivation):
    """Overrides the grid, by the values of x."""

    def learned_grid(self, x):
        return self.scale * x.detach().abs().mean(), self.zero_point


class Own(ActivationQuantizer):
    """A user's, that knows of no SiLU."""

    def quantize(self, x):
        return torch.round(x * 4) / 4


@pytest.mark.parametrize("kind", [Follows, Rounded, Own, NormalizedActivation])
def test_what_is_overridden_gets_silu_of_x(kind):
    quantizer, x = kind(bits=4), torch.randn(2, 3)
    expected = quantizer(F.silu(x))
    quantizer.silu = True
    assert torch.equal(quantizer(x), expected)


@pytest.mark.parametrize("kind", [LSQActivation, LSQProbability, GroupedActivation])
def test_a_fixed_grid_makes_one_pass_of_both(kind, monkeypatch):
    quantizer, x = kind(bits=4), torch.randn(2, 3)
    quantizer.silu = True
    monkeypatch.setattr(compiled, "forward", lambda x, s, z, limits, silu, channels: (x + silu, s, z))
    with timesteps(torch.tensor([10, 900])):
        assert torch.equal(quantizer(x), x + 1)
