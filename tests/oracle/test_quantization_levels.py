"""Every quantized tensor of a prepared U-Net: at most 2^b values, all on the grid, and zero on it where zeros are padded."""

from functools import partial

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.downsampling import Downsample2D

from qdm_lightning.quantization import compiled
from qdm_lightning.quantization.attention import QuantizedAttention
from qdm_lightning.quantization.calibration import Percentile, calibrate
from qdm_lightning.quantization.layers import QuantizedLayer
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.quantizer import ActivationQuantizer, LSQActivation, LSQProbability, WeightQuantizer
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.quantization.taq import EMANormalizedActivation, GroupedActivation, NormalizedActivation
from qdm_lightning.quantization.timestep import timesteps

VARIANTS = {
    "off": LSQActivation,
    "normalize": NormalizedActivation,
    "ema": partial(EMANormalizedActivation, groups=4),
    "scale": partial(GroupedActivation, groups=4),
}


@pytest.fixture(autouse=True)
def _one_thread_eager():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    compiled.set_mode("off")
    yield
    compiled.set_mode("auto")
    torch.set_num_threads(threads)


def student(bits, factory):
    model = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        downsample_padding=0,
        attention_head_dim=8,
    )
    prepare(
        model,
        QuantConfig(weight_bits=bits, act_bits=bits, probs_bits=bits, first_last_bits=bits + 1),
        Quantizers(activation=factory, attention=factory),
    )
    x, t = torch.randn(8, 3, 8, 8), torch.linspace(0, 999, 8).long()

    def run():
        with timesteps(t):
            model(x, t)

    calibrate(model, run, Percentile(99.0))
    # As training moves them: zero points that are no integers, and some beyond the grid.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_scale"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("zero_point"):
                parameter.add_(0.7 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=VARIANTS)
def passed(request):
    """(name, quantizer, what came out of it, scale and integer zero point) of every quantizer in one pass."""
    model, seen = student(3, VARIANTS[request.param]), []

    def note(name, quantizer, x, out):
        if hasattr(quantizer, "grid"):
            scale, zero_point = quantizer.grid(quantizer.operand(x))
        else:
            scale, zero_point = quantizer.scale, quantizer.zero_point
        seen.append((name, quantizer, out.detach(), scale.detach(), zero_point.detach()))

    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            module.register_forward_hook(lambda m, inputs, out, name=name: note(name, m, inputs[0], out))
    x, t = torch.randn(4, 3, 8, 8) * 2, torch.tensor([0, 300, 600, 999])
    with torch.no_grad(), timesteps(t):
        model(x, t)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    attentions = [m for m in model.modules() if isinstance(m, QuantizedAttention)]
    assert len(seen) == 2 * len(layers) + 4 * len(attentions) == 2 * 51 + 4 * 4  # none is left out
    return seen


def test_levels(passed):
    for name, quantizer, out, scale, zero_point in passed:
        rows = out.flatten()[None] if scale.numel() == 1 else out.flatten(1)
        for row, s, z in zip(rows, scale.expand(len(rows)), zero_point.expand(len(rows)), strict=True):
            grid = (torch.arange(quantizer.qmin, quantizer.qmax + 1) - z) * s
            assert set(row.tolist()) <= set(grid.tolist()), name
            assert len(row.unique()) <= 2**quantizer.bits, name
            assert z == z.round(), name
        assert len(out.unique()) > 1, name


def test_zero_is_on_the_grid_of_weights_probabilities_and_convolution_inputs(passed):
    for name, quantizer, _, _, zero_point in passed:
        if getattr(quantizer, "padded", True) or isinstance(quantizer, LSQProbability):
            assert bool(((zero_point >= quantizer.qmin) & (zero_point <= quantizer.qmax)).all()), name
            assert torch.equal(zero_point, zero_point.round()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_of_a_downsampler_stays_exactly_zero(variant):
    """diffusers pads before the convolution, whose quantizer sees the zeros."""
    model, inputs = student(2, VARIANTS[variant]), []
    downsamplers = [m for m in model.modules() if isinstance(m, Downsample2D)]
    assert [d.padding for d in downsamplers] == [0]
    downsamplers[0].conv.input_quantizer.register_forward_hook(lambda _, x, out: inputs.append((x[0], out)))
    t = torch.tensor([1, 998])
    with torch.no_grad(), timesteps(t):
        model(torch.randn(2, 3, 8, 8), t)
    ((x, out),) = inputs
    assert x.shape[2:] == (9, 9)
    for edge in (x[:, :, -1], x[..., -1], out[:, :, -1], out[..., -1]):
        assert edge.abs().max() == 0
