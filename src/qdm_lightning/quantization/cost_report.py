"""What a network costs, layer by layer, and the conventions by which its theoretical speed-up is counted.

Theory by convention, not a measurement: elementwise operations, norms and memory traffic are not counted. Every convention
relates the multiply-accumulates (MACs) to those of the same network in 32-bit floating point, see `RELATIVE_COST`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from qdm_lightning.quantization.summary import FLOAT, bits_text, text_table


def linear(a: int, b: int) -> float:
    """Cost of a MAC grows with the wider of its operands: max(a, b) / 32. Our reading of Q-DM's "theoretical 7.8x".

    >>> linear(4, 4), linear(8, 4), linear(4, 32)
    (0.125, 0.25, 1.0)
    """
    return max(a, b) / FLOAT


def bops(a: int, b: int) -> float:
    """Bit operations: a b of them make a MAC, 32 * 32 in full precision.

    >>> bops(4, 4), bops(8, 8), bops(32, 32)
    (0.015625, 0.0625, 1.0)
    """
    return a * b / FLOAT**2


def bops64(a: int, b: int) -> float:
    """OPs = BOPs / 64 + FLOPs, as binary networks and BinaryDM (arXiv 2404.05662) count.

    A MAC of two quantized operands is a b / 64 (an 8-bit one therefore 1), any other is one FLOP.

    >>> bops64(4, 4), bops64(8, 8), bops64(4, 32)
    (0.25, 1.0, 1.0)
    """
    return 1.0 if max(a, b) == FLOAT else a * b / 64


RELATIVE_COST: dict[str, Callable[[int, int], float]] = {"linear": linear, "bops": bops, "bops64": bops64}
"""Convention to the cost of a MAC whose operands have a and b bits; one of two floats costs 1.

For the CIFAR-10 U-Net at W4A4: `linear` is 7.78 with 8-bit ends and attention products and 7.99 with 4-bit attention products;
`bops64` is 3.99 where the first and last convolution are float and all else, time embedding and attention too, has 4 bits.
"""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Cost of one module; attention has a row for q k^T (`.qkv`) and one for probs v (`.probs`).

    Args:
        macs: multiply-accumulates of the forward pass.
        parameters: its own (a tensor that several modules share counts once); scales are not among them.
        weight_bits: None where nothing is multiplied with a weight. act_bits: of the input; 32 is float.
        operands: bits of the two operands of its products.
        bytes: as stored: codes of b bits packed tensor by tensor, everything else (scales, biases, norms) in float32.
        float_bytes: as stored without quantization, all in float32.
    """

    name: str
    kind: str
    macs: int
    parameters: int
    weight_bits: int | None
    act_bits: int
    operands: tuple[int, int]
    bytes: int
    float_bytes: int

    def work(self, convention: str) -> float:
        """The MACs in full-precision MACs, by a convention in `RELATIVE_COST`."""
        return self.macs * RELATIVE_COST[convention](*self.operands)

    def speedup(self) -> dict[str, float] | None:
        """By convention; None where nothing is multiplied."""
        return {name: self.macs / self.work(name) for name in RELATIVE_COST} if self.macs else None


@dataclass(frozen=True)
class CostReport:
    """The cost of a network, layer by layer in order of registration."""

    layers: list[LayerCost]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass."""
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Parameters of the network, scales not included."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Size as stored, scales included."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """Size as stored without quantization, in float32."""
        return sum(layer.float_bytes for layer in self.layers)

    def speedup(self) -> dict[str, float]:
        """Theoretical speed-up over full precision by convention; 1 where nothing is multiplied."""
        works = {name: sum(layer.work(name) for layer in self.layers) for name in RELATIVE_COST}
        return {name: self.macs / work if work else 1.0 for name, work in works.items()}

    def totals(self) -> dict[str, Any]:
        """`macs`, `parameters`, `bytes`, `float_bytes` and `speedup` {convention: factor}."""
        return {name: getattr(self, name) for name in ("macs", "parameters", "bytes", "float_bytes")} | {
            "speedup": self.speedup()
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the totals, `macs_by_kind`, and `layers`, each with its fields and its `speedup`."""
        kinds = dict.fromkeys(layer.kind for layer in self.layers)
        by_kind = {kind: sum(layer.macs for layer in self.layers if layer.kind == kind) for kind in kinds}
        return self.totals() | {
            "macs_by_kind": {kind: macs for kind, macs in by_kind.items() if macs},
            "layers": [asdict(x) | {"operands": list(x.operands), "speedup": x.speedup()} for x in self.layers],
        }

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]]:
        """The table as text: its head, a line each layer, and the totals."""
        head = ("module", "kind", "MACs", "parameters", "weight", "input", "bytes", *RELATIVE_COST)
        body = [
            (
                *(x.name, x.kind, f"{x.macs:,}", f"{x.parameters:,}", bits_text(x.weight_bits), bits_text(x.act_bits)),
                *(f"{x.bytes:,}", *_factors(x.speedup())),
            )
            for x in self.layers
        ]
        total = ("total", "", f"{self.macs:,}", f"{self.parameters:,}", "", "", f"{self.bytes:,}", *_factors(self.speedup()))
        return head, body, total

    def table(self) -> str:
        """A plain-text table of all layers and the totals."""
        head, body, total = self.cells()
        return text_table([head, *body, total], left=2)


def _factors(speedup: dict[str, float] | None) -> list[str]:
    return ["-"] * len(RELATIVE_COST) if speedup is None else [f"{factor:.2f}" for factor in speedup.values()]
