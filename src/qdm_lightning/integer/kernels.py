"""PyTorch's integer kernels (oneDNN): uint8 codes times int8 weight codes, and whether this processor sums them exactly."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qdm_lightning.integer.report import Inexact

SATURATED = 2**15 - 1
"""The greatest sum of two products in 16 bits, which is how processors without VNNI add them."""


@cache
def register() -> None:
    """Make torch's integer operators known; they take part of their definitions from its quantization library."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        raise ValueError("integer execution needs oneDNN, which this build of torch lacks")
    from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401


@cache
def saturates() -> bool:
    """True where a sum of products of 8-bit codes is wrong on this processor: found by such a sum, not by its name."""
    codes, weight = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((32, 64), 127, dtype=torch.int8)
    found = linear(codes, pack_linear(weight, 4), torch.ones(32), None, 1.0)
    return not bool((found == 255 * 127 * 64).all())


@cache
def int8_matmul_is_exact() -> bool:
    """True where `torch._int_mm` sums products of two int8 operands exactly."""
    a, b = torch.full((32, 64), 127, dtype=torch.int8), torch.full((64, 32), 127, dtype=torch.int8)
    pairs = ((a, b), (-a - 1, b), (a, -b - 1), (-a - 1, -b - 1))
    return all(torch.equal(torch._int_mm(x, y), (x.int() @ y.int())) for x, y in pairs)


@cache
def instruction_set() -> str:
    """`amx`, `vnni`, `avx2` or `other`: what multiplies 8-bit codes here."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_vnni_supported():
        return "vnni"
    return "avx2" if torch.cpu._is_avx2_supported() else "other"


def check_fits(qmax: int, weight: Tensor) -> None:
    """Raise Inexact if two products of input codes up to `qmax` with these weight codes would saturate."""
    if saturates() and 2 * qmax * int(weight.int().abs().max()) > SATURATED:
        raise Inexact("pairs of its 8-bit products saturate at 16 bits on this processor, which has no VNNI")


def pack_linear(weight: Tensor, rows: int | None = None) -> Tensor:
    """int8 weight codes (O, I) as the kernel wants them."""
    register()
    return torch.ops.onednn.qlinear_prepack(weight, None if rows is None else [rows, weight.shape[1]])


@cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def linear(codes: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale scales_o sum_i codes_i w_oi + bias_o, (M, O) float32, of codes (M, I) uint8."""
    return torch.ops.onednn.qlinear_pointwise(
        codes, scale, 0, packed, scales, _zeros(scales.numel()), bias, 1.0, 0, torch.float32, "none", [], ""
    )


class PackedConv:
    """int8 weight codes (O, I / groups, H, W) as the convolution wants them. Padding is part of the codes."""

    def __init__(self, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int) -> None:
        register()
        self.how = (list(stride), [0, 0], list(dilation), groups)
        self.packed = torch.ops.onednn.qconv_prepack(weight, torch.ones(weight.shape[0]), 1.0, 0, *self.how, None)

    def __call__(
        self, codes: Tensor, scales: Tensor, bias: Tensor | None, scale: float, residual: Tensor | None = None
    ) -> Tensor:
        """scale scales_o (codes * w)_o + bias_o, and `residual` (which is overwritten) where it is given; float32."""
        arguments = (None, bias, *self.how, 1.0, 0, torch.float32)
        if residual is None:
            return torch.ops.onednn.qconv2d_pointwise(codes, scale, 0, self.packed, scales, *arguments, "none", [], "")
        return torch.ops.onednn.qconv2d_pointwise.binary(
            codes, scale, 0, self.packed, scales, None, residual, *arguments[1:], 1.0, 0, "sum", 1.0, None, [], None
        )


def provenance() -> dict[str, str]:
    """What multiplied and what made the codes, as records keep it."""
    from qdm_lightning.integer import native

    return {"isa": instruction_set(), **native.provenance()}


def check_exact(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise Inexact unless two results of a probe, float32 and float64, are equal to float32 rounding."""
    bound = 2e-6 * max(float(expected.abs().max()), 1.0)
    if not bool(((found.double() - expected).abs() <= bound).all()):
        raise Inexact(f"{what} gave wrong sums of 8-bit products on this processor")
