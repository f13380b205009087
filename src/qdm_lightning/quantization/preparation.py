"""`prepare`: quantize any `nn.Module` by swapping its layers, and say what got how many bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from qdm_lightning.quantization.attention import QuantizedAttention, is_attention, unsupported
from qdm_lightning.quantization.fusion import fuse_silu
from qdm_lightning.quantization.layers import SWAPS, QuantizedLayer, swap
from qdm_lightning.quantization.quantizer import ActivationQuantizer, LSQActivation, LSQProbability, LSQWeight, WeightQuantizer
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.quantization.summary import LayerRow, QuantizationReport

UNET_FIRST_LAST = ("conv_in", "conv_out", "time_embedding.*", "*time_emb_proj")
"""Names of the first and last layers in diffusers' U-Nets: two convolutions, and the layers of the time embedding."""

_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that compute with their children's weights themselves: a quantized child would be bypassed."""

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, *_WHOLE)


@dataclass(frozen=True, kw_only=True)
class Quantizers:
    """The factories that `prepare` calls; each may be a class or a `functools.partial`.

    `weight(bits=, weight=)`; `activation(bits=, padded=)` for the inputs of layers; `attention(bits=, padded=)` for q, k, v;
    `probabilities(bits=, padded=)`.
    """

    weight: Callable[..., WeightQuantizer] = LSQWeight
    activation: Callable[..., ActivationQuantizer] = LSQActivation
    attention: Callable[..., ActivationQuantizer] = LSQActivation
    probabilities: Callable[..., ActivationQuantizer] = LSQProbability

    @classmethod
    def with_taq(
        cls,
        weight: Callable[..., WeightQuantizer],
        activation: Callable[..., ActivationQuantizer],
        taq: Callable[..., ActivationQuantizer] | None,
        scope: str,
    ) -> Quantizers:
        """The factories of a run: TaQ's (None: no TaQ) serves q, k, v, and with `scope="all"` the inputs of layers too."""
        attention = taq or activation
        return cls(weight=weight, activation=attention if scope == "all" else activation, attention=attention)


def prepare(
    model: nn.Module, config: QuantConfig, quantizers: Quantizers | None = None, *, first_last: Sequence[str] | None = None
) -> QuantizationReport:
    """Swap the layers of `model`, in place, for quantized ones that hold the same parameters.

    Quantized are convolutions (1-d, 2-d), linear layers and the operands and probabilities of diffusers' attention. What has
    32 bits stays the very float layer, so that a model prepared at 32 bits computes what it did, bit for bit. The quantizers
    must then be started from data by `calibrate`.

    Args:
        model: any module, not prepared before.
        config: bit-widths and rules.
        quantizers: factories; the LSQ+ baseline where None.
        first_last: name patterns of the layers with `config.first_last_bits`; None: `UNET_FIRST_LAST` for diffusers'
            U-Nets, else the first and the last layer in order of registration.

    Returns:
        what got how many bits and what stayed in float.

    Raises:
        ValueError: the model is prepared already; a pattern of `rules` or `first_last` matches no layer; a layer whose kind
            can't be quantized is not at 32 bits (a rule `<name>: 32` leaves it in float on purpose).
    """
    quantizers = quantizers or Quantizers()
    modules = _modules(model)
    if any(isinstance(m, QuantizedLayer | QuantizedAttention) for m in modules.values()):
        raise ValueError("the model is prepared already: prepare a fresh float model")
    bits = _Bits(config, [n for n, m in modules.items() if _has_bits(m)], first_last)
    rows = []
    for name, module in modules.items():
        if is_attention(module):
            rows += _prepare_attention(name, module, bits, quantizers)
        elif isinstance(module, _WEIGHTED):
            rows.append(_prepare_layer(model, name, module, bits, quantizers))
        elif (own := sum(p.numel() for p in module.parameters(recurse=False))) > 0:
            rows.append(LayerRow(name, type(module).__name__, own, 32, 32))
    fuse_silu(model)
    return QuantizationReport(rows)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, each once, without those whose weights a parent computes with itself."""
    inside = {id(child) for m in model.modules() if isinstance(m, _WHOLE) for child in m.modules() if child is not m}
    return {name: module for name, module in model.named_modules() if id(module) not in inside}


def _has_bits(module: nn.Module) -> bool:
    return isinstance(module, _WEIGHTED) or is_attention(module)


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


class _Bits:
    """Resolves a layer's name to its bit-widths, and checks that every pattern is of use."""

    def __init__(self, config: QuantConfig, names: list[str], first_last: Sequence[str] | None) -> None:
        self.config = config
        if first_last is None:
            unet = {"conv_in", "conv_out"} <= set(names)
            first_last = [p for p in UNET_FIRST_LAST if _matching(names, p)] if unet else [*names[:1], *names[-1:]]
        self.first_last = first_last
        for kind, patterns in (("quant.rules", config.rules), ("first_last", first_last)):
            for pattern in patterns:
                if not _matching(names, pattern):
                    some = ", ".join(names[:3])
                    raise ValueError(f"{kind}: the pattern {pattern!r} matches no layer: layers are named like {some}")

    def layer(self, name: str) -> tuple[int, int]:
        """Bits of weight and of input."""
        if any(fnmatchcase(name, pattern) for pattern in self.first_last):
            return self._ruled(name, self.config.first_last_bits, self.config.first_last_bits)
        return self._ruled(name, self.config.weight_bits, self.config.act_bits)

    def attention(self, name: str) -> tuple[int, int]:
        """Bits of q, k, v and of the probabilities."""
        return self._ruled(name, self.config.attention_bits, self.config.probs_bits)

    def _ruled(self, name: str, first: int, second: int) -> tuple[int, int]:
        """The two bit-widths, or those of the last rule that matches."""
        for pattern, wanted in self.config.rules.items():
            if fnmatchcase(name, pattern):
                first = second = wanted
        return first, second


def _prepare_layer(model: nn.Module, name: str, layer: nn.Module, bits: _Bits, quantizers: Quantizers) -> LayerRow:
    weight_bits, act_bits = bits.layer(name)
    parameters = sum(p.numel() for p in layer.parameters(recurse=not isinstance(layer, tuple(SWAPS))))
    row = LayerRow(name, type(layer).__name__, parameters, weight_bits, act_bits)
    if weight_bits == act_bits == 32:
        return row
    if type(layer) not in SWAPS:
        kinds = ", ".join(kind.__name__ for kind in SWAPS)
        raise ValueError(
            f"{name or 'the model'} is a {type(layer).__name__}, which can't be quantized (only {kinds} can): "
            f"leave it in float by the rule quant.rules={{{name}: 32}}"
        )
    if not name:
        raise ValueError(f"the model is a bare {type(layer).__name__}: wrap it, for example nn.Sequential(model)")
    weight_quantizer = None if weight_bits == 32 else quantizers.weight(bits=weight_bits, weight=layer.weight)
    padded = not isinstance(layer, nn.Linear)
    input_quantizer = None if act_bits == 32 else quantizers.activation(bits=act_bits, padded=padded)
    new = swap(layer, weight_quantizer, input_quantizer).to(next(layer.parameters()).device).train(layer.training)
    everywhere = [n for n, m in model.named_modules(remove_duplicate=False) if m is layer]  # one layer may stand in two places
    for parent, _, leaf in (n.rpartition(".") for n in everywhere):
        setattr(model.get_submodule(parent), leaf, new)
    row.quantizers = [type(q).__name__ for q in (weight_quantizer, input_quantizer) if q is not None]
    return row


def _prepare_attention(name: str, module: nn.Module, bits: _Bits, quantizers: Quantizers) -> list[LayerRow]:
    qkv_bits, probs_bits = bits.attention(name)
    rows = [LayerRow(f"{name}.qkv", "attention", 0, 32, qkv_bits), LayerRow(f"{name}.probs", "attention", 0, 32, probs_bits)]
    if qkv_bits == probs_bits == 32:
        return rows
    reason = unsupported(module)
    if reason:
        raise ValueError(
            f"{name}: this attention can't be quantized, {reason}: leave it in float by the rule quant.rules={{{name}: 32}}"
        )
    operands = [None if qkv_bits == 32 else quantizers.attention(bits=qkv_bits, padded=False) for _ in range(3)]
    probabilities = None if probs_bits == 32 else quantizers.probabilities(bits=probs_bits, padded=False)
    device = next(module.parameters()).device
    q, k, v = operands
    processor = QuantizedAttention(q, k, v, probabilities).to(device).train(module.training)
    module.set_processor(processor)  # type: ignore[operator]
    for row, quantizer in zip(rows, (operands[0], probabilities), strict=True):
        row.quantizers = [] if quantizer is None else [type(quantizer).__name__]
    return rows
