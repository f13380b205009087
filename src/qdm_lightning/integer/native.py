"""The C++ of this package (folder cpp), compiled once by inductor's compiler; where there is none, tensor operations run.

`quantization.compiled.set_mode` chooses: `auto` compiles where that works, `on` insists, `off` computes by tensor operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdm_lightning.base.checks import one_line
from qdm_lightning.quantization import compiled

if TYPE_CHECKING:
    from qdm_lightning.integer.grids import Grid, Target

_FILES = ("common", "encode", "winograd", "attention")
_FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno", "-Wno-maybe-uninitialized")


def _structure(name: str, *fields: tuple[Any, str]) -> type[ctypes.Structure]:
    """A C structure; `fields` are types and the names, separated by spaces, that have them."""
    flat = [(own, kind) for kind, names in fields for own in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": flat})


_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_Target = _structure(
    "_Target",
    (_POINTER, "out scale zero_point channels"),
    (_INTEGER, "per_sample qmax norm silu repeat left right above below"),
)
_Activation = _structure(
    "_Activation",
    (_POINTER * 2, "part"),
    (_INTEGER * 2, "channels"),
    (_POINTER, "shift"),
    (_INTEGER, "batch height width"),
    (_POINTER, "gamma beta"),
    (_INTEGER, "groups"),
    (ctypes.c_double, "eps"),
)
_Grid = _structure("_Grid", (_POINTER, "scale zero_point"), (_INTEGER, "per_sample qmax"))
_Attention = _structure(
    "_Attention",
    (_POINTER, "q k v out"),
    (_INTEGER, "batch heads queries keys width"),
    (_Grid, "query key value probabilities"),
)
_Winograd = _structure(
    "_Winograd",
    (_POINTER, "codes weight first scale bias residual out"),
    (_INTEGER, "batch height width channels outputs qmax"),
)


@cache
def _load() -> tuple[Any, str]:
    """The library, or None and why."""
    try:
        from torch._inductor.codecache import CppCodeCache

        source = "".join((Path(__file__).with_name("cpp") / f"{name}.cpp").read_text("utf-8") for name in _FILES)
        return CppCodeCache.load(source, device_type="cpu", extra_flags=_FLAGS), ""
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # no compiler, or a broken one; kept in the record
        return None, f"compiling failed: {one_line(error)}"


def library() -> Any:
    """The compiled library, None where tensor operations are to run.

    Raises:
        RuntimeError: mode `on`, and compiling failed.
    """
    if compiled.mode() == "off":
        return None
    found, reason = _load()
    if found is None and compiled.mode() == "on":
        raise RuntimeError(f"trainer.compile=on, but {reason}; type trainer.compile=off")
    return found


def has_vnni() -> bool:
    """True where the library multiplies codes itself: attention, and the convolution of narrow codes."""
    found = library()
    return found is not None and bool(found.has_vnni())


def provenance() -> dict[str, str]:
    """How codes are made: {"codes": "compiled" | "eager", "reason": ...}."""
    if compiled.mode() == "off":
        return {"codes": "eager", "reason": "asked for"}
    found, reason = _load()
    return {"codes": "eager" if found is None else "compiled", "reason": reason}


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _channels_last(x: Tensor) -> Tensor:
    return x.float().contiguous(memory_format=torch.channels_last)


def encode(
    parts: Sequence[Tensor], targets: Sequence[Target], norm: nn.GroupNorm | None, shift: Tensor | None
) -> list[Tensor] | None:
    """As `encoding.encode`; None where the library is not at hand."""
    lib = library()
    if lib is None or not 1 <= len(parts) <= 2:
        return None
    parts = [_channels_last(part) for part in parts]
    batch, _, height, width = parts[0].shape
    channels = sum(part.shape[1] for part in parts)
    shift = None if shift is None else shift.float().contiguous()
    normed = norm if any(target.norm for target in targets) else None
    activation = _Activation(
        part=(_POINTER * 2)(*(_pointer(part) for part in parts)),
        channels=(_INTEGER * 2)(*(part.shape[1] for part in parts)),
        shift=_pointer(shift),
        batch=batch,
        height=height,
        width=width,
        gamma=None if normed is None else _pointer(normed.weight),
        beta=None if normed is None else _pointer(normed.bias),
        groups=0 if normed is None else normed.num_groups,
        eps=0.0 if normed is None else normed.eps,
    )
    wanted, found, kept = (_Target * len(targets))(), [], []
    for own, target in zip(wanted, targets, strict=True):
        left, right, above, below = target.padding
        size = (batch, channels, height * target.repeat + above + below, width * target.repeat + left + right)
        codes = torch.empty(size, dtype=torch.uint8, memory_format=torch.channels_last)
        scale, zero_point = target.grid.scale.contiguous(), target.grid.zero_point.contiguous()
        own.out, own.scale, own.zero_point = codes.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
        own.per_sample, own.qmax, own.norm, own.silu = target.grid.per_sample, target.grid.qmax, target.norm, target.silu
        factors = None if target.channels is None else target.channels.float().contiguous()
        own.repeat, own.channels = target.repeat, _pointer(factors)
        own.left, own.right, own.above, own.below = target.padding
        found.append(codes)
        kept += [scale, zero_point, *([] if factors is None else [factors])]
    if not lib.encode(ctypes.byref(activation), wanted, _INTEGER(len(targets))):
        raise ValueError("an activation is not a number (NaN): it has no code")
    return found


def _grid(grid: Grid, kept: list[Tensor]) -> Any:
    scale, zero_point = grid.scale.contiguous(), grid.zero_point.contiguous()
    kept += [scale, zero_point]
    return _Grid(scale.data_ptr(), zero_point.data_ptr(), grid.per_sample, grid.qmax)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, grids: Sequence[Grid]) -> Tensor:
    """softmax(q_hat k_hat^T / sqrt(d))_hat v_hat, (B, N, heads d), of float q (B, N, heads d), k, v (B, M, heads d).

    `grids` are those of q, k, v and of the probabilities, whose zero points are 0; all zero points lie within +-32767.
    """
    q, k, v = (x.float().contiguous() for x in (q, k, v))
    kept: list[Tensor] = []
    out = torch.empty_like(q)
    own = [_grid(grid, kept) for grid in grids]
    sizes = (q.shape[0], heads, q.shape[1], k.shape[1], q.shape[2] // heads)
    library().attention(ctypes.byref(_Attention(*(x.data_ptr() for x in (q, k, v, out)), *sizes, *own)))
    return out


class WinogradConv:
    """A 3x3 convolution of codes up to `qmax` by F(2x2, 3x3) on integers, exactly: 16 products for 36.

    With B, G, A of Lavin and Gray (arXiv 1509.09308), 4 y = A^T [(2G) w (2G)^T * B^T q B] A. Of codes up to 6 bits,
    B^T q B spans 4 qmax < 256 values; of weight codes of 4 bits, (2G) w (2G)^T lies within +-72.
    """

    def __init__(self, weight: Tensor, qmax: int) -> None:
        transformed = _transformed(weight)
        outputs, channels = weight.shape[:2]
        self.qmax, self.outputs, self.padded = qmax, outputs, -(-outputs // 16) * 16
        padded = nn.functional.pad(transformed, (0, 0, 0, self.padded - outputs))  # (16, outputs, C)
        blocks = [b.unflatten(2, (channels // 4, 4)).transpose(1, 2).flatten() for b in padded.split(64, dim=1)]
        self.weight = torch.cat(blocks).to(torch.int8)
        offset = torch.full((16, 1), 2 * qmax)
        offset[5] = 0  # the one product of two sums
        self.first = (-offset * padded.sum(2)).to(torch.int32).contiguous()

    def __call__(self, codes: Tensor, scales: Tensor, bias: Tensor, scale: float, residual: Tensor | None = None) -> Tensor:
        """As `kernels.PackedConv`; `residual` is left as it is."""
        batch, channels, height, width = codes.shape
        size = (batch, self.outputs, height - 2, width - 2)
        out = torch.empty(size, memory_format=torch.channels_last)
        spare = self.padded - self.outputs
        scales = nn.functional.pad(scales * (scale / 4), (0, spare))
        bias = nn.functional.pad(bias, (0, spare)) if spare else bias
        residual = None if residual is None else _channels_last(residual)
        pointers = (codes, self.weight, self.first, scales, bias, residual, out)
        sizes = (batch, height - 2, width - 2, channels, self.outputs, self.qmax)
        library().winograd(ctypes.byref(_Winograd(*(_pointer(tensor) for tensor in pointers), *sizes)))
        return out

    @staticmethod
    def suits(weight: Tensor, qmax: int) -> bool:
        """True where all 8-bit values fit."""
        if weight.shape[2:] != (3, 3) or weight.shape[1] % 4 or 4 * qmax > 255:
            return False
        low, high = _transformed(weight).aminmax()
        return bool(low >= -128 and high <= 127)


def _transformed(weight: Tensor) -> Tensor:
    """(2G) w (2G)^T, (16, O, C) float32 integers."""
    g = torch.tensor([[2.0, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])
    return torch.einsum("ia,ocab,jb->ijoc", g, weight.float(), g).flatten(0, 1)
