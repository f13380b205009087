"""The Frechet distance against scipy's matrix square root and against Gaussians whose distance is known."""

import numpy as np
import pytest
import scipy.linalg
import torch

from qdm_lightning.metrics.frechet import frechet_distance


def by_scipy(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sigma_a + sigma_b - 2 * root)


def rows(count, dim, seed, scale=1.0, shift=0.0):
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    return shift + scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) @ mixing


@pytest.mark.parametrize(("count", "dim"), [(200, 16), (500, 64), (65, 64)])
def test_equals_scipy(count, dim):
    a, b = rows(count, dim, 0), rows(count + 30, dim, 1, scale=1.3, shift=0.2)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-8)


def whitened(x):
    """`x` moved and scaled so that its sample mean is 0 and its sample covariance the identity."""
    x = x.double() - x.double().mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_gaussians_of_known_distance():
    x = whitened(rows(300, 5, 0))
    mean, std = torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0], [0.5, 1.0, 2.0, 3.0, 0.1]], dtype=torch.float64)
    known = (mean**2).sum() + ((std - 1) ** 2).sum()  # commuting covariances: sum of (sigma_a - sigma_b)^2
    assert frechet_distance(x, whitened(rows(400, 5, 1)) * std + mean) == pytest.approx(known.item(), rel=1e-9)


def test_one_dimension():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [16.0]])
    assert frechet_distance(a, b) == pytest.approx((13 - 1) ** 2 + (18**0.5 - 2**0.5) ** 2, rel=1e-12)


def test_float32_features_of_large_mean_do_not_lose_the_distance():
    a, b = rows(400, 8, 0) + 1000, rows(400, 8, 1) + 1000
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-6)


def test_distance_is_symmetric_and_zero_on_itself():
    a, b = rows(100, 6, 0), rows(90, 6, 1, scale=2.0)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert abs(frechet_distance(a, a)) < 1e-6
