"""The presets against the networks that they name."""

from pathlib import Path

import pytest
import torch
import yaml

from qdm_lightning.models.unet import build_unet

CONF = Path(__file__).parents[2] / "conf" / "model"


def preset(name):
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del settings["defaults"]
    return settings


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("unet_digits", 463_249),
        ("unet_small", 2_249_283),
        ("unet_cifar10", 35_746_307),
        ("unet_celeba", 78_700_803),
        ("unet_imagenet64", 121_059_459),
    ],
)
def test_preset_has_the_parameters_it_states(name, parameters):
    with torch.device("meta"):
        unet = build_unet(**preset(name))
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert f"{parameters:,} parameters" in (CONF / f"{name}.yaml").read_text()


def test_cifar10_is_googles():
    """The config.json of google/ddpm-cifar10-32."""
    published = {
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": (128, 256, 256, 256),
        "center_input_sample": False,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    with torch.device("meta"):
        config = build_unet(**preset("unet_cifar10")).config
    assert {name: config[name] for name in published} == published


def test_attention_is_where_the_preset_says():
    for name, sizes in (("unet_digits", {4}), ("unet_small", {8}), ("unet_cifar10", {16, 4}), ("unet_celeba", {16, 4})):
        settings = preset(name)
        with torch.device("meta"):
            unet = build_unet(**settings)
        levels = [i for i, block in enumerate(unet.down_blocks) if getattr(block, "attentions", None)]
        lowest = settings["sample_size"] >> (len(settings["block_out_channels"]) - 1)
        assert {settings["sample_size"] >> i for i in levels} | {lowest} == sizes, name  # the lowest: the middle block
