"""The cost of a network: MACs counted from the graph of a forward pass, bits as `prepare` reports them, bytes as stored."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qdm_lightning.quantization.attention import QuantizedAttention
from qdm_lightning.quantization.cost_report import CostReport, LayerCost
from qdm_lightning.quantization.layers import QuantizedLayer
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.quantization.summary import FLOAT, LayerRow, QuantizationReport

FLOAT_BYTES = 4

_MULTIPLYING = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)


def cost(
    model: nn.Module,
    report_or_config: QuantizationReport | QuantConfig,
    example_inputs: Tensor | Sequence[Any],
    *,
    quantizers: Quantizers | None = None,
) -> CostReport:
    """Count what a forward pass of `model` multiplies, at which bits, and what the model takes up as stored.

    The pass runs on a copy, on the meta device, where nothing is computed (on the model's own if its graph depends on
    values). Its quantizers are left out, so that they need no calibration and do not count. `model` stays as it is.

    Args:
        model: prepared, with the report that `prepare` returned; or float, with a configuration to count it under.
        report_or_config: where bits are taken from, whoever wrote the quantizers.
        example_inputs: positional arguments of the forward pass, or its only one; a batch of 1 gives the cost of one sample.
        quantizers: factories as for `prepare`, beside a configuration.

    Raises:
        ValueError: the report is not of this model; a configuration that `prepare` refuses; a layer with products that the
            counter does not know.
    """
    if isinstance(report_or_config, QuantConfig):
        model = _copy(model)
        report = prepare(model, report_or_config, quantizers)
    else:
        report = report_or_config
        _check_report(model, report)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    try:
        macs = _count(_copy(model, _on_meta), inputs, torch.device("meta"))
    except RuntimeError:  # values that a meta tensor has not; an error of the model's own comes again
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        macs = _count(_copy(model), inputs, device)
    return CostReport(list(_layers(model, report, macs)))


def _copy(model: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda original: original) -> nn.Module:
    """A copy of the modules that holds `tensor(original)`, by default the very tensors of `model`."""
    with torch.no_grad():
        memo = {id(original): tensor(original) for original in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _on_meta(original: Tensor) -> Tensor:
    tensor = original.to("meta")
    return nn.Parameter(tensor, requires_grad=False) if isinstance(original, nn.Parameter) else tensor


def _check_report(model: nn.Module, report: QuantizationReport) -> None:
    modules = dict(model.named_modules())
    quantized = {
        name
        for name, module in modules.items()
        if isinstance(module, QuantizedLayer) or isinstance(getattr(module, "processor", None), QuantizedAttention)
    }
    listed = {_module_name(row) for row in report.quantized}
    strange = (quantized ^ listed) | {name for row in report.rows if (name := _module_name(row)) not in modules}
    if strange:
        raise ValueError(f"the report is not of this model, see {min(strange)}: give the one that prepare returned for it")


def _module_name(row: LayerRow) -> str:
    return row.name.rpartition(".")[0] if row.kind == "attention" else row.name


def _count(model: nn.Module, inputs: tuple[Any, ...], device: torch.device) -> Counter[str]:
    """MACs of each module by name, those of the modules that it calls not included. Changes `model`."""
    for module in model.eval().modules():
        if isinstance(module, QuantizedLayer):
            module.attach(None, None)
        elif isinstance(module, QuantizedAttention):
            module.query = module.key = module.value = module.probabilities = None
    counter, macs = FlopCounterMode(display=False), Counter[str]()
    running, counted = [""], 0

    def switch(entered: str | None) -> None:
        """What was counted since the last call belongs to the module that ran; now `entered` runs, or its caller again."""
        nonlocal counted
        total = counter.get_total_flops() // 2
        macs[running[-1]] += total - counted
        counted = total
        if entered is None:
            running.pop()
        else:
            running.append(entered)

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: switch(name))
        module.register_forward_hook(lambda *_: switch(None))
    with torch.no_grad(), device, _products_in_the_open(), counter:
        model(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs))
    for name, module in model.named_modules():
        if name in macs and not macs[name] and isinstance(module, _MULTIPLYING):
            raise ValueError(
                f"{name}, a {type(module).__name__}, multiplies by an operator that torch's counter has no formula for: "
                "register one with torch.utils.flop_counter.register_flop_formula"
            )
    return macs


@contextmanager
def _products_in_the_open() -> Iterator[None]:
    """Within the block attention runs operator by operator: fused kernels would hide its products from the counter."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _layers(model: nn.Module, report: QuantizationReport, macs: Counter[str]) -> Iterator[LayerCost]:
    rows: dict[str, list[LayerRow]] = {}
    for row in report.rows:
        rows.setdefault(_module_name(row), []).append(row)
    met, of_quantizers = set[int](), set[nn.Module]()
    for name, module in model.named_modules():
        if module in of_quantizers:
            continue
        processor = getattr(module, "processor", None)
        if isinstance(module, QuantizedLayer):
            of_quantizers.update(inner for child in module.children() for inner in child.modules())
        elif isinstance(processor, QuantizedAttention):
            of_quantizers.update(processor.modules())
        listed = rows.get(name, [LayerRow(name, type(module).__name__, 0, FLOAT, FLOAT)])
        if listed[0].kind == "attention":
            yield from _attention(module, processor, listed, macs[name] + macs[f"{name}.processor"], met)
            continue
        layer = _layer(module, listed[0], macs[name], met)
        if name in rows or layer.macs or layer.float_bytes:
            yield layer


def _layer(module: nn.Module, row: LayerRow, macs: int, met: set[int]) -> LayerCost:
    parameters, size, float_size = _own_sizes(module, row.weight_bits, met)
    return LayerCost(
        name=row.name,
        kind=row.kind,
        macs=macs,
        parameters=parameters,
        weight_bits=row.weight_bits,
        act_bits=row.act_bits,
        operands=(row.weight_bits, row.act_bits),
        bytes=size + _state_bytes(module, "weight_quantizer", "input_quantizer"),
        float_bytes=float_size,
    )


def _attention(module: nn.Module, processor: Any, rows: list[LayerRow], macs: int, met: set[int]) -> Iterator[LayerCost]:
    """The two products of an attention: q k^T and probs v multiply equally often."""
    qkv, probs = rows
    parameters, size, float_size = _own_sizes(module, FLOAT, met)
    yield LayerCost(
        name=qkv.name,
        kind=qkv.kind,
        weight_bits=None,
        macs=macs - macs // 2,
        parameters=parameters,
        act_bits=qkv.act_bits,
        operands=(qkv.act_bits, qkv.act_bits),
        bytes=size + _state_bytes(processor, "query", "key", "value"),
        float_bytes=float_size,
    )
    yield LayerCost(
        name=probs.name,
        kind=probs.kind,
        weight_bits=None,
        macs=macs // 2,
        parameters=0,
        act_bits=probs.act_bits,
        operands=(probs.act_bits, qkv.act_bits),
        bytes=_state_bytes(processor, "probabilities"),
        float_bytes=0,
    )


def _own_sizes(module: nn.Module, weight_bits: int, met: set[int]) -> tuple[int, int, int]:
    """Parameters, bytes, and bytes without quantization of the tensors that belong to `module` itself.

    A tensor that several modules share counts where it is met first, and is then added to `met`.
    """
    state = module.state_dict(keep_vars=True)
    tensors = [tensor for key, tensor in state.items() if "." not in key and isinstance(tensor, Tensor)]
    new = {id(tensor): tensor for tensor in tensors if id(tensor) not in met}
    met.update(new)
    weight = module.weight if isinstance(module, QuantizedLayer) else None
    # A quantized weight counts also where it is shared: each layer has codes of its own.
    codes = sum(-(-tensor.numel() * weight_bits // 8) for tensor in tensors if tensor is weight)
    added = module.log_channel_scale if isinstance(module, QuantizedLayer) else None
    return (
        sum(tensor.numel() for tensor in new.values() if isinstance(tensor, nn.Parameter) and tensor is not added),
        codes + sum(_bytes(tensor) for tensor in new.values() if tensor is not weight),
        sum(_bytes(tensor) for tensor in new.values() if tensor is not added),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * (FLOAT_BYTES if tensor.is_floating_point() else tensor.element_size())


def _state_bytes(module: nn.Module, *names: str) -> int:
    """Scales, zero points and whatever else the quantizers of `module` by these names keep; 0 where it is not prepared."""
    if not isinstance(module, QuantizedLayer | QuantizedAttention):
        return 0
    states = [quantizer.state_dict() for name in names if (quantizer := getattr(module, name)) is not None]
    return sum(_bytes(value) for state in states for value in state.values() if isinstance(value, Tensor))
