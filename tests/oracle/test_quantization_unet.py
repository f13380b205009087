"""A prepared U-Net against an untouched one whose operands are quantized from outside."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from qdm_lightning.quantization import compiled
from qdm_lightning.quantization.calibration import Percentile, calibrate
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.quantizer import ActivationQuantizer, LSQActivation
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.quantization.taq import EMANormalizedActivation, GroupedActivation, NormalizedActivation
from qdm_lightning.quantization.timestep import timesteps

BLOCKS = {
    "plain": (("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")),
    "resnet": (("ResnetDownsampleBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "ResnetUpsampleBlock2D")),
    "skip": (("SkipDownBlock2D", "AttnSkipDownBlock2D"), ("AttnSkipUpBlock2D", "SkipUpBlock2D")),
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


def unet(blocks="plain", **options):
    down, up = BLOCKS[blocks]
    widths = (32, 64) if blocks == "skip" else (8, 16)  # the groups of skip blocks' norms are a quarter of the channels
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "downsample_padding": 0,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**settings | options).eval()


def batch(size=4):
    return torch.randn(size, 3, 8, 8), torch.linspace(0, 999, size).long()


def run(model, x, t):
    with torch.no_grad(), timesteps(t):
        return model(x, t).sample


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": "plain"},
        {"blocks": "resnet", "attention_head_dim": None},
        {"blocks": "skip"},
        {"downsample_padding": 1, "resnet_time_scale_shift": "scale_shift"},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
    ],
    ids=str,
)
def test_at_32_bits_it_is_the_original_bit_for_bit(options):
    model = unet(**options)
    original = copy.deepcopy(model)
    kinds = [type(m) for m in model.modules()]
    report = prepare(model, QuantConfig(weight_bits=32, act_bits=32, probs_bits=32, first_last_bits=32))
    assert [type(m) for m in model.modules()] == kinds
    assert report.quantized == []
    x, t = batch()
    assert torch.equal(model(x, t).sample, original(x, t).sample)
    for network in (model, original):
        network(x, t).sample.square().sum().backward()
    for mine, its in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)


def test_what_stays_float_and_what_is_an_edge_by_name():
    report = prepare(unet(), QuantConfig(weight_bits=4, act_bits=3))
    names = {row.name: (row.weight_bits, row.act_bits) for row in report.rows}
    assert {name for name, bits in names.items() if bits == (32, 32)} == {
        "conv_norm_out",
        "down_blocks.0.resnets.0.norm1",
        "down_blocks.0.resnets.0.norm2",
        "down_blocks.1.resnets.0.norm1",
        "down_blocks.1.resnets.0.norm2",
        "down_blocks.1.attentions.0.group_norm",
        "mid_block.resnets.0.norm1",
        "mid_block.resnets.0.norm2",
        "mid_block.resnets.1.norm1",
        "mid_block.resnets.1.norm2",
        "mid_block.attentions.0.group_norm",
        *(f"up_blocks.{b}.resnets.{r}.norm{n}" for b in (0, 1) for r in (0, 1) for n in (1, 2)),
        *(f"up_blocks.0.attentions.{r}.group_norm" for r in (0, 1)),
    }
    resnets = [
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.0",
        "mid_block.resnets.0",
        "mid_block.resnets.1",
        *(f"up_blocks.{b}.resnets.{r}" for b in (0, 1) for r in (0, 1)),
    ]
    attentions = [
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    ]
    assert {name for name, bits in names.items() if bits == (8, 8)} == {
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        *(f"{name}.time_emb_proj" for name in resnets),
    }
    assert {name for name, bits in names.items() if bits == (4, 3)} == {
        *(f"{name}.conv{n}" for name in resnets for n in (1, 2)),
        *(f"{name}.conv_shortcut" for name in resnets if name.startswith(("up", "down_blocks.1"))),
        *(f"{name}.{layer}" for name in attentions for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv",
    }
    assert {name for name, bits in names.items() if bits == (32, 8)} == {f"{name}.probs" for name in attentions}
    assert {name for name, bits in names.items() if bits == (32, 3)} == {f"{name}.qkv" for name in attentions}


class Simulation:
    """Quantizes the operands of an untouched U-Net by hooks, with the scales of a prepared one and none of its code."""

    def __init__(self, model, prepared, t, groups=4):
        self.t, self.groups = t, groups
        layers = dict(prepared.named_modules())
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self.hook(module, layers[name])
            elif isinstance(module, Attention):
                module.set_processor(self.processor(layers[name].processor))

    def hook(self, module, layer):
        with torch.no_grad():
            module.weight.copy_(self.weight(module.weight, layer.weight_quantizer))
        module.register_forward_pre_hook(lambda _, inputs: (self.activation(inputs[0], layer.input_quantizer),))

    @staticmethod
    def weight(weight, quantizer):
        half = 2 ** (quantizer.bits - 1)
        rows = [
            torch.clip(torch.round(row / s), -half, half - 1) * s
            for row, s in zip(weight, torch.exp(quantizer.log_scale.detach()), strict=True)
        ]
        return torch.stack(rows)

    def activation(self, x, quantizer):
        top = 2**quantizer.bits - 1
        s, z = torch.exp(quantizer.log_scale.detach()), quantizer.zero_point.detach()
        samples = []
        for n, sample in enumerate(x):
            group = int(self.t[n]) * self.groups // 1000
            if isinstance(quantizer, GroupedActivation):
                s_n, z_n = s[group], torch.clip(torch.round(z[group]), 0, top)
            elif isinstance(quantizer, NormalizedActivation):
                if isinstance(quantizer, EMANormalizedActivation):
                    mean, std = quantizer.mean[group], quantizer.std[group]
                else:
                    mean, std = sample.mean(), torch.sqrt(sample.var(correction=0) + quantizer.psi)
                s_n = s[0] * std
                z_n = torch.round(z[0] - mean / s_n)
                z_n = torch.clip(z_n, 0, top) if quantizer.padded else z_n
            else:
                s_n, z_n = s[0], torch.clip(torch.round(z[0]), 0, top)
            samples.append(s_n * (torch.clip(torch.round(sample / s_n) + z_n, 0, top) - z_n))
        return torch.stack(samples)

    def processor(self, quantizers):
        simulation = self

        class Simulated(AttnProcessor):
            def __call__(self, attn, hidden_states, **_):
                batch, channels = hidden_states.shape[:2]
                x = attn.group_norm(hidden_states.view(batch, channels, -1)).transpose(1, 2)
                q, k, v = (
                    simulation.activation(
                        layer(x).view(batch, -1, attn.heads, channels // attn.heads).permute(0, 2, 1, 3), quantizer
                    )
                    for layer, quantizer in (
                        (attn.to_q, quantizers.query),
                        (attn.to_k, quantizers.key),
                        (attn.to_v, quantizers.value),
                    )
                )
                scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(channels // attn.heads)
                s = torch.exp(quantizers.probabilities.log_scale.detach())
                probabilities = s * torch.clip(torch.round(F.softmax(scores, dim=-1) / s), 0, 255)
                out = torch.einsum("bhnm,bhmd->bhnd", probabilities, v)
                out = attn.to_out[0](out.permute(0, 2, 1, 3).reshape(batch, -1, channels))
                return out.transpose(1, 2).reshape(hidden_states.shape) + hidden_states

        return Simulated()


VARIANTS = {
    "off": LSQActivation,
    "normalize": NormalizedActivation,
    "ema": lambda **options: EMANormalizedActivation(groups=4, **options),
    "scale": lambda **options: GroupedActivation(groups=4, **options),
}


def prepared_unet(weight_bits, act_bits, variant="off", scope="attention"):
    original = unet()
    model = copy.deepcopy(original)
    factory = VARIANTS[variant]
    quantizers = Quantizers(attention=factory, activation=factory if scope == "all" else LSQActivation)
    prepare(model, QuantConfig(weight_bits=weight_bits, act_bits=act_bits), quantizers)
    calibrate(model, lambda: run(model, *batch(8)), Percentile(98.0))
    return original, model


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("variant", "scope"), [("off", "all"), ("normalize", "attention"), ("ema", "all"), ("scale", "all")])
def test_prepared_equals_the_simulation(bits, variant, scope):
    """In double precision, where sums in another order carry no value across a rounding boundary."""
    original, model = prepared_unet(bits, bits, variant, scope)
    original, model = original.double(), model.double()
    x, t = batch(3)
    x = x.double()
    plain = run(original, x, t)
    Simulation(original, model, t)
    expected = run(original, x, t)
    assert (expected - plain).abs().max() > 1e-3 * 4 ** (8 - bits) / 64  # it does quantize
    torch.testing.assert_close(run(model, x, t), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_every_quantizer_is_used():
    _, model = prepared_unet(4, 4)
    used = []
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.register_forward_hook(lambda module, *_: used.append(module))
    run(model, *batch())
    assert len(used) == len(quantizers) == len(set(used)) == 51 + 16


def gradient_strides(model, x, t):
    """Of the gradient to every convolution's output, by name, in a training step."""
    found = {}

    def watch(name):
        return lambda module, inputs, out: out.register_hook(lambda grad: found.__setitem__(name, grad.stride())) and None

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    with timesteps(t):
        model.train()(x, t).sample.square().mean().backward()
    for hook in hooks:
        hook.remove()
    return found


def test_gradients_lie_in_memory_as_full_precisions_do():
    """A convolution converts a gradient of another layout first: measured, a seventh of all convolutions' backward."""
    x, t = batch()
    x = x.to(memory_format=torch.channels_last)
    original = unet().to(memory_format=torch.channels_last)
    student = copy.deepcopy(original)
    prepare(student, QuantConfig(), Quantizers(attention=NormalizedActivation))
    calibrate(student, lambda: run(student, x, t), Percentile())
    expected = gradient_strides(original, x, t)
    assert len(expected) > 10
    assert gradient_strides(student, x, t) == expected
