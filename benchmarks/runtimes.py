"""One denoising step of the exported student in OpenVINO and ONNX Runtime, over PyTorch's FP32, beside what those runtimes do
by themselves: FP32, bf16, and NNCF's post-training W8A8.

    python benchmarks/runtimes.py [--rounds 9] [--batch 16 1] [--folder FOLDER]

The last line is one JSON object, with `speedup` (PyTorch FP32 over the W4A4 file in OpenVINO, first batch size) among it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch
from models import build
from pairs import interleave, ratio
from torch import nn

from qdm_lightning.exporting.operators import Translator
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization import (
    MinMax,
    NormalizedActivation,
    QuantConfig,
    Quantizers,
    calibrate,
    compiled,
    prepare,
)
from qdm_lightning.runtimes.network import RuntimeNetwork

BASE, OURS = "torch_fp32", "w4a4_openvino"


def isa() -> str:
    """The instructions that integer products run on: `amx`, `vnni` or `avx2`."""
    found = flags()
    return "amx" if "amx_int8" in found else "vnni" if {"avx512_vnni", "avx_vnni"} & set(found) else "avx2"


def flags() -> list[str]:
    """What /proc/cpuinfo says of vectors and matrices."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    words = next(line for line in lines if line.startswith("flags")).split()
    return [word for word in words if any(part in word for part in ("avx", "amx", "vnni"))]


def student(base: nn.Module, bits: int) -> nn.Module:
    """A copy of the U-Net with TaQ `normalize` on q, k, v, calibrated on noise at eight timesteps."""
    network = build_like(base)
    prepare(network, QuantConfig(weight_bits=bits, act_bits=bits), Quantizers(attention=NormalizedActivation))
    denoiser, shape = Denoiser(network).eval(), image_shape(base)
    with torch.no_grad():
        calibrate(network, lambda: denoiser(torch.randn(8, *shape), torch.arange(60, 1000, 125)), MinMax())
    return network.eval()


def build_like(base: Any) -> nn.Module:
    copied = type(base).from_config(base.config)
    copied.load_state_dict(base.state_dict())
    return copied.to(memory_format=torch.channels_last)


def image_shape(base: Any) -> tuple[int, int, int]:
    return base.config.in_channels, base.config.sample_size, base.config.sample_size


def write_files(base: nn.Module, folder: Path) -> None:
    """The U-Net as `fp32.onnx`, its students as `w8a8.onnx`, `w4a4.onnx`, and NNCF's as `nncf.xml`; what is there stays."""
    networks = {"fp32": lambda: base, "w8a8": lambda: student(base, 8), "w4a4": lambda: student(base, 4)}
    for name, make in networks.items():
        if not (folder / f"{name}.onnx").is_file():
            model = Translator(Denoiser(make()), image_shape(base)).translate({})
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    if not (folder / "nncf.xml").is_file():
        if find_spec("nncf") is None:
            print("NNCF is left out: pip install 'qdm-lightning[nncf]' brings it")
            return
        import nncf

        read = openvino.Core().read_model(folder / "fp32.onnx")
        shape = image_shape(base)
        inputs = [
            {"sample": np.random.default_rng(t).standard_normal((1, *shape), np.float32), "timestep": np.array([t])}
            for t in range(60, 1000, 125)
        ]
        # Its correction of biases fails on this network (a shape), and costs no time.
        without = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
        model = nncf.quantize(read, nncf.Dataset(inputs), subset_size=len(inputs), advanced_parameters=without)
        openvino.save_model(model, folder / "nncf.xml")


def networks(base: nn.Module, folder: Path, threads: int, batch: int) -> dict[str, Any]:
    """By name, what is measured: each a call of x and t of this batch size, which OpenVINO is told."""
    core, channels_first = openvino.Core(), build_like(base).to(memory_format=torch.contiguous_format).eval()
    models = {name: onnx.load(folder / f"{name}.onnx") for name in ("fp32", "w8a8", "w4a4")}
    run = partial(RuntimeNetwork, threads=threads, batch=batch)
    bf16 = {"INFERENCE_PRECISION_HINT": "bf16"}
    nncf = folder / "nncf.xml"
    by_nncf = {"nncf_w8a8": {}, "nncf_w8a8_bf16": bf16} if nncf.is_file() else {}
    return {
        BASE: Denoiser(base).eval(),
        "torch_fp32_channels_first": Denoiser(channels_first),
        "openvino_fp32": run(models["fp32"], "openvino"),
        "openvino_bf16": run(models["fp32"], "openvino", settings=bf16),
        **{name: run(core.read_model(nncf), "openvino", settings=settings) for name, settings in by_nncf.items()},
        "onnxruntime_fp32": run(models["fp32"], "onnxruntime"),
        "w8a8_openvino": run(models["w8a8"], "openvino"),
        "w4a4_openvino": run(models["w4a4"], "openvino"),
        "w4a4_openvino_bf16": run(models["w4a4"], "openvino", settings=bf16),
        "w4a4_onnxruntime": run(models["w4a4"], "onnxruntime"),
    }


def measure(networks: dict[str, Any], shape: tuple[int, int, int], batch: int, rounds: int, warmup: int) -> dict[str, Any]:
    """For each network but the base, PyTorch FP32's time over its own, with a 95 % interval, from pairs side by side."""
    x = torch.randn(batch, *shape)
    inputs = {name: x.contiguous(memory_format=torch.channels_last) if name == BASE else x for name in networks}
    t = torch.full((batch,), 500)

    def step(name: str) -> None:
        with torch.no_grad():
            networks[name](inputs[name], t)

    calls: dict[str, Callable[[], None]] = {name: partial(step, name) for name in networks}
    pairs = interleave(calls, BASE, rounds, warmup)
    base = float(np.median([first for own in pairs.values() for first, _ in own]))
    print(f"batch {batch}: {BASE} {base * 1e3:.1f} ms")
    found: dict[str, Any] = {"seconds": round(base, 4)}
    for name, own in pairs.items():
        inverse = ratio([(last, first) for first, last in own])
        seconds = float(np.median([last for _, last in own]))
        network = networks[name]
        kernels = dict(network.kernels()) if isinstance(network, RuntimeNetwork) else {}
        print(f"  {name:26} {seconds * 1e3:8.1f} ms   {inverse['ratio']:.2f}x {inverse['interval']}  {kernels or ''}")
        found[name] = {"speedup": inverse["ratio"], "interval": inverse["interval"], "seconds": round(seconds, 4), **kernels}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="unet_cifar10")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--only", nargs="+", help="names of networks beside the base")
    parser.add_argument("--folder", type=Path, help="where the files lie, made if they are not there; default: a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compiled.set_mode("off")
    base = build(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        write_files(base, folder)
        sizes = {name: round((folder / f"{name}.onnx").stat().st_size / 1e6, 2) for name in ("fp32", "w8a8", "w4a4")}
        print(f"processor: {isa()} ({' '.join(flags())}); {options.threads} threads; megabytes of the files: {sizes}")
        by_batch = {}
        for batch in options.batch:
            found = networks(base, folder, options.threads, batch)
            if options.only:
                found = {name: found[name] for name in (BASE, *options.only) if name in found}
            by_batch[str(batch)] = measure(found, image_shape(base), batch, options.rounds, options.warmup)
    ours = by_batch[str(options.batch[0])].get(OURS, {})
    record = {
        "benchmark": "runtimes",
        "isa": isa(),
        "model": options.model,
        "threads": options.threads,
        "torch": torch.__version__,
        "openvino": openvino.__version__,
        "megabytes": sizes,
        "speedup": ours.get("speedup"),
        "speedup_interval": ours.get("interval"),
        "batches": by_batch,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
