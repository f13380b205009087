"""A denoising step on integer codes beside what else computes it here: PyTorch FP32, FP32 compiled, bf16, the simulation,
OpenVINO FP32 and bf16, NNCF's W8A8, and our file in ONNX Runtime.

    python benchmarks/integer.py [--rounds 11] [--threads 2] [--taq scale] [--scope all] [--files FOLDER]

W4A4 and W8A8 with TaQ and quantized attention, the 35.7 M CIFAR-10 U-Net with random weights, calibrated briefly; batch 16 and
1; interleaved pairs. Ratios belong to the instruction set that is printed. The last line is one JSON object; `speedup` is the
time of PyTorch FP32 eager, in its better layout, over that of W4A4 on integer codes, each `speedup_<peer>` the peer's time over
that of W4A4; `roofline` compares each kind of operation with what this machine can do, `peak_megabytes` is a step's memory
beyond the weights (other runtimes keep theirs from step to step: not told).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import roofline
import runtimes
import torch
from models import build
from pairs import Pairs, interleave, ratio
from torch import nn

from qdm_lightning.diffusion.sampling import sample
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.integer import provenance, to_integer
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization import (
    EMANormalizedActivation,
    GroupedActivation,
    LSQActivation,
    LSQWeight,
    MinMax,
    NormalizedActivation,
    QuantConfig,
    Quantizers,
    cached_weights,
    calibrate,
    compiled,
    prepare,
)
from qdm_lightning.quantization.spec import SCOPES
from qdm_lightning.runs.provenance import hardware

TAQ = {"off": None, "normalize": NormalizedActivation, "ema": EMANormalizedActivation, "scale": GroupedActivation}
PEERS = ("openvino_fp32", "openvino_bf16", "nncf_w8a8", "nncf_w8a8_bf16", "w4a4_onnxruntime", "w4a4_openvino")
"""Of `benchmarks/runtimes.py`: what other runtimes make of the network, and of our files."""

SHAPE = (3, 32, 32)
Step = Callable[[], None]


def student(base: nn.Module, bits: int, options: argparse.Namespace) -> Denoiser:
    """A calibrated copy: the ranges over one batch from all timesteps."""
    unet: Any = copy.deepcopy(base).eval()
    quantizers = Quantizers.with_taq(LSQWeight, LSQActivation, TAQ[options.taq], options.scope)
    prepare(unet, QuantConfig(weight_bits=bits, act_bits=bits, rules=rules(options)), quantizers)
    network = Denoiser(unet).eval()
    t = torch.arange(25, 1000, 50)
    size = unet.config.sample_size
    x = torch.randn(len(t), unet.config.in_channels, size, size).contiguous(memory_format=torch.channels_last)
    calibrate(network, lambda: network(x, t), MinMax())
    return network


def rules(options: argparse.Namespace) -> dict[str, int]:
    """`--rules '*.conv_shortcut=8'` as `QuantConfig` takes them."""
    return {name: int(bits) for name, _, bits in (rule.partition("=") for rule in options.rules)}


def step(network: Any, batch: int, layout: torch.memory_format, autocast: bool = False) -> Step:
    """A closure that makes one denoising step on a fixed batch."""
    x = torch.randn(batch, *SHAPE).contiguous(memory_format=layout)
    t = torch.full((batch,), 500)

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            network(x, t)

    return run


def networks(base: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Networks by name. Those with fewer bits than 32 in both executions."""
    found: dict[str, Any] = {"fp32": Denoiser(base).eval()}
    for bits in (4, 8):
        simulated = student(base, bits, options)
        found[f"w{bits}a{bits}"], report = to_integer(simulated)
        found[f"w{bits}a{bits}_report"] = report
        if bits == 4:
            found["simulated"] = simulated
    return found


def steps(made: dict[str, Any], batch: int, compile_fp32: bool) -> dict[str, Step]:
    """What is timed, all in channels-last but `fp32_nchw`."""
    last = torch.channels_last
    base = made["fp32"]
    found = {
        "fp32": step(base, batch, last),
        "fp32_nchw": step(copy.deepcopy(base).to(memory_format=torch.contiguous_format), batch, torch.contiguous_format),
        "bf16": step(base, batch, last, autocast=True),
        "simulated": step(made["simulated"], batch, last),
        "w8a8": step(made["w8a8"], batch, last),
        "w4a4": step(made["w4a4"], batch, last),
    }
    if compile_fp32:
        found["fp32_compile"] = step(torch.compile(base), batch, last)
    return found


def peers(base: nn.Module, folder: Path, threads: int, batch: int) -> dict[str, Step]:
    """The steps of other runtimes, by name."""
    found = runtimes.networks(base, folder, threads, batch)
    return {name: step(found[name], batch, torch.contiguous_format) for name in PEERS if name in found}


def kinds(run: Step, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of a step by kind of operation, from torch's profiler and the calls of this package's own code."""
    from qdm_lightning.integer import native

    spent: dict[str, float] = defaultdict(float)
    originals = {name: getattr(native, name) for name in ("encode", "attention")}
    winograd = native.WinogradConv.__call__

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[name] += (time.perf_counter() - begin) * 1e3

        return call

    names = {"encode": "to codes (norm, SiLU, padding)", "attention": "attention products, softmax"}
    try:
        for name, function in originals.items():
            setattr(native, name, timed(names[name], function))
        native.WinogradConv.__call__ = timed("convolution, Winograd", winograd)  # type: ignore[method-assign]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            whole = (time.perf_counter() - begin) * 1e3
    finally:
        for name, function in originals.items():
            setattr(native, name, function)
        native.WinogradConv.__call__ = winograd  # type: ignore[method-assign]
    for event in profile.key_averages():
        kind = next((kind for part, kind in KERNELS.items() if part in event.key), None)
        if kind is not None:
            spent[kind] += event.self_cpu_time_total / 1e3
    found = {kind: value / repeats for kind, value in spent.items()}
    found["the rest (Python, small operations)"] = whole / repeats - sum(found.values())
    return {kind: round(value, 2) for kind, value in sorted(found.items(), key=lambda item: -item[1])}


KERNELS = {
    "onednn::qconv": "convolution, oneDNN int8",
    "onednn::qlinear": "linear, oneDNN int8",
    "mkldnn_convolution": "convolution, float",
    "aten::addmm": "linear, float",
    "native_group_norm": "group norm",
    "aten::silu": "SiLU",
    "aten::add": "sums",
    "aten::cat": "concatenation",
    "aten::copy_": "copies",
    "aten::upsample": "upsampling",
    "attention_math": "attention, float",
    "flash_attention": "attention, float",
}


def ddim(network: nn.Module, batch: int) -> Step:
    """A closure that draws a batch by DDIM-50."""
    sampler = SamplerConfig(kind="ddim", steps=50, batch_size=batch)

    def run() -> None:
        with torch.no_grad(), cached_weights(network):
            sample(network, sampler, DiffusionConfig(), shape=SHAPE, seeds=list(range(batch)), device=torch.device("cpu"))

    return run


def show(pairs: Pairs, base: str, title: str) -> dict[str, Any]:
    """Print a line for each variant; base over variant with its interval, by variant."""
    print(f"\n{title}\n{base:14} {median(first for own in pairs.values() for first, _ in own) * 1e3:9.1f} ms")
    found = {}
    for name, own in pairs.items():
        value = ratio([(last, first) for first, last in own])  # base over variant
        found[name] = value
        print(f"{name:14} {median(last for _, last in own) * 1e3:9.1f} ms   {value['ratio']:.2f} x {base} {value['interval']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--taq", default="scale", choices=list(TAQ))
    parser.add_argument("--scope", default="all", choices=list(SCOPES), help="where TaQ acts")
    parser.add_argument("--rules", nargs="*", default=[], help="bits by name pattern, such as '*.conv_shortcut=8'")
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 1])
    parser.add_argument("--only", nargs="*", help="of the variants, beside fp32")
    parser.add_argument("--no-compile", action="store_true", help="leave out FP32 under torch.compile")
    parser.add_argument("--no-runtimes", action="store_true", help="leave out OpenVINO, NNCF and ONNX Runtime")
    parser.add_argument(
        "--files", type=Path, help="where their files lie, made if they are not there; default: a temporary one"
    )
    parser.add_argument("--ddim", type=int, default=3, help="rounds of DDIM-50 at batch 16")
    parser.add_argument("--profile", action="store_true", help="the tables by kind of operation alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    compiled.set_mode("on")
    base = build("unet_cifar10")
    made = networks(base, options)
    isa = provenance()
    print(
        f"{hardware()['processor']}, {options.threads} threads, instruction set {isa['isa']}, {isa}, torch {torch.__version__}"
    )
    found: dict[int, dict[str, Any]] = {}
    memory: dict[str, dict[str, float]] = {}
    caches = ExitStack()
    caches.enter_context(cached_weights(made["simulated"]))
    folder = options.files or Path(caches.enter_context(tempfile.TemporaryDirectory()))
    if not options.no_runtimes and not options.profile:
        folder.mkdir(parents=True, exist_ok=True)
        runtimes.write_files(base, folder)
    for batch in [] if options.profile else options.batches:
        runs = steps(made, batch, not options.no_compile)
        runs |= {} if options.no_runtimes else peers(base, folder, options.threads, batch)
        runs = {name: run for name, run in runs.items() if options.only is None or name in ("fp32", *options.only)}
        found[batch] = show(interleave(runs, "fp32", options.rounds, options.warmup), "fp32", f"batch {batch}, one step")
        memory[str(batch)] = {name: roofline.peak_megabytes(run) for name, run in runs.items() if name not in PEERS}
        print(f"megabytes of a step at its peak, beyond what lies there before it: {memory[str(batch)]}")
    tables = {}
    for name in ("fp32", "w4a4", "w8a8"):
        run = step(made[name], options.batches[0], torch.channels_last)
        run()
        tables[name] = kinds(run)
        print(f"\n{name}, batch {options.batches[0]}: ms by kind of operation")
        for kind, value in tables[name].items():
            print(f"  {kind:36} {value:8.2f}")
    peak = roofline.machine()
    with roofline.counted(made["w4a4"]) as needs:
        step(made["w4a4"], options.batches[0], torch.channels_last)()
    bounds = roofline.roofline(needs, tables["w4a4"], peak)
    print(f"\nw4a4 against this machine's {', '.join(f'{value / 1e9:.0f} G{name}/s' for name, value in peak.items())}")
    for kind, own in bounds.items():
        print(f"  {kind:36} {own}")
    drawn: dict[str, Any] = {}
    if options.ddim and not options.profile:
        batch = options.batches[0]
        runs = {name: ddim(made[name], batch) for name in ("fp32", "w4a4")}
        drawn = show(interleave(runs, "fp32", options.ddim, 0), "fp32", f"batch {batch}, DDIM-50 end to end")
    last = record(options, isa, found, drawn, tables, made["w4a4_report"].float_layers)
    last |= {"machine": {name: float(f"{value:.3g}") for name, value in peak.items()}, "roofline": bounds}
    print(json.dumps({**last, "peak_megabytes": memory}))
    caches.close()


def record(
    options: argparse.Namespace,
    isa: dict[str, str],
    found: dict[int, dict[str, Any]],
    drawn: dict[str, Any],
    tables: dict[str, Any],
    float_layers: list[Any],
) -> dict[str, Any]:
    """The last line; what was not measured is None."""

    def over(batch: int, name: str, key: str = "ratio") -> Any:
        """FP32 eager in its better layout, or the peer `name`, over W4A4."""
        own = found.get(batch, {})
        if "w4a4" not in own:
            return None
        best = max(1.0, own.get("fp32_nchw", {"ratio": 1.0})["ratio"])
        if name == "fp32":
            value = own["w4a4"][key]
            return [round(v / best, 3) for v in value] if isinstance(value, list) else round(value / best, 3)
        return round(own["w4a4"]["ratio"] / own[name]["ratio"], 3) if name in own else None

    return {
        "benchmark": "integer",
        "model": "unet_cifar10",
        "taq": options.taq,
        "scope": options.scope,
        "rules": rules(options),
        "threads": options.threads,
        "torch": torch.__version__,
        "processor": hardware()["processor"],
        **isa,
        "speedup": over(16, "fp32"),
        "speedup_interval": over(16, "fp32", "interval"),
        "speedup_batch1": over(1, "fp32"),
        "speedup_ddim50": drawn.get("w4a4", {}).get("ratio"),
        "speedup_ddim50_interval": drawn.get("w4a4", {}).get("interval"),
        "speedup_w8a8": round(over(16, "fp32") / over(16, "w8a8"), 3) if over(16, "w8a8") else None,
        "speedup_compile": over(16, "fp32_compile"),
        "speedup_bf16": over(16, "bf16"),
        "speedup_simulated": over(16, "simulated"),
        "speedup_openvino_fp32": over(16, "openvino_fp32"),
        "speedup_openvino_bf16": over(16, "openvino_bf16"),
        "speedup_nncf": over(16, "nncf_w8a8"),
        "speedup_nncf_bf16": over(16, "nncf_w8a8_bf16"),
        "speedup_onnxruntime": over(16, "w4a4_onnxruntime"),
        "speedup_exported": over(16, "w4a4_openvino"),
        "float_layers": len(float_layers),
        "ms_by_kind": tables,
    }


if __name__ == "__main__":
    main()
