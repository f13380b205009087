"""`python -m qdm_lightning.cost`: what a student costs, layer by layer, before it is trained.

`cost(cfg)` is the same from Python; `quantization.cost.cost(model, ...)` counts any module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdm_lightning.cli.cost import Cost, cost

if TYPE_CHECKING:
    from qdm_lightning.quantization.cost_report import CostReport

__all__ = ["EXAMPLES", "cost", "main"]

EXAMPLES = (
    ("model=unet_cifar10 quant=w4a4", "the paper's network: 6.222 GMACs an image and step"),
    ("model=unet_cifar10 quant.qkv_bits=8 quant.probs_bits=8", "7.78x: our reconstruction of the paper's 7.8x"),
    ("model=pretrained model.path=DIR quant=w3a3 json=cost.json", "a diffusers folder; the figures as plain data too"),
    ("-m quant=w8a8,w4a4,w2a2", "one after another"),
)
"""For `--help`: arguments, and what they do."""

CONVENTIONS = {
    "linear": "MACs x b/32, b the wider of a product's two operands",
    "bops": "MACs x b x b' against 32 x 32",
    "bops64": "bit operations / 64 + what stays float",
}
"""For the table: convention, and what it counts."""


def show(report: CostReport) -> None:
    """Print the table, and the totals."""
    from rich import box
    from rich.table import Table

    from qdm_lightning.display.progress import console

    head, body, total = report.cells()
    table = Table(box=box.SIMPLE, show_footer=True)
    for index, (name, footer) in enumerate(zip(head, total, strict=True)):
        table.add_column(name, footer, justify="left" if index < 2 else "right", overflow="fold")
    for line in body:
        table.add_row(*line)
    kinds = ", ".join(f"{kind} {macs / 1e9:.3f}" for kind, macs in report.as_dict()["macs_by_kind"].items())
    smaller = report.float_bytes / report.bytes if report.bytes else 1
    lines = [
        f"an image and step: {report.macs / 1e9:.3f} GMACs ({kinds}), {report.parameters:,} parameters",
        f"stored: {report.bytes / 1e6:.2f} MB, in float32 {report.float_bytes / 1e6:.2f} MB, {smaller:.2f} times as much",
        "theoretical speed-up over float32, by convention:",
        *(f"  {name:6} {factor:6.2f}x  {CONVENTIONS[name]}" for name, factor in report.speedup().items()),
    ]
    screen = console()
    screen.print(table)
    screen.print("\n".join(lines), markup=False, highlight=False)


main = Cost(EXAMPLES, show).main

if __name__ == "__main__":
    main()
