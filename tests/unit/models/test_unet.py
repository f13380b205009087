import pytest
import torch

from qdm_lightning.models.unet import build_unet

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def test_estimate_has_the_shape_of_the_images():
    unet = build_unet(**TINY, attention_head_dim=8, resnet_time_scale_shift="scale_shift")
    assert unet(torch.randn(2, 1, 8, 8), torch.tensor([0, 999])).sample.shape == (2, 1, 8, 8)


def test_every_setting_reaches_the_network():
    given = TINY | {
        "attention_head_dim": 4,
        "add_attention": False,
        "norm_eps": 1e-3,
        "dropout": 0.25,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "resnet_time_scale_shift": "scale_shift",
    }
    config = build_unet(**given).config
    assert {name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in given} == given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_size": 7}, r"model\.sample_size=7 cannot be halved 1 times: it must be a multiple of 2"),
        ({"out_channels": 3}, r"model\.out_channels=3 is not allowed: give model\.in_channels=1, or twice"),
        ({"up_block_types": ["UpBlock2D"]}, r"model\.up_block_types has 1 entries, model\.block_out_channels 2"),
        (
            {"down_block_types": ["DownBlock2D", "Down"]},
            r"model\.down_block_types=Down is not allowed: choose one of DownBlock2D",
        ),
        ({"norm_num_groups": 7}, r"model\.norm_num_groups=7 does not divide 16"),
        ({"attention_head_dim": 32}, r"model\.attention_head_dim=32 does not divide 16"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0"),
        ({"chanels": 3}, r"model: got an unexpected keyword argument 'chanels'"),
    ],
)
def test_message_names_value_and_override(settings, message):
    with pytest.raises(ValueError, match=message):
        build_unet(**TINY | settings)


def test_missing_setting_is_named():
    with pytest.raises(ValueError, match="missing 1 required keyword-only argument: 'sample_size'"):
        build_unet(**{name: value for name, value in TINY.items() if name != "sample_size"})
