"""`to_integer`: a prepared, trained model as one that multiplies integer codes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qdm_lightning.integer import kernels
from qdm_lightning.integer.attention import IntegerAttention
from qdm_lightning.integer.blocks import fuse
from qdm_lightning.integer.layers import IntegerConv2d, IntegerLayer, IntegerLinear
from qdm_lightning.integer.report import Inexact, IntegerReport, IntegerRow, Unsupported
from qdm_lightning.quantization.attention import QuantizedAttention
from qdm_lightning.quantization.layers import QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear
from qdm_lightning.quantization.preparation import is_weighted
from qdm_lightning.quantization.summary import FLOAT

BY_CONFIGURATION = "32 bits by its configuration"


def to_integer(model: nn.Module, *, allow_float: Sequence[str] = ()) -> tuple[nn.Module, IntegerReport]:
    """A copy of `model` whose quantized layers and attentions run on integer codes by PyTorch's integer kernels.

    The counterpart of `quantization.prepare`. The result is in eval mode, has the same call, and computes what the model
    computes in eval mode to float32 rounding: weights are quantized now, activations by the same grids, from `timesteps(t)`
    where they depend on t. It is for inference on a CPU: no gradient passes.

    Args:
        model: prepared by `prepare`, calibrated or trained, on the CPU; any `nn.Module`. It is left as it is.
        allow_float: name patterns of layers that may stay simulated in float where they can't be integer.

    Returns:
        The integer model, and what multiplies integer codes and what stayed in float, with the reason. Layers that their
        configuration left at 32 bits stay float; so do those whose sums this processor can't form exactly.

    Raises:
        ValueError: the model has no quantized layer or is not on the CPU; a layer that its configuration quantized can't be
            integer, and no pattern of `allow_float` matches it; such a pattern matches no layer.
    """
    _check(model)
    result = copy.deepcopy(model)
    return result, convert_in_place(result, allow_float=allow_float)


def convert_in_place(model: nn.Module, *, allow_float: Sequence[str] = ()) -> IntegerReport:
    """As `to_integer`, of the model itself, which an error leaves half done."""
    _check(model)
    kernels.register()
    result = model.eval().requires_grad_(False)
    _check_patterns(allow_float, [name for name, _ in result.named_modules()])
    rows = []
    for name, module in list(result.named_modules()):
        if isinstance(module, QuantizedLayer):
            row, new = _converted(name, module, allow_float)
            for parent, _, leaf in (n.rpartition(".") for n, m in _everywhere(result) if m is module and new is not module):
                setattr(result.get_submodule(parent), leaf, new)
            rows.append(row)
        elif isinstance(getattr(module, "processor", None), QuantizedAttention):
            rows.append(_converted_attention(f"{name}.processor", module, allow_float))
        elif is_weighted(module):
            rows.append(IntegerRow(name, type(module).__name__, FLOAT, FLOAT, "float", BY_CONFIGURATION))
        elif isinstance(module, nn.Embedding):
            rows.append(IntegerRow(name, type(module).__name__, FLOAT, FLOAT, "float", "a table, nothing is multiplied"))
    fuse(result)
    return IntegerReport(rows)


def _everywhere(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))  # one layer may stand in two places


def _check(model: nn.Module) -> None:
    modules = list(model.modules())
    if any(isinstance(m, IntegerLayer) for m in modules):
        raise ValueError("the model runs on integer codes already")
    if not any(isinstance(m, QuantizedLayer | QuantizedAttention) for m in modules):
        raise ValueError("the model has full precision: only a quantized one (quantization.prepare) runs on integer codes")
    elsewhere = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ValueError(f"the model is on {elsewhere}: integer execution is for the CPU, move it there (model.cpu())")
    other = next((p.dtype for p in model.parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise ValueError(f"the model has parameters of {other}: integer execution is made from float32 (model.float())")


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"allow_float: the pattern {pattern!r} matches no layer")


def _reason(name: str, error: Unsupported, patterns: Sequence[str]) -> str:
    """Why this layer is float, where the processor or a pattern lets it be; else an error."""
    if isinstance(error, Inexact) or any(fnmatchcase(name, pattern) for pattern in patterns):
        return str(error)
    raise ValueError(f"{name} can't run on integer codes, {error}: allow_float=[{name!r}] leaves it simulated") from error


def _converted(name: str, layer: QuantizedLayer, allow_float: Sequence[str]) -> tuple[IntegerRow, nn.Module]:
    kind = type(layer).__name__.removeprefix("Quant")
    weight_bits, act_bits = (FLOAT if q is None else q.bits for q in (layer.weight_quantizer, layer.input_quantizer))

    def row(kernel: str, reason: str = "") -> IntegerRow:
        return IntegerRow(name, kind, weight_bits, act_bits, kernel, reason)

    if FLOAT in (weight_bits, act_bits):
        return row("float", BY_CONFIGURATION), layer
    try:
        new = _integer_layer(layer)
        new.check()
    except Unsupported as error:
        return row("float", _reason(name, error, allow_float)), layer
    return row("winograd" if getattr(new, "winograd", None) is not None else "onednn"), new


def _integer_layer(layer: QuantizedLayer) -> Any:
    if isinstance(layer, QuantLinear):
        return IntegerLinear(layer)
    if isinstance(layer, QuantConv1d | QuantConv2d):
        return IntegerConv2d(layer)
    raise Unsupported(f"it is a {type(layer).__name__}")


def _converted_attention(name: str, module: Any, allow_float: Sequence[str]) -> IntegerRow:
    processor: QuantizedAttention = module.processor
    parts = (processor.query, processor.probabilities)
    qkv, probabilities = (FLOAT if part is None else part.bits for part in parts)

    def row(kernel: str, reason: str = "") -> IntegerRow:
        return IntegerRow(name, "attention", None, max(qkv, probabilities), kernel, reason)

    if FLOAT in (qkv, probabilities):
        return row("float", BY_CONFIGURATION)
    try:
        new = IntegerAttention(processor, module.heads, module.to_q.weight.shape[0] // module.heads)
    except Unsupported as error:
        return row("float", _reason(name, error, allow_float))
    module.set_processor(new)
    return row("vnni" if new.native_ready else "int_mm")
