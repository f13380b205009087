"""Cost of a quantized training step (forward, backward, Adam; no teacher) over the full-precision one, beside the peers' cost.

    python benchmarks/train_step.py [--rounds 15] [--threads 2]

All variants quantize the same layers of one U-Net at W4A4: ours as trained (TaQ `scale` on every quantized activation, and
the optimizer that its groups need), LSQ+ in plain operations, torch's learnable fake-quantize operator, brevitas. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from models import DEFAULT, build, quantized
from pairs import interleave, ratio, report
from torch import Tensor, nn

from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization import LSQActivation, LSQWeight, Quantizers, compiled, fake_quantize
from qdm_lightning.quantization.compiled import gradient_factor
from qdm_lightning.runs.provenance import peak_memory as peak_memory_so_far
from qdm_lightning.training.optimizer import build_optimizer
from qdm_lightning.training.spec import OptimizerConfig


class PlainActivation(LSQActivation):
    """LSQ+ written as plain tensor operations under autograd."""

    def quantize(self, x: Tensor) -> Tensor:
        factor = gradient_factor(x.shape, self.qmax)
        scale = self.scale * factor + (self.scale * (1 - factor)).detach()
        zero_point = self.zero_point + (self.zero_point.round() - self.zero_point).detach()
        shifted = x / scale + zero_point
        clipped = torch.clamp(shifted, self.qmin, self.qmax)
        return (clipped + (clipped.round() - clipped).detach() - zero_point) * scale


class PlainWeight(LSQWeight):
    """LSQ written as plain tensor operations under autograd."""

    def forward(self, weight: Tensor) -> Tensor:
        factor = gradient_factor(weight.shape, self.qmax)
        scale = self.scale * factor + (self.scale * (1 - factor)).detach()
        clipped = torch.clamp(weight / scale.view(-1, *[1] * (weight.ndim - 1)), self.qmin, self.qmax)
        return (clipped + (clipped.round() - clipped).detach()) * scale.view(-1, *[1] * (weight.ndim - 1))


class TorchActivation(LSQActivation):
    """torch's learnable operator, per tensor."""

    def quantize(self, x: Tensor) -> Tensor:
        factor = gradient_factor(x.shape, self.qmax)
        return torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, self.zero_point, self.qmin, self.qmax, factor)


class TorchWeight(LSQWeight):
    """torch's learnable operator, per channel."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch._fake_quantize_learnable_per_channel_affine(
            weight, self.scale, self.zero_point, 0, self.qmin, self.qmax, gradient_factor(weight.shape, self.qmax)
        )


def with_brevitas(model: nn.Module) -> nn.Module:
    """A copy whose convolutions and linear layers are brevitas', 4 bits, learned scales (first and last ones 8, as ours)."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    copied = copy.deepcopy(model)
    for name, layer in list(copied.named_modules()):
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        first_last = name in ("conv_in", "conv_out") or "time_emb" in name
        bits = 8 if first_last else 4
        options: dict[str, Any] = {
            "bias": layer.bias is not None,
            "weight_quant": Int8WeightPerChannelFloat,
            "weight_bit_width": bits,
            "weight_scaling_impl_type": "parameter_from_stats",
            "input_quant": Uint8ActPerTensorFloat,
            "input_bit_width": bits,
            "input_collect_stats_steps": 1,
        }
        if isinstance(layer, nn.Conv2d):
            new = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, **options
            )
        else:
            new = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        parent, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(parent), leaf, new)
    return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fp32": copy.deepcopy,
    "qdm": lambda model: quantized(model, DEFAULT),
    "lsq_eager": lambda model: quantized(
        model, Quantizers(weight=PlainWeight, activation=PlainActivation, attention=PlainActivation)
    ),
    "torch_learnable": lambda model: quantized(
        model, Quantizers(weight=TorchWeight, activation=TorchActivation, attention=TorchActivation)
    ),
    "brevitas": with_brevitas,
}


def step(model: nn.Module, batch: int, channels_last: bool = True) -> Callable[[], None]:
    """A closure that makes one training step on a fixed batch."""
    config = model.config
    network = Denoiser(model).train()
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    t, eps = torch.randint(0, 1000, (batch,)), torch.randn_like(x)
    optimizer = build_optimizer(network, OptimizerConfig(lr=1e-5, quantizer_lr=1e-5))

    def run() -> None:
        optimizer.zero_grad()
        (network(x, t) - eps).square().mean().backward()
        optimizer.step()

    return run


def peak_memory(variant: str, model: str, batch: int, threads: int) -> int:
    """Bytes by which three steps raise the peak of a fresh process's resident memory over that before the network."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        variant,
        "--model",
        model,
        "--batch",
        str(batch),
        "--threads",
        str(threads),
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.splitlines()[-1])


def memory_of(variant: str, model: str, batch: int) -> None:
    """The child of `peak_memory`."""
    compiled.set_mode("auto")
    # Compilers leave the scene before the count begins.
    fake_quantize(torch.ones(8), torch.ones(1), torch.zeros(1), 0, 15)
    before = peak_memory_so_far()["resident"]
    run = step(VARIANTS[variant](build(model)), batch)
    for _ in range(3):
        run()
    print(peak_memory_so_far()["resident"] - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=3, help="in which peak memory is measured, of each variant")
    parser.add_argument("--model", default="unet_cifar10")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        memory_of(options.memory_of, options.model, options.batch)
        return
    compiled.set_mode("on")
    memory = {
        name: sorted(peak_memory(name, options.model, options.batch, options.threads) for _ in range(options.processes))
        for name in ("fp32", "qdm")
    }
    print(json.dumps({"peak_memory_bytes": memory}), flush=True)
    small = build("unet_small")
    small_steps = {n: step(VARIANTS[n](small), 64) for n in ("fp32", "qdm")}
    small_ratio = ratio(interleave(small_steps, "fp32", options.rounds, options.warmup)["qdm"])
    model = build(options.model)
    contiguous = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    layouts = {
        "channels_last": step(build(options.model), options.batch),
        "contiguous": step(contiguous, options.batch, channels_last=False),
    }
    contiguous_ratio = ratio(interleave(layouts, "channels_last", 7, 2)["contiguous"])["ratio"]
    best = "contiguous" if contiguous_ratio < 1 else "channels_last"
    base = build(options.model)
    runs = {name: step(VARIANTS[name](base), options.batch) for name in options.only if name != "fp32"}
    runs = {"fp32": layouts[best], **runs}
    pairs = interleave(runs, "fp32", options.rounds, options.warmup)
    record = {
        "benchmark": "train_step",
        "model": options.model,
        "batch": options.batch,
        "threads": options.threads,
        "torch": torch.__version__,
        "fp32_layout": best,
        "fp32_contiguous_over_channels_last": contiguous_ratio,
        "kernels": compiled.provenance(),
        "small_over_fp32": small_ratio["ratio"],
        "small_over_fp32_interval": small_ratio["interval"],
        "peak_memory_over_fp32": round(statistics.median(memory["qdm"]) / statistics.median(memory["fp32"]), 3),
    }
    report(pairs, "fp32", record)


if __name__ == "__main__":
    main()
