"""Images by their seeds: the weights of a quantized network are quantized once for all steps and batches."""

import torch
from torch import nn

from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.quantization.preparation import prepare
from qdm_lightning.quantization.spec import QuantConfig


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x)


def test_weights_are_quantized_once_for_a_draw():
    network, steps, calls = Network().eval(), [], []
    prepare(network, QuantConfig())
    network.layer.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    image_sampler = ImageSampler(
        network=network,
        sampler=SamplerConfig(steps=3, batch_size=2),
        diffusion=DiffusionConfig(),
        shape=(1, 4, 4),
        device=torch.device("cpu"),
    )
    for draws in (1, 2):
        images = image_sampler.draw(range(4), lambda: steps.append(1))
        assert images.shape == (4, 1, 4, 4)
        assert len(steps) == draws * image_sampler.steps(4) == draws * 6
        assert len(calls) == draws
