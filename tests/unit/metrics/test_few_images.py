"""Scores of few images against sums written out, and what is known of Gaussians."""

import math

import numpy as np
import pytest
import torch

from qdm_lightning.metrics import few_images
from qdm_lightning.metrics.constants import ADDED_PROTOCOL
from qdm_lightning.metrics.few_images import (
    cmmd,
    distance_of_equals,
    extrapolated_frechet,
    extrapolation_sizes,
    unbiased_kernel_distance,
)
from qdm_lightning.metrics.frechet import frechet_distance, halves_distance
from qdm_lightning.metrics.moments import Moments


def rows(count, seed=0, dim=8, shift=0.0):
    return shift + torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_the_kernel_distance_is_the_sum_over_all_pairs(monkeypatch):
    monkeypatch.setattr(few_images, "ROWS", 3)
    x, y = rows(7).double().numpy(), rows(5, seed=1, shift=0.5).double().numpy()

    def kernel(a, b):
        return (a @ b / 8 + 1) ** 3

    within = [
        sum(kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    expected = sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert unbiased_kernel_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-10)


def test_the_kernel_distance_of_equals_is_around_zero():
    values = [unbiased_kernel_distance(rows(60, seed), rows(60, 1000 + seed)) for seed in range(40)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(40)
    assert min(values) < 0


def test_of_many_rows_the_same_ones_are_taken(monkeypatch):
    monkeypatch.setitem(ADDED_PROTOCOL, "kernel_all_limit", 20)
    few = unbiased_kernel_distance(rows(50), rows(30, seed=1))
    assert few == unbiased_kernel_distance(rows(50), rows(30, seed=1))
    order = np.random.RandomState(0).permutation(50)[:20]
    monkeypatch.setitem(ADDED_PROTOCOL, "kernel_all_limit", 30)
    assert few != unbiased_kernel_distance(rows(50)[order], rows(30, seed=1))


def test_cmmd_of_two_directions():
    """|x - y|^2 = 2 for any two of them, whatever their lengths: 1000 (2 - 2 exp(-2 / 200))."""
    x, y = torch.tensor([[1.0, 0], [3.0, 0]]), torch.tensor([[0, 2.0], [0, 5.0], [0, 1.0]])
    assert cmmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)), rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="CMMD needs at least 2"):
        cmmd(x[:1], y)


def test_the_extrapolated_distance_has_lost_the_bias_of_the_number():
    real = Moments.of(rows(20000, seed=99))
    found = [
        (frechet_distance(x, rows(20000, seed=99)), extrapolated_frechet(x, real)) for x in (rows(400, s) for s in range(6))
    ]
    plain, extrapolated = np.mean(found, axis=0)
    assert abs(extrapolated) < 0.2 * plain


def test_it_is_the_line_through_the_subsets(monkeypatch):
    """Where each distance is 3 + 50 / N, it is 3."""
    monkeypatch.setattr(few_images, "frechet", lambda a, b: 3 + 50 / a.count)
    assert extrapolated_frechet(rows(300), None) == pytest.approx(3, rel=1e-9)
    assert extrapolation_sizes(300, 8)[0] == 60
    assert extrapolation_sizes(300, 8)[-1] == 300
    assert extrapolation_sizes(17, 8) == []
    with pytest.raises(ValueError, match="17 images are too few to extrapolate from: 18 are needed"):
        extrapolated_frechet(rows(17), None)


def test_as_many_real_images_have_the_distance_that_halves_foretell():
    foretold, measured = [], []
    for seed in range(12):
        real = rows(600, seed)
        foretold.append(distance_of_equals(halves_distance(real), 600, 400))
        measured.append(frechet_distance(rows(400, 500 + seed), real))
    assert np.mean(foretold) == pytest.approx(np.mean(measured), rel=0.1)
    assert distance_of_equals(4.55, 1500, 1024) == pytest.approx(4.55 * (1 / 1024 + 1 / 1500) / (2 / 750))
