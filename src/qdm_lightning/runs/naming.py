"""What a run is called: in a few words on a dashboard, as the name of its folder, as a job of a sweep. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qdm_lightning.diffusion.spec import solver_name
from qdm_lightning.quantization.spec import TAQ, QuantConfig


def is_teacher(config: Mapping[str, Any]) -> bool:
    """True where a configuration quantizes nothing: the run trains a full-precision teacher.

    Raises:
        ValueError: a bit-width that is not allowed.
    """
    known = {f.name for f in fields(QuantConfig)}
    return QuantConfig(**{name: value for name, value in config["quant"].items() if name in known}).is_float


def labels(config: Mapping[str, Any]) -> dict[str, str]:
    """`job` (teacher, qat, ptq), `bits` (w4a4), `taq`, `nem` and `sampler` (ddim-50) of a resolved configuration.

    A teacher has neither bits nor what belongs to them. Nothing comes out of a configuration that is not a run's.
    """
    if not {"quant", "taq", "nem", "sampler"} <= set(config):
        return {}
    quant, nem = config["quant"], config["nem"]
    guidance = config["sampler"].get("guidance", 1)
    guided = f"-guidance{guidance:g}" if guidance != 1 else ""
    sampler = {"sampler": f"{solver_name(config['sampler'])}-{config['sampler']['steps']}{guided}"}
    if is_teacher(config):
        return {"job": "teacher", **sampler}
    mimicking = ("on_policy" if nem.get("on_policy_fraction") else str(nem["mode"])) + _weighting(nem)
    return {
        "job": quant["mode"],
        "bits": f"w{quant['weight_bits']}a{quant['act_bits']}",
        "taq": _taq(config["taq"]),
        "nem": "off" if quant["mode"] == "ptq" else mimicking,
        **sampler,
    }


def _weighting(nem: Mapping[str, Any]) -> str:
    """`-propagation`, `-minsnr`, or the class of a user's own; empty where every timestep counts alike."""
    name = str(nem.get("weighting", {}).get("_target_", "Uniform")).rpartition(".")[2]
    return "" if name == "Uniform" else f"-{name.lower()}"


def _taq(node: Mapping[str, Any]) -> str:
    target = str(node.get("_target_") or "")
    name = next((name for name, kind in TAQ.items() if getattr(kind, "_target_", "") == target), target.rpartition(".")[2])
    scope = node.get("scope", "qkv")
    where = "" if name == "off" or scope == "qkv" else f"-{scope}" if isinstance(scope, str) else "-chosen"
    return name + where.replace("_", "-")


def run_name(config: Mapping[str, Any]) -> str:
    """Short name of what a run does, such as `w4a4_normalize_replace_ddim50_seed0`; the same settings give the same name."""
    words = labels(config)
    trained = [words["bits"], words["taq"], "ptq" if words["job"] == "ptq" else words["nem"]] if "bits" in words else ["fp32"]
    return "_".join([*trained, words["sampler"].replace("-", ""), f"seed{config['seed']}"])


def job_name(config: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Name of a job's folder: `run_name`, the last tag, and a hash of `identity`, the settings that tell jobs apart."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
    label = [re.sub(r"[^\w.=+-]+", "-", str(tag)) for tag in config["tags"][-1:]]
    return "_".join([run_name(config), *label, digest])
