"""Costs against figures worked out by hand, and the published ones of the CIFAR-10 U-Net."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from qdm_lightning.models.unet import build_unet
from qdm_lightning.quantization.cost import cost
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.quantization.taq import EMANormalizedActivation

FLOAT = {"weight_bits": 32, "act_bits": 32, "probs_bits": 32, "first_last_bits": 32}


def preset(name):
    settings = yaml.safe_load((Path(__file__).parents[3] / "conf" / "model" / f"{name}.yaml").read_text("utf-8"))
    del settings["defaults"]
    return settings


@pytest.fixture(scope="module")
def cifar10():
    with torch.device("meta"):
        return build_unet(**preset("unet_cifar10"))


def image(channels, size):
    return torch.zeros(1, channels, size, size), torch.zeros(1, dtype=torch.int64)


def conv_net():
    """3x8x8 images to ten numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(128, 10, bias=False),
    )


FIRST, MIDDLE, LAST = 8 * 8 * 8 * 3 * 9, 4 * 4 * 8 * 4 * 9, 128 * 10
"""MACs of `conv_net`: output positions x output channels x input channels of a group x taps."""


def test_small_net_by_hand():
    report = cost(conv_net(), QuantConfig(weight_bits=3, act_bits=5), torch.zeros(1, 3, 8, 8))
    assert [layer.macs for layer in report.layers] == [FIRST, 0, MIDDLE, LAST]
    assert [layer.operands for layer in report.layers] == [(8, 8), (32, 32), (3, 5), (8, 8)]
    assert [layer.parameters for layer in report.layers] == [8 * 27 + 8, 16, 8 * 36 + 8, 1280]
    scales, bias, input_grid, statistics = 8 * 4, 8 * 4, 8, 2 * 8 * 4 + 8
    assert [layer.bytes for layer in report.layers] == [
        8 * 27 + scales + bias + input_grid,
        16 * 4 + statistics,
        8 * 36 * 3 // 8 + scales + bias + input_grid,
        1280 + 10 * 4 + input_grid,
    ]
    ends = FIRST + LAST
    assert report.speedup() == {
        "linear": (ends + MIDDLE) / (ends * 8 / 32 + MIDDLE * 5 / 32),
        "bops": (ends + MIDDLE) * 1024 / (ends * 64 + MIDDLE * 15),
        "bops64": (ends + MIDDLE) / (ends + MIDDLE * 15 / 64),
    }
    assert report.layers[2].speedup() == {"linear": 32 / 5, "bops": 1024 / 15, "bops64": 64 / 15}


def test_scales_by_channel_are_stored_and_cost_nothing_else():
    plain, scaled, learned = (
        cost(conv_net(), QuantConfig(channel_scales=kind), torch.zeros(1, 3, 8, 8)).as_dict()
        for kind in ("off", "rms", "learned")
    )
    assert learned == scaled
    assert scaled["bytes"] - plain["bytes"] == 4 * (3 + 8 + 128)
    same = ("macs", "parameters", "float_bytes")
    assert [scaled[name] for name in same] == [plain[name] for name in same]


def test_codes_are_packed_tensor_by_tensor():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False))
    config = QuantConfig(weight_bits=3, act_bits=32, rules={"0": 3})
    assert cost(model, config, torch.zeros(1, 1, 3, 3)).bytes == 4 + 4 + 8  # 27 bits, a scale, the input's grid


@pytest.mark.parametrize(
    ("settings", "convention", "published"),
    [
        ({"qkv_bits": 8, "probs_bits": 8}, "linear", 7.78),
        ({"qkv_bits": 4, "probs_bits": 4}, "linear", 7.99),
        ({"probs_bits": 4, "first_last_bits": 4, "rules": {"conv_in": 32, "conv_out": 32}}, "bops64", 3.99),
    ],
)
def test_published_speedups(cifar10, settings, convention, published):
    report = cost(cifar10, QuantConfig(**settings), image(3, 32))
    assert round(report.speedup()[convention], 2) == published


def test_cifar10_macs_and_parameters(cifar10):
    figures = cost(cifar10, QuantConfig(), image(3, 32)).as_dict()
    assert {kind: round(macs / 1e9, 3) for kind, macs in figures["macs_by_kind"].items()} == {
        "Conv2d": 5.711,
        "Linear": 0.343,
        "attention": 0.168,
    }
    assert (round(figures["macs"] / 1e9, 3), figures["parameters"]) == (6.222, 35_746_307)
    assert figures["macs"] == sum(layer["macs"] for layer in figures["layers"])
    assert figures["bytes"] == sum(layer["bytes"] for layer in figures["layers"])
    first = "down_blocks.1.attentions.0"  # 256 positions of 256 channels: each product 256^3
    operands = {layer["name"]: (layer["macs"], layer["operands"]) for layer in figures["layers"]}
    assert operands[f"{first}.qkv"] == (256**3, [4, 4])
    assert operands[f"{first}.probs"] == (256**3, [8, 4])


def test_float_costs_what_it_does(cifar10):
    report = cost(cifar10, QuantConfig(**FLOAT), image(3, 32))
    assert report.speedup() == {"linear": 1, "bops": 1, "bops64": 1}
    assert report.bytes == report.float_bytes == 4 * 35_746_307


def test_a_prepared_model_stays_as_it_is():
    unet = build_unet(**preset("unet_digits")).train()
    wanted = cost(unet, QuantConfig(), image(1, 8))
    report = prepare(unet, QuantConfig())
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    assert cost(unet, report, image(1, 8)) == wanted
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in unet.modules())
    assert unet.conv_in.input_quantizer is not None


class Ternary(WeightQuantizer):
    """A user's: one scale for the tensor, and its own idea of bits."""

    def __init__(self, *, bits, weight):
        super().__init__(bits=2, weight=weight)
        self.scale = nn.Parameter(weight.detach().abs().mean())

    def forward(self, weight):
        raise AssertionError("a count runs no quantizer")


class Halving(ActivationQuantizer):
    def quantize(self, x):
        raise AssertionError("a count runs no quantizer")


def test_quantizers_of_the_user():
    own = Quantizers(weight=Ternary, activation=Halving, attention=Halving, probabilities=Halving)
    unet, ours = build_unet(**preset("unet_digits")), QuantConfig(weight_bits=5, act_bits=3)
    theirs = cost(unet, ours, image(1, 8), quantizers=own)
    assert theirs.speedup() == cost(unet, ours, image(1, 8)).speedup()
    conv = next(layer for layer in theirs.layers if layer.name == "down_blocks.0.resnets.0.conv1")
    assert conv.bytes == 32 * 32 * 9 * 5 // 8 + 4 + 32 * 4  # codes, the one scale, biases


def test_tables_of_timestep_groups_are_stored():
    attention = Quantizers(attention=lambda **kw: EMANormalizedActivation(groups=20, **kw))
    unet = build_unet(**preset("unet_digits"))
    rows = zip(*(cost(unet, QuantConfig(), image(1, 8), quantizers=q).layers for q in (attention, None)), strict=True)
    more = {tables.bytes - plain.bytes for tables, plain in rows if tables.name.endswith(".qkv")}
    assert more == {3 * 20 * (4 + 4 + 1)}  # for each of q, k, v: mean and std, and whether the group was seen


class Block(nn.Module):
    """Products that no layer owns, of a size that depends on values."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.mixing = nn.Parameter(torch.eye(4))

    def forward(self, x):
        x = self.inner(x) @ self.mixing
        return x @ self.mixing if bool((x == x).all()) else x


def test_products_without_a_layer_are_float_and_graphs_may_depend_on_values():
    report = cost(nn.Sequential(Block()), QuantConfig(first_last_bits=4), torch.zeros(3, 4))
    layers = {layer.name: layer for layer in report.layers}
    assert (layers["0"].macs, layers["0"].operands) == (2 * 3 * 16, (32, 32))
    assert (layers["0.inner"].macs, layers["0.inner"].operands) == (3 * 16, (4, 4))


def test_fused_attention_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    report = cost(nn.Sequential(layer), QuantConfig(**FLOAT), torch.zeros(1, 5, 8))
    projections, products, feedforward = 4 * 5 * 8 * 8, 2 * 5 * 5 * 8, 2 * 5 * 8 * 16
    assert report.macs == projections + products + feedforward
    assert report.parameters == sum(p.numel() for p in layer.parameters())


def test_shared_tensors_are_stored_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    report = cost(model, QuantConfig(**FLOAT), torch.zeros(1, 4))
    assert (report.macs, report.parameters, report.bytes) == (32, 20, 80)


def test_refusals():
    model, other = conv_net(), conv_net()
    report = prepare(model, QuantConfig())
    with pytest.raises(ValueError, match="not of this model, see 0: give the one that prepare returned"):
        cost(other, report, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="prepared already"):
        cost(model, QuantConfig(), torch.zeros(1, 3, 8, 8))

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Bilinear(2, 2, 2)

        def forward(self, x):
            return self.both(x, x)

    with pytest.raises(ValueError, match="both, a Bilinear, multiplies by an operator"):
        cost(Pair(), QuantConfig(**FLOAT), torch.zeros(1, 2))


def test_table_ends_with_the_totals():
    lines = cost(conv_net(), QuantConfig(), torch.zeros(1, 3, 8, 8)).table().splitlines()
    assert lines[0].split()[:3] == ["module", "kind", "MACs"]
    assert lines[1].split()[:4] == ["0", "Conv2d", "13,824", "224"]
    assert lines[-1].split()[:2] == ["total", "19,712"]
