import pytest

from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig, SamplerConfig


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (DiffusionConfig, {"num_train_timesteps": 0}, r"diffusion\.num_train_timesteps=0"),
        (DiffusionConfig, {"beta_start": 0.03}, r"diffusion\.beta_end=0\.02"),
        (DiffusionConfig, {"beta_schedule": "cosine"}, "choose one of linear, scaled_linear, squaredcos_cap_v2"),
        (NeMConfig, {"mode": "mimic"}, r"nem\.mode=mimic"),
        (NeMConfig, {"weight": float("nan")}, r"nem\.weight=nan"),
        (NeMConfig, {"mode": "add", "on_policy_fraction": 0.5}, r"nem\.on_policy_fraction=0\.5 needs nem\.mode=replace"),
        (SamplerConfig, {"steps": 0}, r"sampler\.steps=0"),
        (SamplerConfig, {"eta": 1.5}, r"sampler\.eta=1\.5"),
        (SamplerConfig, {"kind": "ddpm", "spacing": "quadratic"}, "type sampler=ddim"),
    ],
)
def test_message_names_value_and_override(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
