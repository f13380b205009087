"""What determines a score once the features are there, kept with every result. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROTOCOL: dict[str, Any] = {
    "version": 1,
    "rounding": "uint8: round((x + 1) * 127.5), clamped to 0..255",
    "features": "float32",
    "moments": "float64, covariance divided by N - 1",
    "isc_splits": 10,
    "kid_subsets": 100,
    "kid_subset_size": 1000,
    "kid_kernel": "poly, degree 3, gamma 1/dim, coef0 1, unbiased",
    "prc_neighborhood": 3,
    "rng_seed": 2020,
}
"""Results of different protocols do not compare."""

ADDED_PROTOCOL: dict[str, Any] = {
    "density_neighborhood": 5,
    "kernel_all_limit": 10_000,
    "cmmd_sigma": 10,
    "extrapolation_points": 10,
}
"""What determines the scores that came later; a record without it has none of them, and its own still compare."""


def with_added(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A protocol as this version writes it: one of version 0.1 says nothing of the scores that it has not."""
    return {**ADDED_PROTOCOL, **protocol}
