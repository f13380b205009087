"""A run in a few words: what groups, tags and filters runs on a dashboard. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qdm_lightning.quantization.spec import TAQ, QuantConfig


def labels(config: Mapping[str, Any]) -> dict[str, str]:
    """`job` (teacher, qat, ptq), `bits` (w4a4), `taq`, `nem` and `sampler` (ddim-50) of a resolved configuration.

    A teacher has neither bits nor what belongs to them. Nothing comes out of a configuration that is not a run's.
    """
    if not {"quant", "taq", "nem", "sampler"} <= set(config):
        return {}
    known = {f.name for f in fields(QuantConfig)}
    quant = QuantConfig(**{name: value for name, value in config["quant"].items() if name in known})
    sampler = {"sampler": f"{config['sampler']['kind']}-{config['sampler']['steps']}"}
    if quant.is_float:
        return {"job": "teacher", **sampler}
    return {
        "job": quant.mode,
        "bits": f"w{quant.weight_bits}a{quant.act_bits}",
        "taq": _taq(config["taq"]),
        "nem": "off" if quant.mode == "ptq" else _nem(config["nem"]),
        **sampler,
    }


def _taq(node: Mapping[str, Any]) -> str:
    target = str(node.get("_target_") or "")
    name = next((name for name, kind in TAQ.items() if getattr(kind, "_target_", "") == target), target.rpartition(".")[2])
    return f"{name}-all" if node.get("scope") == "all" and name != "off" else name


def _nem(node: Mapping[str, Any]) -> str:
    return "on_policy" if node.get("on_policy_fraction") else str(node["mode"])
