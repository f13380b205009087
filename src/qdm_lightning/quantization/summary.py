"""What `prepare` did, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerRow:
    """One module of a prepared model. 32 bits mean float. `parameters` are its own; attention products have none."""

    name: str
    kind: str
    parameters: int
    weight_bits: int
    act_bits: int
    quantizers: list[str] = field(default_factory=list)


@dataclass
class QuantizationReport:
    """Every module that holds parameters or multiplies, in order of registration."""

    rows: list[LayerRow]

    @property
    def quantized(self) -> list[LayerRow]:
        """Rows with a quantizer."""
        return [row for row in self.rows if row.quantizers]

    @property
    def left_float(self) -> list[LayerRow]:
        """Rows without any."""
        return [row for row in self.rows if not row.quantizers]

    def as_dict(self) -> list[dict[str, Any]]:
        """Plain data for a record."""
        return [asdict(row) for row in self.rows]

    def summary(self) -> str:
        """One line: how many parameters have how many bits."""
        by_bits: dict[int, int] = {}
        for row in self.rows:
            bits = row.weight_bits if row.quantizers else 32
            by_bits[bits] = by_bits.get(bits, 0) + row.parameters
        parts = [
            f"{count:,} at {'float' if bits == 32 else f'{bits} bits'}" for bits, count in sorted(by_bits.items()) if count
        ]
        return f"{sum(by_bits.values()):,} parameters: {', '.join(parts)}"

    def table(self) -> str:
        """A plain-text table of all rows, with the summary below."""
        head = ("module", "kind", "parameters", "weight", "input", "quantizers")
        body = [
            (r.name, r.kind, f"{r.parameters:,}", _bits(r.weight_bits), _bits(r.act_bits), " ".join(r.quantizers) or "-")
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [head, *body]
        ]
        return "\n".join([*lines, "", self.summary(), "normalization, SiLU and residual additions: float"])


def _bits(bits: int) -> str:
    return "float" if bits == 32 else str(bits)
