"""`prepare`: quantize any `nn.Module` by swapping its layers, and say what got how many bits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from qdm_lightning.quantization.attention import QuantizedAttention, is_attention, unsupported
from qdm_lightning.quantization.fusion import fuse_silu
from qdm_lightning.quantization.layers import SWAPS, QuantizedLayer, swap
from qdm_lightning.quantization.quantizer import ActivationQuantizer, LSQActivation, LSQProbability, LSQWeight, WeightQuantizer
from qdm_lightning.quantization.spec import QuantConfig, check_scope
from qdm_lightning.quantization.summary import FLOAT, LayerRow, QuantizationReport
from qdm_lightning.quantization.timestep import tell_own_timesteps

UNET_FIRST_LAST = ("conv_in", "conv_out", "time_embedding.*", "*time_emb_proj")
"""Names of the first and last layers in diffusers' U-Nets: two convolutions, and the layers of the time embedding."""

_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that compute with their children's weights themselves: a quantized child would be bypassed."""

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, *_WHOLE)


@dataclass(frozen=True, kw_only=True)
class Quantizers:
    """The factories that `prepare` calls; each may be a class or a `functools.partial`.

    `weight(bits=, weight=)`; `activation(bits=, padded=)` for the inputs of layers; `attention(bits=, padded=)` for q, k, v;
    `probabilities(bits=, padded=)`; `taq(bits=, padded=)` where TaQ acts by `scope` (one of `SCOPES`, or patterns of names),
    which is also given `symmetric=True` for probabilities.
    """

    weight: Callable[..., WeightQuantizer] = LSQWeight
    activation: Callable[..., ActivationQuantizer] = LSQActivation
    attention: Callable[..., ActivationQuantizer] = LSQActivation
    probabilities: Callable[..., ActivationQuantizer] = LSQProbability
    taq: Callable[..., ActivationQuantizer] | None = None
    scope: str | Sequence[str] = "qkv"

    def __post_init__(self) -> None:
        check_scope(self.scope)

    @classmethod
    def with_taq(
        cls,
        weight: Callable[..., WeightQuantizer],
        activation: Callable[..., ActivationQuantizer],
        taq: Callable[..., ActivationQuantizer] | None,
        scope: str | Sequence[str],
    ) -> Quantizers:
        """The factories of a run: TaQ's (None: no TaQ) serves what `scope` says, `activation` all else but probabilities."""
        return cls(weight=weight, activation=activation, attention=activation, taq=taq, scope=scope)

    def of(self, name: str, role: str) -> Callable[..., ActivationQuantizer]:
        """The factory for the activation of this name; `role` is `activation`, `attention` or `probabilities`.

        Raises:
            ValueError: TaQ acts on probabilities, and its factory takes no `symmetric`.
        """
        if self.taq is None or not self._acts(name, role):
            return getattr(self, role)
        if role != "probabilities":
            return self.taq
        taken = inspect.signature(self.taq).parameters
        if "symmetric" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            kind = getattr(self.taq, "func", self.taq)
            raise ValueError(
                f"taq.scope={self.scope} has TaQ act on probabilities, for which {getattr(kind, '__name__', kind)} must take "
                "symmetric=True (zero point 0): type taq.scope=qkv or taq.scope=all_but_probs"
            )
        return partial(self.taq, symmetric=True)

    def _acts(self, name: str, role: str) -> bool:
        if not isinstance(self.scope, str):
            return any(fnmatchcase(name, pattern) for pattern in self.scope)
        where = {
            "qkv": ("attention",),
            "attention": ("attention", "probabilities"),
            "all_but_probs": ("attention", "activation"),
        }
        return self.scope == "all" or role in where[self.scope]

    def check_patterns(self, names: Collection[str]) -> None:
        """Raise ValueError where a pattern of `scope` matches none of the quantized activations' names."""
        patterns = () if self.taq is None or isinstance(self.scope, str) else self.scope
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                some = ", ".join([*list(names)[:2], *[name for name in names if name.endswith(".probabilities")][:1]])
                raise ValueError(
                    f"taq.scope: the pattern {pattern!r} matches no quantized activation: they are named like {some}"
                )


def prepare(
    model: nn.Module, config: QuantConfig, quantizers: Quantizers | None = None, *, first_last: Sequence[str] | None = None
) -> QuantizationReport:
    """Swap the layers of `model`, in place, for quantized ones that hold the same parameters.

    Quantized are convolutions (1-d, 2-d), linear layers and the operands and probabilities of diffusers' attention. What has
    32 bits stays the very float layer, so that a model prepared at 32 bits computes what it did, bit for bit. The quantizers
    must then be started from data by `calibrate`. A model whose `forward` takes the timestep (`timestep.NAMES`) tells it to its
    quantizers in each pass; around any other one with TaQ stands `with timesteps(t):`.

    Args:
        model: any module, not prepared before.
        config: bit-widths and rules.
        quantizers: factories; the LSQ+ baseline where None.
        first_last: name patterns of the layers with `config.first_last_bits`; None: `UNET_FIRST_LAST` for diffusers'
            U-Nets, else the first and the last layer in order of registration.

    Returns:
        what got how many bits and what stayed in float.

    Raises:
        ValueError: the model is prepared already; a pattern of `rules`, `first_last` or TaQ's scope matches nothing; a layer
            whose kind can't be quantized is not at 32 bits (a rule `<name>: 32` leaves it in float on purpose).
    """
    quantizers = quantizers or Quantizers()
    modules = _modules(model)
    if any(isinstance(m, QuantizedLayer | QuantizedAttention) for m in modules.values()):
        raise ValueError("the model is prepared already: prepare a fresh float model")
    bits = _bits(config, modules, first_last)
    quantizers.check_patterns(_activations(modules, bits))
    rows = list[LayerRow]()
    for name, module in modules.items():
        if is_attention(module):
            rows += _prepare_attention(name, module, *bits[name], quantizers)
        elif isinstance(module, _WEIGHTED):
            rows.append(_prepare_layer(model, name, module, *bits[name], quantizers, config.channel_scales))
        elif (own := sum(p.numel() for p in module.parameters(recurse=False))) > 0:
            rows.append(LayerRow(name, type(module).__name__, own, FLOAT, FLOAT))
    fuse_silu(model)
    tell_own_timesteps(model)
    return QuantizationReport(rows)


def is_weighted(module: nn.Module) -> bool:
    """True for a layer that multiplies by weights of its own."""
    return isinstance(module, _WEIGHTED)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, each once, without those whose weights a parent computes with itself."""
    inside = {id(child) for m in model.modules() if isinstance(m, _WHOLE) for child in m.modules() if child is not m}
    return {name: module for name, module in model.named_modules() if id(module) not in inside}


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


def _bits(config: QuantConfig, modules: dict[str, nn.Module], first_last: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """By name, the bits of weight and input, or of q, k, v and probabilities. Checks that every pattern is of use."""
    names = [name for name, module in modules.items() if isinstance(module, _WEIGHTED) or is_attention(module)]
    if first_last is None:
        unet = {"conv_in", "conv_out"} <= set(names)
        first_last = [p for p in UNET_FIRST_LAST if _matching(names, p)] if unet else [*names[:1], *names[-1:]]
    for kind, patterns in (("quant.rules", config.rules), ("first_last", first_last)):
        for pattern in patterns:
            if not _matching(names, pattern):
                some = ", ".join(names[:3])
                raise ValueError(f"{kind}: the pattern {pattern!r} matches no layer: layers are named like {some}")
    bits = dict.fromkeys(names, (config.weight_bits, config.act_bits))
    for pattern in first_last:
        bits.update(dict.fromkeys(_matching(names, pattern), (config.first_last_bits, config.first_last_bits)))
    bits.update({name: (config.attention_bits, config.probs_bits) for name in names if is_attention(modules[name])})
    for pattern, ruled in config.rules.items():
        bits.update(dict.fromkeys(_matching(names, pattern), (ruled, ruled)))
    return bits


OPERANDS = ("query", "key", "value", "probabilities")
"""Of an attention: what follows its name where TaQ's scope or `diagnose` mean one of them."""


def _activations(modules: dict[str, nn.Module], bits: dict[str, tuple[int, int]]) -> list[str]:
    """Names of the activations that are quantized: a layer's for its input, an attention's with its operand."""
    found = []
    for name, (first, second) in bits.items():
        if is_attention(modules[name]):
            widths = (first, first, first, second)
            found += [f"{name}.{part}" for part, own in zip(OPERANDS, widths, strict=True) if own != FLOAT]
        elif second != FLOAT:
            found.append(name)
    return found


def _quantizer(factory: Callable[..., Any], bits: int, **options: Any) -> Any:
    return None if bits == FLOAT else factory(bits=bits, **options)


def _names(*quantizers: nn.Module | None) -> list[str]:
    return [type(quantizer).__name__ for quantizer in quantizers if quantizer is not None]


def _prepare_layer(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    weight_bits: int,
    act_bits: int,
    quantizers: Quantizers,
    channel_scales: str,
) -> LayerRow:
    kind = type(layer)
    parameters = sum(p.numel() for p in layer.parameters(recurse=not isinstance(layer, tuple(SWAPS))))
    row = LayerRow(name, kind.__name__, parameters, weight_bits, act_bits)
    if weight_bits == act_bits == FLOAT:
        return row
    if kind not in SWAPS:
        raise ValueError(
            f"{name or 'the model'} is a {kind.__name__}, which can't be quantized (only "
            f"{', '.join(swapped.__name__ for swapped in SWAPS)} can): leave it in float by the rule quant.rules={{{name}: 32}}"
        )
    if not name:
        raise ValueError(f"the model is a bare {kind.__name__}: wrap it, for example nn.Sequential(model)")
    weight_quantizer = _quantizer(quantizers.weight, weight_bits, weight=layer.weight)
    input_quantizer = _quantizer(quantizers.of(name, "activation"), act_bits, padded=not isinstance(layer, nn.Linear))
    new = swap(layer, weight_quantizer, input_quantizer, channel_scales=channel_scales)
    new.to(next(layer.parameters()).device).train(layer.training)
    everywhere = [n for n, m in model.named_modules(remove_duplicate=False) if m is layer]  # one layer may stand in two places
    for parent, _, leaf in (n.rpartition(".") for n in everywhere):
        setattr(model.get_submodule(parent), leaf, new)
    row.quantizers = _names(weight_quantizer, input_quantizer)
    return row


def _prepare_attention(name: str, module: Any, qkv_bits: int, probs_bits: int, quantizers: Quantizers) -> list[LayerRow]:
    rows = [LayerRow(f"{name}.{part}", "attention", 0, FLOAT, b) for part, b in (("qkv", qkv_bits), ("probs", probs_bits))]
    if qkv_bits == probs_bits == FLOAT:
        return rows
    reason = unsupported(module)
    if reason:
        raise ValueError(
            f"{name}: this attention can't be quantized, {reason}: leave it in float by the rule quant.rules={{{name}: 32}}"
        )
    q, k, v = (_quantizer(quantizers.of(f"{name}.{part}", "attention"), qkv_bits, padded=False) for part in OPERANDS[:3])
    probabilities = _quantizer(quantizers.of(f"{name}.probabilities", "probabilities"), probs_bits, padded=False)
    processor = QuantizedAttention(q, k, v, probabilities).to(next(module.parameters()).device).train(module.training)
    module.set_processor(processor)
    rows[0].quantizers, rows[1].quantizers = list(dict.fromkeys(_names(q, k, v))), _names(probabilities)
    return rows
