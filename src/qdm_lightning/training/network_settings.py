"""What shapes a network: two that differ in it may have tensors of the same names and shapes, and compute something else.

So every file with weights carries it (checkpoints, a student's safetensors), and every reader compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qdm_lightning.base.checks import UserError
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.quantization.spec import EXECUTIONS, TAQ, QuantConfig
from qdm_lightning.runs.formats import upgraded

FORMAT = 2
"""Of a student's folder and of what a file of weights says about itself; 1 is version 0.1, whose weights say nothing.

Raised when what was written before could no longer be read as it was meant.
"""

KEY = "qdm_lightning"
"""Where a file of weights has its settings: an entry of a checkpoint, of the metadata of safetensors (as JSON)."""

METHOD = "qdm_lightning"
"""The `quant_method` in a student's config.json, by which diffusers knows who reads it."""

DROPPED = "label_dropout"
"""Of the process, what a student's `quantization_config` says, as no scheduler does."""

WIDTHS = ("weight_bits", "act_bits", "qkv_bits", "probs_bits", "first_last_bits")
CHANNELS = "channel_scales"
NODES = ("weight_quantizer", "act_quantizer")

_NOT_SHAPING = ("dropout", "quantization_config", "decay", "inv_gamma", "power", "optimization_step")
"""Entries of a U-Net's config.json that leave what it computes in eval mode as it is."""


def network_settings(
    unet: Mapping[str, Any], diffusion: DiffusionConfig | None, quantization: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings that shape a U-Net, as plain data that JSON gives back unchanged.

    Args:
        unet: its config.json, as `unet_config` has it.
        diffusion: the process that it estimates the noise of; None where it is not known.
        quantization: from `quantization_settings`; None at full precision.
    """
    full = {"quant": {**dict.fromkeys(WIDTHS, 32), CHANNELS: "off", "rules": {}}, "taq": {}}
    return {
        "format": FORMAT,
        **(full if quantization is None else quantization),
        "diffusion": diffusion.settings() if diffusion else {},
        "unet": {name: value for name, value in unet.items() if not (name.startswith("_") or name in _NOT_SHAPING)},
    }


def quantization_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a student's config.json, without its `quant_method`; `settings` as of `network_settings`."""
    dropped = {name: value for name, value in settings["diffusion"].items() if name == DROPPED}
    return {**{name: settings[name] for name in ("format", "quant", "taq")}, **dropped}


def unet_config(unet: Any) -> dict[str, Any]:
    """The config.json of a `UNet2DModel`, prepared or not, as plain data."""
    return dict(json.loads(unet.to_json_string()))


def quantization_settings(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """`quant` (bits, scales by channel, rules, quantizers) and `taq` (empty without TaQ) of a run's resolved configuration."""
    quant, taq = resolved["quant"], resolved["taq"]
    taq = dict(taq) if taq.get("_target_") else {}
    bits = QuantConfig(**{name: quant[name] for name in (*WIDTHS, CHANNELS, "rules")})
    nodes = {name: quant[name] for name in NODES}
    if taq.get("scope") in ("all", "all_but_probs"):  # the other one serves nothing
        nodes["act_quantizer"] = {name: value for name, value in taq.items() if name != "scope"}
    widths = {name: getattr(bits, name) for name in WIDTHS} | {"qkv_bits": bits.attention_bits}
    return {"quant": {**widths, CHANNELS: bits.channel_scales, "rules": dict(bits.rules), **nodes}, "taq": taq}


def check_settings(stored: Mapping[str, Any] | None, wanted: Mapping[str, Any], file: Path | str) -> str:
    """Refuse weights of another network.

    Args:
        stored: what the file says about itself; None where it says nothing, as those of older versions.
        wanted: settings of the network that the weights are for; `unet` may be empty where it is not known.
        file: is named in messages.

    Returns:
        A warning for the record where nothing was stored, else an empty string.

    Raises:
        UserError: a difference, or a newer format.
    """
    if stored is None:
        return f"{file} does not say of which bits, TaQ and schedule its weights are: names and shapes alone were checked"
    check_format(stored.get("format") if isinstance(stored, Mapping) else None, file)
    difference = next(_differences(upgraded(dict(stored)), wanted), None)
    if difference:
        raise UserError(f"{file} is of another network: {difference}")
    return ""


def check_format(found: Any, file: Path | str) -> None:
    """Raise UserError where a file is of a newer format, or of none."""
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise UserError(f"{file} has format {found}, this version reads up to {FORMAT}: load it with the version it is of")


def checked_execution(said: Any, file: Path | str) -> str:
    """How the student of a config.json runs, one of `EXECUTIONS`; None, where nothing is said, is the first.

    Raises:
        UserError: another word.
    """
    if said is not None and said not in EXECUTIONS:
        raise UserError(f"{file} says execution={said}, which is not allowed: choose one of {', '.join(EXECUTIONS)}")
    return said or EXECUTIONS[0]


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for part in ("taq", "quant", "diffusion", "unet"):
        own, theirs = stored.get(part), wanted[part]
        if not isinstance(own, dict):
            yield f"{part} is missing"
            return
        if part == "taq" and own.get("_target_") != theirs.get("_target_"):
            yield f"taq={_variant(own)}, not {_variant(theirs)}"
        names = [*own, *(name for name in theirs if name not in own)]
        if part == "unet":  # another version of diffusers has more settings, or fewer
            names = [name for name in names if name in own and name in theirs]
        for name in names:
            if own.get(name) != theirs.get(name) or (name == "rules" and list(own[name]) != list(theirs[name])):
                yield f"{part}.{name}={own.get(name)}, not {theirs.get(name)}"


def _variant(taq: Mapping[str, Any]) -> str:
    """The name that is typed, or the dotted path of the user's own."""
    target = taq.get("_target_")
    return next((name for name, kind in TAQ.items() if getattr(kind, "_target_", None) == target), str(target))
