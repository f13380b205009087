"""What `prepare` did, as data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

FLOAT = 32
"""The bit-width that means: not quantized."""


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

    def summary(self) -> str:
        """One line: how many parameters have how many bits."""
        by_bits: Counter[int] = Counter()
        for row in self.rows:
            by_bits[row.weight_bits if row.quantizers else FLOAT] += row.parameters
        parts = [
            f"{count:,} at {'float' if bits == FLOAT else f'{bits} bits'}" for bits, count in sorted(by_bits.items()) if count
        ]
        return f"{sum(by_bits.values()):,} parameters: {', '.join(parts)}"

    def table(self) -> str:
        """A plain-text table of all rows, with the summary below."""
        head = ("module", "kind", "parameters", "weight", "input", "quantizers")
        body = [
            (
                r.name,
                r.kind,
                f"{r.parameters:,}",
                bits_text(r.weight_bits),
                bits_text(r.act_bits),
                " ".join(r.quantizers) or "-",
            )
            for r in self.rows
        ]
        table = text_table([head, *body], left=len(head))
        return "\n".join([table, "", self.summary(), "normalization, SiLU and residual additions: float"])


def bits_text(bits: int | None) -> str:
    """A bit-width as a table shows it; None where there is none."""
    return "-" if bits is None else "float" if bits == FLOAT else str(bits)


def text_table(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells as columns of plain text, the first `left` columns aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
