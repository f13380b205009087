"""What a file says of a student's quantization, as settings and as factories of quantizers.

Files name quantizers by dotted paths, as the run's configuration did. A path in a file runs code: it must be what `base.trust`
has for its place, or be trusted by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from torch import nn

from qdm_lightning.base.checks import one_line
from qdm_lightning.base.trust import check_targets, targets
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.spec import QuantConfig, TaQOff
from qdm_lightning.runs.formats import upgraded
from qdm_lightning.training.network_settings import NODES, quantization_settings


def checked_quantization(quantization: Mapping[str, Any], file: Path | str) -> dict[str, Any]:
    """`quant` and `taq` of a file of any version, as `quantization_settings` has them; ValueError where they are damaged."""
    quant, taq = quantization["quant"], quantization["taq"]
    if not isinstance(quant, dict) or not isinstance(taq, dict):
        raise ValueError(f"{file} is damaged: {'taq' if isinstance(quant, dict) else 'quant'} is missing")
    kinds = dict(targets(quant, "quant"))
    missing = [f"quant.{name}._target_" for name in NODES if not kinds.get(f"quant.{name}")]
    if missing:
        raise ValueError(f"{file} is damaged: {missing[0]} is missing")
    try:
        return quantization_settings(upgraded({"quant": quant, "taq": taq}))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} does not describe a student: {one_line(error)}") from error


def named_quantizers(settings: Mapping[str, Any], file: Path | str, trusted: Collection[str] = ()) -> Quantizers:
    """The factories that checked settings name.

    Raises:
        ValueError: a quantizer that is not trusted, or that cannot be imported.
    """
    quant, taq = settings["quant"], settings["taq"]
    check_targets({"quant": quant, "taq": taq}, trusted, source=file, way="load_student(..., trusted=['{target}'])")
    weight, act = (_factory(file, quant[name]) for name in NODES)
    options = {name: value for name, value in taq.items() if name != "scope"}
    return Quantizers.with_taq(weight, act, _factory(file, options) if taq else None, taq.get("scope", TaQOff.scope))


def prepare_by(unet: nn.Module, settings: Mapping[str, Any], quantizers: Quantizers) -> None:
    """`prepare`, in place, with the bits of checked settings."""
    bits = {name: value for name, value in settings["quant"].items() if name not in NODES}
    prepare(unet, QuantConfig(**bits), quantizers)


def _factory(file: Path | str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """A node as a partial of its `_target_`; nodes inside it are called."""
    options = {name: _value(file, v) for name, v in node.items() if not (name.startswith("_") and name.endswith("_"))}
    return functools.partial(_locate(file, node["_target_"]), *_value(file, node.get("_args_", [])), **options)


def _value(file: Path | str, value: Any) -> Any:
    if isinstance(value, dict):
        return _factory(file, value)() if "_target_" in value else {name: _value(file, v) for name, v in value.items()}
    return [_value(file, v) for v in value] if isinstance(value, list) else value


def _locate(file: Path | str, target: str) -> Any:
    try:
        return resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: {target} cannot be imported: {one_line(error)}") from error
