"""Interleaved timing: every round runs each variant once, in an order of its own, so that a drift of the machine, and what one
variant leaves in caches and on the heap, meet all alike."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np


def interleave(variants: Mapping[str, Callable[[], None]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each variant in each of `rounds` rounds, after `warmup` more; the order is drawn for each round."""
    names, generator = list(variants), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        for name in generator.sample(names, len(names)):
            begin = time.perf_counter()
            variants[name]()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> dict[str, Any]:
    """Median over the rounds of time(name) / time(base), with a 95 % bootstrap interval of that median."""
    pairs = np.array(seconds[name]) / np.array(seconds[base])
    draws = np.random.default_rng(0).choice(pairs, (2000, len(pairs)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"ratio": round(float(np.median(pairs)), 3), "interval": [round(float(low), 3), round(float(high), 3)]}


def report(seconds: Mapping[str, list[float]], base: str, record: Mapping[str, Any]) -> None:
    """Print a line for each variant, and last one JSON object with the ratios to `base`."""
    result: dict[str, Any] = dict(record)
    for name, times in seconds.items():
        found = ratio(seconds, name, base)
        print(f"{name:24} {median(times) * 1e3:9.1f} ms   {found['ratio']:.3f} of {base} {found['interval']}")
        if name != base:
            result[f"{name}_over_{base}"] = found["ratio"]
            result[f"{name}_over_{base}_interval"] = found["interval"]
    result["rounds"] = len(seconds[base])
    print(json.dumps(result))
