"""Cost of a sampling step of the simulated student (quantized weights cached) over the full-precision network's.

    python benchmarks/sampling.py [--rounds 15] [--threads 2]

The last line is one JSON object; `simulated_over_fp32` is the figure.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import torch
from models import DEFAULT, build, quantized
from pairs import interleave, report

from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization import LSQActivation, Quantizers, cached_weights, compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="unet_cifar10")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compiled.set_mode("on")
    base = build(options.model)
    networks = {
        "fp32": Denoiser(base),
        "simulated": Denoiser(quantized(base, DEFAULT)),
        "simulated_taq_off": Denoiser(quantized(base, Quantizers(attention=LSQActivation))),
    }
    size = base.config.sample_size
    x = torch.randn(options.batch, base.config.in_channels, size, size).contiguous(memory_format=torch.channels_last)
    t = torch.full((options.batch,), 500)
    with torch.no_grad(), ExitStack() as caches:
        for network in networks.values():
            caches.enter_context(cached_weights(network.eval()))
        runs = {name: lambda network=network: network(x, t) for name, network in networks.items()}
        pairs = interleave(runs, "fp32", options.rounds, options.warmup)
    record = {
        "benchmark": "sampling",
        "model": options.model,
        "batch": options.batch,
        "threads": options.threads,
        "torch": torch.__version__,
        "kernels": compiled.provenance(),
    }
    report(pairs, "fp32", record)


if __name__ == "__main__":
    main()
