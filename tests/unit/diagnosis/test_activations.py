import numpy as np
import pytest
import torch
from torch import nn

from qdm_lightning.diagnosis.activations import activation_distributions, choose_layers, layers_of
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization import LSQActivation, NormalizedActivation, QuantConfig, Quantizers, compiled, prepare

DIFFUSION = DiffusionConfig()


@pytest.fixture(autouse=True)
def _eager():
    compiled.set_mode("off")


class Small(nn.Module):
    """A network whose one middle layer gets the image, twice as large."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)
        with torch.no_grad():
            self.first.weight.fill_(2.0)
            self.first.bias.zero_()

    def forward(self, x, t, return_dict=False):
        return (self.last(self.middle(self.first(x))),)


def quantized(activation, bits=4):
    network = Small()
    prepare(
        network, QuantConfig(act_bits=bits, rules={"first": 32, "last": 32}), Quantizers(activation=activation), first_last=[]
    )
    return Denoiser(network).eval()


def look(network, names=("middle",), timesteps=(0, 500, 999), count=8, darkest=0):
    images = torch.randint(darkest, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    distributions = activation_distributions(
        network, names, images, DIFFUSION, timesteps, device=torch.device("cpu"), batch_size=3
    )
    return *distributions.values(), images


def expected(images, t):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    times = torch.full((len(images),), t)
    return 2 * add_noise(noise_scheduler(DIFFUSION), images.float() / 127.5 - 1, noise, times)


def test_raw_grid_and_quantized_values_by_hand():
    network = quantized(LSQActivation)
    quantizer = network.unet.middle.input_quantizer
    quantizer.set_grid(torch.tensor([0.5]), torch.tensor([8.0]))
    distribution, images = look(network)
    assert (distribution.layer, distribution.quantizer, distribution.levels, distribution.t) == (
        "middle",
        "LSQActivation",
        15,
        [0, 500, 999],
    )
    for k, t in enumerate(distribution.t):
        x = expected(images, t).double().numpy().ravel()
        codes = np.clip(np.round(x / 0.5) + 8, 0, 15)
        levels = [0.01, 0.25, 0.5, 0.75, 0.99]
        assert distribution.raw[k] == pytest.approx(np.quantile(x, levels), abs=1e-5)
        assert distribution.grid[k] == pytest.approx(np.quantile(x / 0.5 + 8, levels), abs=1e-5)
        assert distribution.quantized[k] == pytest.approx(np.quantile(0.5 * (codes - 8), levels), abs=1e-5)
        place = np.round(x / 0.5) + 8
        assert distribution.clipped[k] == pytest.approx(np.mean((place < 0) | (place > 15)), abs=1e-9)
        assert distribution.error[k] == pytest.approx(np.mean((0.5 * (codes - 8) - x) ** 2) / np.var(x, ddof=1), rel=1e-4)
        assert distribution.moments["raw"][k] == pytest.approx((x.mean(), x.std(ddof=1)), rel=1e-4)
    means, stds = np.array(distribution.moments["raw"]).T
    assert distribution.oscillation("raw") == pytest.approx(
        {"center": means.std() / stds.mean(), "spread": stds.max() / stds.min()}
    )
    assert not network.unet.middle.input_quantizer._forward_hooks


def test_normalization_steadies_what_the_quantizer_sees():
    network = quantized(NormalizedActivation, bits=8)
    network.unet.middle.input_quantizer.set_grid(torch.tensor([0.05]), torch.tensor([128.0]))
    distribution, _ = look(network, darkest=120)
    raw, grid = distribution.oscillation("raw"), distribution.oscillation("grid")
    assert raw["spread"] > 1.5
    assert raw["center"] > 0.2
    assert grid["spread"] < 1.05
    assert grid["center"] < 0.05


def test_a_float_network_shows_raw_values_alone():
    distribution, images = look(Denoiser(Small()).eval())
    assert (distribution.quantizer, distribution.levels, distribution.grid, distribution.quantized) == (None, None, [], [])
    assert distribution.oscillation("grid") is None
    assert distribution.raw[1][2] == pytest.approx(float(expected(images, 500).quantile(0.5)), abs=1e-6)


def test_choice_of_layers(tiny_run):
    from qdm_lightning import load_student

    layers = layers_of(Denoiser(load_student(tiny_run)))
    chosen = choose_layers(layers, None)
    assert len(chosen) == 6
    assert sum(".attentions." in name and name.endswith((".query", ".value")) for name in chosen) == 2
    assert not {"conv_in", "conv_out"} & set(chosen)
    assert choose_layers(layers, ["conv_*"]) == ["conv_in", "conv_out"]
    with pytest.raises(ValueError, match=r"the pattern 'nothing' matches no layer: they are named like conv_in"):
        choose_layers(layers, ["nothing"])
