"""What becomes integer, what stays float, and what is refused; a small U-Net against its simulation."""

import copy
import functools
import pickle

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from qdm_lightning.integer import to_integer, verify
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization import (
    ActivationQuantizer,
    EMANormalizedActivation,
    GroupedActivation,
    LSQActivation,
    LSQWeight,
    MinMax,
    NormalizedActivation,
    QuantConfig,
    Quantizers,
    calibrate,
    compiled,
    prepare,
)
from qdm_lightning.quantization.functional import fake_quantize
from qdm_lightning.quantization.timestep import timesteps

TAQ = {
    "off": None,
    "normalize": NormalizedActivation,
    "ema": functools.partial(EMANormalizedActivation, groups=4),
    "scale": functools.partial(GroupedActivation, groups=4),
}
STEPS = torch.arange(0, 1000, 125)


class Network(nn.Module):
    """The layers alone, at odd sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 12, (3, 1), stride=2, padding=(2, 0), bias=False)
        self.groups = nn.Conv2d(12, 12, 3, padding="same", dilation=2, groups=3)
        self.line = nn.Conv1d(12, 6, 3, padding=1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        x = self.groups(self.wide(self.first(x)).tanh())
        return self.linear(self.line(x.flatten(2)).mT)


def calibrated(model, bits, taq="off", scope="all", shape=(3, 9, 7), channels="off", **quantizers):
    made = Quantizers.with_taq(LSQWeight, LSQActivation, TAQ[taq], scope)
    config = QuantConfig(weight_bits=bits, act_bits=bits, channel_scales=channels)
    prepare(model, config, Quantizers(**vars(made) | quantizers))
    x = torch.randn(len(STEPS), *shape)

    def run():
        with torch.no_grad():
            if isinstance(model, UNet2DModel):
                Denoiser(model)(x, STEPS)
            else:
                with timesteps(STEPS):
                    model(x)

    calibrate(model, run, MinMax())
    return model.eval()


def unet(bits, taq="off", scope="qkv", channels="off", **options):
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "downsample_padding": 0,
        "attention_head_dim": 8,
    }
    model = UNet2DModel(**settings | options).to(memory_format=torch.channels_last).eval()
    return Denoiser(calibrated(model, bits, taq, scope, (3, 8, 8), channels))


@pytest.fixture(params=["off", "auto"])
def _mode(request):
    compiled.set_mode(request.param)


@pytest.mark.usefixtures("_mode")
@pytest.mark.parametrize("taq", TAQ)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_layers_of_any_kind_equal_the_simulation(bits, taq):
    model = calibrated(Network(), bits, taq, channels="rms" if bits % 2 else "off")
    integer, report = to_integer(model)
    assert report.float_layers == []
    assert [type(m).__name__ for m in integer.children()] == ["IntegerConv2d"] * 4 + ["IntegerLinear"]
    x = torch.randn(3, 3, 9, 7)
    for t in (torch.tensor([400]), torch.tensor([10, 600, 999])):
        with torch.no_grad(), timesteps(t):
            for found in verify(model, integer, lambda network: network(x)):
                assert found.error < 5e-6, found
                assert found.flipped <= 1, found
                assert found.farthest <= 1, found


@pytest.mark.parametrize("taq", TAQ)
@pytest.mark.parametrize(
    ("mode", "bits", "scope", "channels"),
    [("auto", 4, "all", "rms"), ("off", 8, "qkv", "off"), ("off", 4, "attention", "learned")],
)
def test_a_unet_equals_its_simulation_layer_by_layer(mode, bits, taq, scope, channels):
    compiled.set_mode(mode)
    model = unet(bits, taq, scope, channels)
    integer, report = to_integer(model)
    assert report.float_layers == []
    x = torch.randn(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    for t in (torch.tensor([300, 300, 300]), torch.tensor([10, 600, 999])):
        found = verify(model, integer, lambda network, t=t: network(x, t))
        assert len(found) == len(report.rows)
        for one in found:
            assert one.error < 5e-6 or one.name.endswith("processor"), one
            assert one.farthest <= 1, one
        assert sum(one.flipped for one in found) <= 1e-4 * sum(one.codes for one in found) + 1


def test_modes_compute_the_same():
    """A flipped code is amplified, so blocks are compared on one activation, not networks."""
    model = unet(4, "scale", "all")
    integer = to_integer(model)[0]
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 700])
    outputs = []
    for mode in ("off", "auto"):
        compiled.set_mode(mode)
        with torch.no_grad():
            outputs.append(integer(x, t))
    assert (outputs[0] - outputs[1]).abs().max() < 0.02 * outputs[0].abs().max()
    assert ((outputs[0] - outputs[1]).abs() > 1e-5).float().mean() < 0.5


def test_the_model_is_left_alone_and_the_result_can_be_copied():
    model = unet(4)
    before = copy.deepcopy(model.state_dict())
    integer = to_integer(model)[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([5])
    expected = integer(x, t)
    assert torch.equal(copy.deepcopy(integer)(x, t), expected)
    assert torch.equal(pickle.loads(pickle.dumps(integer))(x, t), expected)
    assert not any(p.requires_grad for p in integer.parameters())


def test_a_group_that_was_never_seen_is_refused_as_in_the_simulation():
    model = unet(4, "scale")
    for module in model.modules():
        if isinstance(module, GroupedActivation):
            module.seen[1] = False
    integer = to_integer(model)[0]
    x = torch.randn(2, 3, 8, 8)
    integer(x, torch.tensor([0, 999]))
    for network in (model, integer, integer.unet):
        with pytest.raises(RuntimeError, match=r"GroupedActivation: timestep groups \[1\] of 4 were never seen"):
            network(x, torch.tensor([0, 300]))
        with pytest.raises(ValueError, match=r"timesteps 0..1000 lie outside \[0, 1000\)"):
            network(x, torch.tensor([0, 1000]))
    with pytest.raises(RuntimeError, match="GroupedActivation needs the timesteps"):
        UNet2DModel.forward(integer.unet, x, torch.tensor([0, 300]))  # past its own telling


@pytest.mark.usefixtures("_mode")
def test_a_nan_is_no_code():
    integer = to_integer(calibrated(Network(), 4))[0]
    x = torch.randn(2, 3, 9, 7)
    x[1, 2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="an activation is not a number"):
        integer(x)


def test_layers_of_32_bits_stay_float_and_say_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1))
    prepare(model, QuantConfig(weight_bits=32, act_bits=32, first_last_bits=8))
    calibrate(model, lambda: model(torch.randn(2, 3, 4, 4)), MinMax())
    integer, report = to_integer(model)
    assert report.float_layers == [("1", "32 bits by its configuration")]
    assert isinstance(integer[1], nn.Conv2d)
    assert report.summary() == "2 of 3 layers and attentions multiply integer codes"
    assert "32 bits by its configuration" in report.table()


class OwnGrid(ActivationQuantizer):
    """A user's quantizer that says its grid."""

    claimed = 1.0

    def initialize(self, observer, calibrator):
        pass

    def grid(self, x):
        return torch.tensor([0.1 * self.claimed]), torch.tensor([float(2 ** (self.bits - 1))])

    def quantize(self, x):
        return fake_quantize(x, torch.tensor([0.1]), torch.tensor([float(2 ** (self.bits - 1))]), 0, self.qmax)


class LyingGrid(OwnGrid):
    claimed = 1.1


class NoGrid(OwnGrid):
    grid = None


def test_a_users_quantizer_with_a_grid_converts():
    model = calibrated(Network(), 4, activation=OwnGrid)
    integer, report = to_integer(model)
    assert report.float_layers == []
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(integer(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(NoGrid, r"its quantizer NoGrid has no grid\(x\)"), (LyingGrid, r"the grid\(x\) of its quantizer LyingGrid is not what")],
)
def test_another_one_is_refused_unless_float_is_allowed(kind, reason):
    model = calibrated(Network(), 4, activation=kind)
    with pytest.raises(ValueError, match=rf"first can't run on integer codes, {reason}"):
        to_integer(model)
    with pytest.raises(ValueError, match="wide can't run on integer codes"):
        to_integer(model, allow_float=["first"])
    integer, report = to_integer(model, allow_float=["*"])
    assert [name for name, _ in report.float_layers] == ["first", "wide", "groups", "line", "linear"]
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(integer(x), model(x))
    assert not any(type(m).__name__.startswith("Integer") for m in integer.modules())


class HalfSteps(LSQWeight):
    """Its weights lie between the codes of its scale."""

    def forward(self, weight):
        return super().forward(weight) + self.scale.view(-1, *[1] * (weight.ndim - 1)) / 2


def test_weights_off_their_grid_are_refused():
    model = calibrated(Network(), 4, weight=HalfSteps)
    with pytest.raises(ValueError, match="the weights of its quantizer HalfSteps are not scale"):
        to_integer(model)


def test_what_makes_no_sense_is_one_line():
    with pytest.raises(ValueError, match="the model has full precision"):
        to_integer(nn.Sequential(nn.Conv2d(1, 1, 1)))
    model = calibrated(Network(), 4)
    with pytest.raises(ValueError, match="the pattern 'fist' matches no layer"):
        to_integer(model, allow_float=["fist"])
    with pytest.raises(ValueError, match="already"):
        to_integer(to_integer(model)[0])
    with pytest.raises(ValueError, match=r"torch.float64: integer execution is made from float32"):
        to_integer(copy.deepcopy(model).double())
    with pytest.raises(ValueError, match="the model is on meta: integer execution is for the CPU"):
        to_integer(copy.deepcopy(model).to("meta"))
    circular = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="0 can't run on integer codes, its padding_mode is circular"):
        to_integer(calibrated(circular, 8))
