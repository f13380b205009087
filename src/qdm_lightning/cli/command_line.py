"""From a stored configuration back to what would be typed for it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from qdm_lightning.cli.compose import composed, without_hydra
from qdm_lightning.cli.help import defaults, options
from qdm_lightning.cli.messages import quoted
from qdm_lightning.cli.schema import CONF_DIR, PLACES, SCHEMAS

LEFT_OUT = ("run", "paths", "logger")
"""Settings that make no other run."""

WORDS = ("true", "false", "null", "nan", "inf")
"""Which Hydra's grammar does not read as text."""

COMMAND = "python -m qdm_lightning.train"


def command_of(values: Mapping[str, Any]) -> str:
    """The command that trains a run of these settings, for a shell; places on this machine are words in capitals.

    Args:
        values: a resolved configuration, as `runs.folder.read_config` returns it.
    """
    wanted = _comparable(values)
    words = [f"{group}={option}" for group, option in _options(values).items()]
    words += [f"{name}={_value(wanted[name])}" for name in _different(words, wanted) if name in wanted]
    return shlex.join([*COMMAND.split(), *map(_without_place, words)])


def _options(values: Mapping[str, Any]) -> dict[str, str]:
    """Options that are not taken by themselves, by group, as far as a setting of each tells which one it is."""
    quant, nem, chosen = values["quant"], values["nem"], defaults("train")
    bits = quant["weight_bits"], quant["act_bits"]
    named = {
        "quant": "fp32" if bits == (32, 32) else f"w{bits[0]}a{bits[1]}",
        "nem": "on_policy" if nem.get("on_policy_fraction") else nem["mode"],
        "sampler": values["sampler"]["kind"],
        "teacher": values["teacher"]["source"],
    }
    for group in ("data", "model", "taq", "metrics"):
        target = values[group].get("_target_")
        named[group] = next((n for n, kind in SCHEMAS[group].items() if getattr(kind, "_target_", None) == target), "")
    weighting, group = (nem.get("weighting") or {}).get("_target_"), "nem/weighting"
    files = {option.name: CONF_DIR / group / f"{option.name}.yaml" for option in options(group)}
    named[group] = next(
        (name for name, file in files.items() if OmegaConf.select(OmegaConf.load(file), "_target_") == weighting), ""
    )
    there = {group: {option.name for option in options(group)} for group in named}
    if named["quant"] == "fp32":  # it brings these
        named |= {"taq": "", "nem": "", "nem/weighting": ""}
    if named["teacher"] == "pretrained":
        named["model"] = ""
    order = [group for group in chosen if group in named]
    return {g: named[g] for g in order if named[g] in there[g] and named[g] != chosen[g]}


def _different(words: list[str], wanted: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ from those that `words` compose, or are there alone."""
    found = _comparable(OmegaConf.to_container(without_hydra(composed("train", words)), resolve=True))
    absent = object()
    return [name for name in dict.fromkeys([*wanted, *found]) if found.get(name, absent) != wanted.get(name, absent)]


def _comparable(values: Any) -> dict[str, Any]:
    """Settings by dotted names, those of `LEFT_OUT` and caches left out; a dict of patterns is one setting."""
    rest = {name: value for name, value in values.items() if name not in LEFT_OUT}
    return {name: value for name, value in _flat(rest).items() if name not in ("data.cache", "data.root")}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value and all(str(key).isidentifier() for key in value):
            found |= _flat(value, f"{above}{name}.")
        elif not (isinstance(value, Mapping) and not value):
            found[f"{above}{name}"] = value
    return found


def _value(value: Any) -> str:
    """In Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_value(item)}' for key, item in value.items())}}}"
    text = str(value)
    plain = not isinstance(value, str) or (re.fullmatch(r"[A-Za-z_][\w./-]*", text) and text.lower() not in WORDS)
    return text if plain else quoted(text)


def _without_place(word: str) -> str:
    """`data.path=PATH` for a place on this machine: what it is called there is nobody's business."""
    name, _, value = word.partition("=")
    local = value.strip("'").startswith(("/", "~", "\\", "."))
    return f"{name}={name.rpartition('.')[2].upper()}" if name in PLACES and local else word
