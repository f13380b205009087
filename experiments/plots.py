"""The two plots of README.md, from the files beside it: what TaQ and NeM change, and where TaQ helps without training.

    python experiments/plots.py

Writes taq_nem.png from results.csv of `ablation_digits_scale/` and `ablation_cifar10_16/` (a point for each seed, a bar for the
mean) and taq_where.png from `taq_where/` (L_NeM against no TaQ with the same bits, paired by seed, with 95 % intervals).
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy import stats

HERE = Path(__file__).parent
ABLATIONS = [
    ("ablation_digits_scale", "w4a4", "fd_digits", "digits, W4A4"),
    ("ablation_digits_scale/w3a3_w2a2", "w3a3", "fd_digits", "digits, W3A3"),
    ("ablation_digits_scale/w3a3_w2a2", "w2a2", "fd_digits", "digits, W2A2"),
    ("ablation_cifar10_16", "w4a4", "fd_resnet20", "CIFAR-10 16x16, W4A4"),
]
CELLS = ["none", "TaQ", "NeM", "TaQ+NeM"]
METHODS = [("scale", "qkv"), ("scale", "attention"), ("scale", "all"), ("normalize", "qkv")]


def rows(name: str) -> list[dict[str, str]]:
    """Of a CSV file, by its columns."""
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def teacher(folder: str, distance: str) -> float:
    """The teacher's distance, a mean over seeds, from `results.md`."""
    found = re.search(rf"\| teacher, {distance} \| \d+ \| ([\d.]+) ", (HERE / folder / "results.md").read_text())
    assert found is not None
    return float(found[1])


def taq_nem() -> None:
    """Trained students: each measure by cell, with its seeds; the teacher's distance as a dashed line."""
    figure, axes = plt.subplots(len(ABLATIONS), 3, figsize=(9, 2.6 * len(ABLATIONS)), layout="constrained")
    for row, (folder, bits, distance, title) in zip(axes, ABLATIONS, strict=True):
        found = {(entry["cell"], entry["measure"]): entry for entry in rows(f"{folder}/results.csv")}
        for axis, measure in zip(row, ("nem_error", "image_mse", distance), strict=True):
            for place, cell in enumerate(CELLS):
                entry = found[f"{bits} {cell}", measure]
                seeds = [float(value) for name, value in entry.items() if name.startswith("seed_") and value]
                mean = float(entry["mean"])
                axis.bar(place, mean, color="#c6dbef", width=0.7)
                axis.plot([place] * len(seeds), seeds, "o", color="#08519c", markersize=4)
            if measure == distance:
                axis.axhline(teacher(folder, distance), color="black", linestyle="--", linewidth=0.8)
            axis.set_xticks(range(len(CELLS)), CELLS)
            axis.set_title(f"{title}: {'L_NeM' if measure == 'nem_error' else measure}", fontsize=9)
            axis.set_ylim(bottom=0)
    figure.suptitle("TaQ scale on every activation, and NeM, trained (a point is a seed; dashed: the teacher)")
    figure.savefig(HERE / "taq_nem.png", dpi=130)


def changes(data: str, probs_bits: str, taq: str, scope: str) -> list[float]:
    """L_NeM against no TaQ, percent, by seed; without scales by channel."""
    keyed = {
        (row["seed"], row["taq"], row["scope"]): float(row["nem"])
        for row in rows("taq_where/results.csv")
        if (row["data"], row["probs_bits"], row["channel_scales"]) == (data, probs_bits, "off")
    }
    seeds = sorted({seed for seed, *_ in keyed if {(seed, taq, scope), (seed, "off", "qkv")} <= {*keyed}})
    return [100 * (keyed[seed, taq, scope] / keyed[seed, "off", "qkv"] - 1) for seed in seeds]


def taq_where() -> None:
    """Calibration alone at W4A4: the change of L_NeM by where TaQ acts."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
    for axis, data in zip(axes, ("digits", "cifar10_16"), strict=True):
        for place, method in enumerate(METHODS):
            values = changes(data, "8", *method)
            mean, count = sum(values) / len(values), len(values)
            half = math.nan if count < 3 else stats.sem(values) * stats.t.ppf(0.975, count - 1)
            axis.bar(place, mean, color="#c6dbef", width=0.7, yerr=None if math.isnan(half) else half, capsize=4)
            axis.plot([place] * count, values, "o", color="#08519c", markersize=4)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(METHODS)), [f"{taq}\n{scope}" for taq, scope in METHODS])
        axis.set_title(data)
    axes[0].set_ylabel("change of L_NeM, %")
    figure.suptitle("W4A4 without training: TaQ by where it acts, against none (a point is a seed)")
    figure.savefig(HERE / "taq_where.png", dpi=130)


if __name__ == "__main__":
    taq_nem()
    taq_where()
