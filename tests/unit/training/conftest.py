"""The smallest student, calibrated once, and its training for four steps."""

import copy
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch

from qdm_lightning.data.digits import DigitsData
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.unet import build_unet
from qdm_lightning.quantization import MinMax, QuantConfig, calibrate, compiled, prepare
from qdm_lightning.quantization.preparation import Quantizers
from qdm_lightning.quantization.quantizer import LSQActivation, LSQWeight
from qdm_lightning.quantization.taq import EMANormalizedActivation
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.spec import OptimizerConfig, TrainerConfig
from qdm_lightning.training.trainer import fit
from qdm_lightning.training.validation_set import ValidationSet

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@cache
def networks():
    """A calibrated W4A4 student with TaQ's tables, and its teacher."""
    torch.manual_seed(0)
    teacher, network = build_unet(**TINY), build_unet(**TINY)
    network.load_state_dict(teacher.state_dict())
    taq = partial(EMANormalizedActivation, groups=4)
    prepare(network, QuantConfig(weight_bits=4, act_bits=4), Quantizers.with_taq(LSQWeight, LSQActivation, taq, "attention"))
    calibrate(network, lambda: Denoiser(network)(torch.randn(32, 1, 8, 8), torch.arange(32) * 31), MinMax())
    return network, teacher


@pytest.fixture
def student():
    """`student(kind=DiffusionModule, **optimizer)`: a student and its teacher in a module to train for 4 steps."""

    def make(kind=DiffusionModule, **optimizer):
        network, teacher = copy.deepcopy(networks())
        return kind(
            network,
            teacher,
            diffusion=DiffusionConfig(),
            nem=NeMConfig(),
            optimizer=OptimizerConfig(**optimizer),
            max_steps=4,
            seed=3,
            flip=False,
        )

    return make


@pytest.fixture
def train(one_thread_eager):
    """`train(module, folder, **trainer)`: `fit` for 4 steps of 8 images, with a checkpoint after the second one."""

    def fit_it(module, folder, **trainer):
        data = DigitsData(batch_size=8)
        data.setup()
        stage = SimpleNamespace(skip=lambda n: None, advance=lambda n, **fields: None)
        config = TrainerConfig(max_steps=4, val_every=2, val_images=16, accelerator="cpu", devices=1, **trainer)
        validation_set = ValidationSet.from_images(data.val_images, 1000, 16)
        return fit(module, data, validation_set, config, folder=folder, stage=stage, loggers=[], callbacks=[])

    return fit_it


@pytest.fixture
def one_thread_eager():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compiled.set_mode("off")
    yield
    compiled.set_mode("auto")
    torch.set_num_threads(threads)
