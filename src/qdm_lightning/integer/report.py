"""What `to_integer` did, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qdm_lightning.quantization.summary import bits_text, text_table


class Unsupported(ValueError):
    """Why a layer can't run on integer codes."""


class Inexact(Unsupported):
    """This processor can't form the layer's sums exactly: it stays float without being asked."""


@dataclass(frozen=True)
class IntegerRow:
    """One layer, or one attention's two products. `kernel` is what multiplies; `reason` says why it is float, else empty."""

    name: str
    kind: str
    weight_bits: int | None
    act_bits: int
    kernel: str
    reason: str = ""


@dataclass(frozen=True)
class IntegerReport:
    """Every layer that multiplies, in order of registration."""

    rows: Sequence[IntegerRow]

    @property
    def float_layers(self) -> list[tuple[str, str]]:
        """Name and reason of each layer that computes in float."""
        return [(row.name, row.reason) for row in self.rows if row.reason]

    def summary(self) -> str:
        """One line: how many layers run on integer codes."""
        return f"{len(self.rows) - len(self.float_layers)} of {len(self.rows)} layers and attentions multiply integer codes"

    def table(self) -> str:
        """A plain-text table of all rows, with the summary below."""
        head = ("module", "kind", "weight", "input", "kernel", "why float")
        body = [(r.name, r.kind, bits_text(r.weight_bits), bits_text(r.act_bits), r.kernel, r.reason or "-") for r in self.rows]
        return "\n".join([text_table([head, *body], left=len(head)), "", self.summary()])
