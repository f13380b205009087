"""Settings that an older version stored, as this one names them: where a `_target_` moved to, what a setting is called now."""

from __future__ import annotations

from typing import Any

MOVED = {
    "qdm_lightning.training.loggers.wandb_logger": "qdm_lightning.loggers.wandb_logger",
    "qdm_lightning.training.loggers.tensorboard_logger": "qdm_lightning.loggers.tensorboard_logger",
    "qdm_lightning.models.pretrained.load_unet": "qdm_lightning.models.diffusers_io.load_unet",
}
"""A `_target_` of version 0.1 to its place now."""

RENAMED = {"edge_bits": "first_last_bits", "micro_batch": "batch_size"}
"""A setting of version 0.1 (of `quant`, of `sampler`) to its name now."""

ADDED = {
    "trial": False,
    "execution": "simulated",
    "teacher.retrain": False,
    "nem.weighting._target_": "qdm_lightning.diffusion.weighting.Uniform",
    "quant.channel_scales": "off",
    "diffusion.prediction_type": "epsilon",
    "diffusion.variance_type": "fixed",
    "diffusion.label_dropout": 0.0,
    "sampler.guidance": 1.0,
    "model.num_class_embeds": None,
    "model.downsample_type": "conv",
    "model.upsample_type": "conv",
    "model.attn_norm_num_groups": None,
}
"""Settings that came after version 0.1, by dotted name, and how a run of 0.1 behaved."""


SCOPES = {"attention": "qkv", "all": "all_but_probs"}
"""`taq.scope` of version 0.1, whose TaQ never acted on attention probabilities, as it is called now."""


def upgraded(plain: Any) -> Any:
    """Plain settings of any version as this version writes them, to any depth; what is of this version stays as it is.

    A `taq.scope` is of version 0.1 where the `quant` beside it has no `channel_scales`.

    >>> upgraded({"sampler": {"micro_batch": 16}, "model": {"_target_": "qdm_lightning.models.pretrained.load_unet"}})
    {'sampler': {'batch_size': 16}, 'model': {'_target_': 'qdm_lightning.models.diffusers_io.load_unet'}}
    """
    if isinstance(plain, dict):
        found = {
            RENAMED.get(name, name): MOVED.get(str(value), value) if name == "_target_" else upgraded(value)
            for name, value in plain.items()
        }
        quant, taq = found.get("quant"), found.get("taq")
        if isinstance(quant, dict) and isinstance(taq, dict) and quant and "channel_scales" not in quant:
            quant["channel_scales"] = "off"
            if isinstance(taq.get("scope"), str):
                taq["scope"] = SCOPES.get(taq["scope"], taq["scope"])
        return found
    return [upgraded(value) for value in plain] if isinstance(plain, list) else plain
