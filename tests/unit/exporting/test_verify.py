"""Every quantizer in every form, as ONNX Runtime and OpenVINO execute it: fed with the same codes, the student's products."""

import copy
from functools import partial

import pytest
import torch
from diffusers import UNet2DModel

from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.exporting import lowering
from qdm_lightning.exporting.marks import marked
from qdm_lightning.exporting.operators import Translator
from qdm_lightning.exporting.verify import verify, verify_products, verify_wiring
from qdm_lightning.models.denoiser import Denoiser, VelocityDenoiser
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
from qdm_lightning.quantization.timestep import current_timesteps
from qdm_lightning.runtimes import network
from qdm_lightning.runtimes.network import RuntimeNetwork

TAQ = {
    "off": None,
    "ema": partial(EMANormalizedActivation, groups=4),
    "scale": partial(GroupedActivation, groups=4),
    "normalize": NormalizedActivation,
}
SHAPE, T = (2, 8, 8), 1000


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compiled.set_mode("off")
    yield
    compiled.set_mode("auto")
    torch.set_num_threads(threads)


def student(taq="off", bits=4, scope="all", channels=(8, 16), weight=LSQWeight, activation=LSQActivation, **settings):
    """A U-Net with padded convolutions, attention, a downsampler that pads by itself, an upsampler and shortcuts."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["DownBlock2D"] * len(channels),
        up_block_types=["UpBlock2D"] * len(channels),
        attention_head_dim=8,
        downsample_padding=0,
    ).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)  # means away from zero, where zero points matter
    quantizers = Quantizers.with_taq(weight, activation, TAQ[taq], scope)
    prepare(unet, QuantConfig(**{"weight_bits": bits, "act_bits": bits, **settings}), quantizers)
    denoiser = Denoiser(unet).eval()
    with torch.no_grad():
        calibrate(unet, lambda: denoiser(torch.randn(16, *SHAPE), torch.arange(20, T, 62)), MinMax())
    return unet


@pytest.fixture(scope="module")
def traced():
    return Translator(Denoiser(student()), SHAPE)


@pytest.fixture
def translator(traced):
    """`translator(taq, bits, ...)`: the traced network with other quantizers: tracing takes longer than all the rest."""

    def of(*arguments, **settings):
        found = copy.copy(traced)
        found.quantizers = marked(student(*arguments, **settings))[1]
        assert [name for name, _ in found.quantizers] == [name for name, _ in traced.quantizers]
        return found

    return of


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_wiring(traced, runtime):
    assert verify_wiring(traced, runtime, T) < 1e-5


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("taq", TAQ)
def test_onnxruntime(translator, taq, bits):
    verify_products(translator(taq, bits), "onnxruntime", T)


@pytest.mark.parametrize(
    ("taq", "bits", "scope"), [("off", 8, "all"), ("ema", 4, "all"), ("scale", 3, "attention"), ("normalize", 2, "all")]
)
def test_openvino(translator, taq, bits, scope):
    verify_products(translator(taq, bits, scope), "openvino", T)


def test_scales_by_channel_and_a_network_that_estimates_v():
    """They are part of the graph: r_c in the weights, 1 / r_c before the codes, and the noise that v and x_t stand for."""
    unet = student("scale", 4, channel_scales="rms")
    found = Translator(VelocityDenoiser(unet, DiffusionConfig(prediction_type="v_prediction")), SHAPE)
    for runtime in ("onnxruntime", "openvino"):
        assert verify_wiring(found, runtime, T) < 1e-5
        verify_products(found, runtime, T)


@pytest.mark.parametrize(("runtime", "batch"), [("onnxruntime", None), ("openvino", None), ("openvino", 2)])
def test_every_product_runs_on_integers(translator, runtime, batch):
    """As the runtime reports it: 2 layers of time embedding, 8 of it in blocks, 25 convolutions, attention's 4 and 2."""
    found = translator("normalize", 4)
    kernels = RuntimeNetwork(found.translate({}), runtime, 1, batch=batch).kernels()
    assert kernels["float"] == 0
    assert kernels["int8"] == len(found.products) == 41


def test_a_processor_whose_sums_saturate(translator, monkeypatch):
    monkeypatch.setattr(network, "sums_bytes", lambda: False)
    found = translator("scale", 8)
    assert RuntimeNetwork(found.translate({}), "onnxruntime", 1).kernels()["int8"] == 0
    verify_products(found, "onnxruntime", T)
    with pytest.raises(ValueError, match="runtime=openvino would be wrong on this processor"):
        RuntimeNetwork(found.translate({}), "openvino", 1)


def break_offset(monkeypatch):
    signed = lowering._signed_codes
    monkeypatch.setattr(lowering, "_signed_codes", lambda *args: lowering.Codes(signed(*args).values, signed(*args).scale))


def break_zero_point(monkeypatch):
    unsigned = lowering._unsigned
    monkeypatch.setattr(lowering, "_unsigned", lambda g, x, s, z, b: unsigned(g, x, s, z + 1, b))


def break_packing(monkeypatch):
    monkeypatch.setattr(lowering, "PACKED_BITS", 8)  # codes of 8 bits in 4


def break_table(monkeypatch):
    monkeypatch.setattr(lowering, "_grid_of_group", lambda g, q, n: tuple(g.number(float(v[0])) for v in table(q)))


def table(quantizer):
    with torch.no_grad(), lowering.timesteps(torch.tensor([0])):
        return quantizer.grid(torch.zeros(1, 1))


@pytest.mark.parametrize("fault", [break_offset, break_zero_point, break_packing, break_table])
def test_a_fault_is_seen(translator, monkeypatch, fault):
    fault(monkeypatch)
    with pytest.raises(RuntimeError, match=r"deviates by|differ"):
        verify_products(translator("scale", 8, "attention"), "onnxruntime", T)


def test_a_batch_of_any_size_and_mixed_timesteps(translator):
    """Each sample is computed by its own timestep and its own moments, whatever stands beside it."""
    found = RuntimeNetwork(translator("normalize", 4).translate({}), "onnxruntime", 1)
    x, t = torch.randn(5, *SHAPE), torch.tensor([0, 999, 5, 500, 250])
    alone = torch.cat([found(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    assert torch.equal(found(x, t), alone)
    with pytest.raises(ValueError, match=r"timesteps 0\.\.1000 lie outside \[0, 1000\)"):
        found(x[:2], torch.tensor([0, 1000]))


def test_layers_left_in_float_are_named():
    """And a network of one level, whose attention has two heads."""
    unet = student("normalize", rules={"mid_block.attentions.0": 32, "conv_in": 32}, channels=(16,))
    found = Translator(Denoiser(unet), SHAPE)
    checked = verify(found, "onnxruntime", T)
    floating = [product.name for product in found.products if not product.integer]
    assert floating == ["conv_in", "mid_block.attentions.0"]
    assert (checked.int8, checked.floating) == (len(found.products) - 2, 3)  # attention's two products are one operator


class Unknown(torch.nn.Module):
    def forward(self, sample, timestep):
        return torch.nn.functional.hardswish(sample + timestep.view(-1, 1, 1, 1))


class Fixed(ActivationQuantizer):
    """A user's own quantizer that says its grid, and no more."""

    def initialize(self, observer, calibrator):
        pass

    def grid(self, x):
        return torch.tensor([0.3]), torch.tensor([float(self.qmax // 3)])

    def quantize(self, x):
        s, z = (values.view(-1, *[1] * (x.ndim - 1)) for values in self.grid(x))
        return (torch.clamp(torch.round(x / s) + z, 0, self.qmax) - z) * s


class ByTimestep(Fixed):
    def grid(self, x):
        t = current_timesteps(x.shape[0])
        return 0.01 + t / 20_000, (t * self.qmax // 1999).float()


class OffZero(Fixed):
    """Its grid has no zero, which nothing pads."""

    def grid(self, x):
        return torch.tensor([1 / self.qmax]), torch.tensor([-1.0])


class OwnWeight(LSQWeight):
    def forward(self, weight):
        return super().forward(weight.clamp(-1, 1))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("kind", "bits"), [(Fixed, 4), (ByTimestep, 8)])
def test_a_users_own_quantizer_that_says_its_grid(translator, kind, bits, runtime):
    found = translator(bits=bits, activation=kind, weight=OwnWeight)
    verify_products(found, runtime, T)
    index = next(i for i, (name, _) in enumerate(found.quantizers) if name == "time_embedding.linear_1.input_quantizer")
    found.quantizers[index] = found.quantizers[index][0], OffZero(bits=bits)
    verify_products(found, runtime, T)


class Follows(Fixed):
    def grid(self, x):
        return x.flatten(1).abs().amax(1) / self.qmax, torch.full((len(x),), float(self.qmax // 2))


class Lies(Fixed):
    def quantize(self, x):
        return super().quantize(x * 2)


class Breaks(Fixed):
    def grid(self, x):
        raise KeyError("no such\ngrid")


class NoGrid(Fixed):
    grid = None


class HalfSteps(LSQWeight):
    def forward(self, weight):
        return super().forward(weight) + self.scale.view(-1, *[1] * (weight.ndim - 1)) / 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Follows, r"conv_in\.input_quantizer, a Follows, has no form in ONNX: its grid\(x\) follows the values of x, and only"),
        (
            Lies,
            r"conv_in\.input_quantizer, a Lies, .* the grid\(x\) of its quantizer Lies is not what its quantize\(x\) computes",
        ),
        (Breaks, r"conv_in\.input_quantizer, a Breaks, .* 'no such\\ngrid'"),
        (NoGrid, r"conv_in\.input_quantizer, a NoGrid, has no form in ONNX: it has no grid\(x\)"),
        (OffZero, r"conv_in\.input_quantizer has no form in ONNX: zeros are padded there, and its grid has no zero"),
        (
            HalfSteps,
            r"conv_in\.weight_quantizer has no form in ONNX: the weights of its quantizer HalfSteps are not scale \* code",
        ),
    ],
)
def test_another_one_is_refused(translator, kind, message):
    found = translator()
    role = "weight" if issubclass(kind, LSQWeight) else "input"
    index, own = next((i, q) for i, (name, q) in enumerate(found.quantizers) if name == f"conv_in.{role}_quantizer")
    if kind is HalfSteps:
        own.__class__ = HalfSteps
    found.quantizers[index] = f"conv_in.{role}_quantizer", own if kind is HalfSteps else kind(bits=4, padded=True)
    with pytest.raises(ValueError, match=message) as raised:
        [lowering.check(*found.quantizers[index]), found.translate({})]
    assert "\n" not in str(raised.value)


def test_what_a_graph_cannot_hold_is_refused():
    unet = student("scale")
    unet.conv_in.input_quantizer.seen[2] = False
    with pytest.raises(ValueError, match=r"conv_in\.input_quantizer: timestep groups \[2\] were never seen"):
        Translator(Denoiser(unet), SHAPE)
    with pytest.raises(ValueError, match=r"the network uses aten\.hardswish"):
        Translator(Unknown(), SHAPE).translate({})
