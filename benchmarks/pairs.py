"""Interleaved timing in pairs: every figure is the ratio of two runs that stand side by side, so that a drift of the machine
meets both alike."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np

Pairs = dict[str, list[tuple[float, float]]]
"""For each variant, seconds of the base and of the variant, pair by pair."""


def interleave(variants: Mapping[str, Callable[[], None]], base: str, rounds: int, warmup: int) -> Pairs:
    """`rounds` pairs of each variant with `base`, after `warmup` more; the order, in a pair too, is drawn for each round."""
    names, generator = [name for name in variants if name != base], random.Random(0)
    pairs: Pairs = {name: [] for name in names}
    for index in range(warmup + rounds):
        for name in generator.sample(names, len(names)):
            seconds: dict[str, float] = {}
            for side in generator.sample([base, name], 2):
                begin = time.perf_counter()
                variants[side]()
                seconds[side] = time.perf_counter() - begin
            if index >= warmup:
                pairs[name].append((seconds[base], seconds[name]))
    return pairs


def ratio(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Median over the pairs of time(variant) / time(base), with a 95 % bootstrap interval of that median."""
    ratios = np.array([own / base for base, own in pairs])
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"ratio": round(float(np.median(ratios)), 3), "interval": [round(float(low), 3), round(float(high), 3)]}


def report(pairs: Pairs, base: str, record: Mapping[str, Any]) -> None:
    """Print a line for each variant, and last one JSON object with the ratios to `base`."""
    result: dict[str, Any] = dict(record)
    print(f"{base:24} {median(first for own in pairs.values() for first, _ in own) * 1e3:9.1f} ms")
    for name, own in pairs.items():
        found = ratio(own)
        print(f"{name:24} {median(last for _, last in own) * 1e3:9.1f} ms   {found['ratio']:.3f} of {base} {found['interval']}")
        result[f"{name}_over_{base}"] = found["ratio"]
        result[f"{name}_over_{base}_interval"] = found["interval"]
        result["pairs"] = len(own)
    print(json.dumps(result))
