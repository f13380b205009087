"""What this machine can do at most, measured: multiply-accumulates and bytes a second; and what a step needs of both."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qdm_lightning.integer import kernels, native
from qdm_lightning.integer.layers import IntegerConv2d, IntegerLinear

Needs = dict[str, dict[str, float]]
"""By kind of operation: `macs`, and the `bytes` that it reads and writes at least."""


def best(run: Callable[[], object], rounds: int = 7) -> float:
    """The fewest seconds of a call."""
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def machine() -> dict[str, float]:
    """Multiply-accumulates a second of matrices of 2,048 in float32 and int8, and bytes a second of a copy of 256 MiB."""
    size, large = 2048, torch.zeros(2**26)
    a, b, other = torch.randn(size, size), torch.randn(size, size), torch.empty_like(large)
    codes = torch.randint(256, (size, size), dtype=torch.uint8)
    packed = kernels.pack_linear(torch.randint(-127, 128, (size, size), dtype=torch.int8))
    scales = torch.ones(size)
    return {
        "float32_macs": size**3 / best(lambda: a @ b),
        "int8_macs": size**3 / best(lambda: kernels.linear(codes, packed, scales, None, 1.0)),
        "bytes": 2 * large.nbytes / best(lambda: other.copy_(large)),
    }


@contextmanager
def counted(network: nn.Module) -> Iterator[Needs]:
    """What the integer layers, the encoding and the attention of `network` need in the calls within the block."""
    needs: Needs = defaultdict(lambda: {"macs": 0.0, "bytes": 0.0})

    def add(kind: str, macs: float, *tensors: Tensor | None) -> None:
        needs[kind]["macs"] += macs
        needs[kind]["bytes"] += sum(tensor.nbytes for tensor in tensors if tensor is not None)

    originals: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, new: Callable[..., Any]) -> None:
        originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    encode, attention = native.encode, native.attention

    def encoding(parts: Any, *rest: Any) -> Any:
        found = encode(parts, *rest)
        add("to codes (norm, SiLU, padding)", 0, *parts, *(found or []))
        return found

    def attending(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        out = attention(q, k, v, *rest)
        add("attention products, softmax", 2 * q[..., 0].numel() * k.shape[1] * q.shape[2], q, k, v, out)
        return out

    def layer(module: Any) -> None:
        compute = module.compute

        def computing(codes: Tensor, grid: Any, *rest: Any, **options: Any) -> Tensor:
            out: Tensor = compute(codes, grid, *rest, **options)
            residual = next(iter(rest), options.get("residual"))
            winograd = isinstance(module, IntegerConv2d) and module.winograd is not None
            convolution = "convolution, Winograd" if winograd else "convolution, oneDNN int8"
            kind = convolution if isinstance(module, IntegerConv2d) else "linear, oneDNN int8"
            add(kind, out.numel() * module.weight[0].numel(), codes, module.weight, residual, out)
            return out

        replace(module, "compute", computing)

    replace(native, "encode", encoding)
    replace(native, "attention", attending)
    layers = [module for module in network.modules() if isinstance(module, IntegerConv2d | IntegerLinear)]
    for module in layers:
        layer(module)
    try:
        yield needs
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original) if owner is native else delattr(owner, name)


def roofline(needs: Needs, milliseconds: dict[str, float], peak: dict[str, float]) -> dict[str, dict[str, float]]:
    """By kind: GMACs, megabytes, the milliseconds that this machine needs for them at least, and its share of those measured.

    Winograd makes 16 products for 36, so what it needs of MACs is 4/9 of those of the convolution.
    """
    found = {}
    for kind, need in needs.items():
        macs = need["macs"] * (4 / 9 if "Winograd" in kind else 1)
        least = max(macs / peak["int8_macs"], need["bytes"] / peak["bytes"]) * 1e3
        bound = "MACs" if macs / peak["int8_macs"] > need["bytes"] / peak["bytes"] else "bytes"
        found[kind] = {
            "gmacs": round(need["macs"] / 1e9, 2),
            "megabytes": round(need["bytes"] / 1e6, 1),
            "least_ms": round(least, 2),
            "measured_ms": milliseconds[kind],
            "share": round(least / milliseconds[kind], 2),
            "bound": bound,
        }
    return found


def peak_megabytes(run: Callable[[], object], rounds: int = 3) -> float:
    """Megabytes of memory that a call takes at its peak beyond what was resident before it (Linux)."""
    found = []
    for _ in range(rounds):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        found.append(_status("VmHWM") - before)
    return round(median(found) / 1e3, 1)


def _status(key: str) -> float:
    """Kilobytes, out of /proc/self/status."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1]) * 1.024
