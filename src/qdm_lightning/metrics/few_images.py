"""Scores whose bias does not hide in the number of images: the kernel distance over all of them, and the extrapolated FD.

A Frechet distance of N images is biased upwards by about c / N (Chong and Forsyth 2020, arXiv 1911.07023): two sets of one
distribution are some c (1/N + 1/M) apart.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qdm_lightning.metrics.constants import ADDED_PROTOCOL
from qdm_lightning.metrics.moments import Moments, frechet
from qdm_lightning.metrics.protocol import check_features

ROWS = 2048
"""Of a block of kernel values."""


def unbiased_kernel_distance(generated: Tensor, real: Tensor) -> float:
    """Unbiased squared MMD over all images (Gretton et al. 2012, eq. 3), with the kernel of KID: (x.y / dim + 1)^3.

    KID takes the mean over subsets of 1,000; this is defined from two images on.

    Args:
        generated: features (N, dim), N >= 2.
        real: features (M, dim), M >= 2.
        Of more than `kernel_all_limit` rows so many are taken, at random but always alike.

    Returns:
        The distance; it may be below 0.

    Raises:
        ValueError: too few images, different widths, or features that are not finite.
    """
    check_features("the kernel distance", 2, generated=generated, real=real)
    x, y = (_at_most(rows, ADDED_PROTOCOL["kernel_all_limit"]).double() for rows in (generated, real))
    n, m = len(x), len(y)
    return (
        (_kernel_sum(x, x) - _kernel_diagonal(x)) / (n * (n - 1))
        + (_kernel_sum(y, y) - _kernel_diagonal(y)) / (m * (m - 1))
        - 2 * _kernel_sum(x, y) / (n * m)
    )


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return float(sum((block @ y.T / x.shape[1] + 1).pow_(3).sum() for block in x.split(ROWS)))


def _kernel_diagonal(x: Tensor) -> float:
    return float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())


def cmmd(generated: Tensor, real: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603): 1,000 times the squared MMD of CLIP embeddings of unit length.

    Gaussian kernel exp(-|x - y|^2 / (2 * 10^2)), and the biased estimator, as in the authors' code.

    Args:
        generated: CLIP embeddings (N, dim), N >= 2.
        real: CLIP embeddings (M, dim), M >= 2.
        Of more than `kernel_all_limit` rows so many are taken, at random but always alike.

    Raises:
        ValueError: too few images, different widths, or features that are not finite.
    """
    check_features("CMMD", 2, generated=generated, real=real)
    limit = ADDED_PROTOCOL["kernel_all_limit"]
    x, y = (torch.nn.functional.normalize(_at_most(rows, limit).double(), dim=1) for rows in (generated, real))
    gamma = 1 / (2 * ADDED_PROTOCOL["cmmd_sigma"] ** 2)

    def mean_kernel(a: Tensor, b: Tensor) -> float:  # |a - b|^2 = 2 - 2 a.b
        return float(sum((-gamma * (2 - 2 * block @ b.T)).exp_().sum() for block in a.split(ROWS))) / (len(a) * len(b))

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def _at_most(rows: Tensor, limit: int) -> Tensor:
    if len(rows) <= limit:
        return rows
    return rows[torch.from_numpy(_order(len(rows), 0)[:limit])]


def _order(count: int, number: int) -> np.ndarray:
    """A permutation, a function of the arguments alone: numpy promises the legacy generator's stream for good."""
    return np.random.RandomState(number).permutation(count)


def extrapolation_sizes(count: int, dim: int) -> list[int]:
    """Numbers of images between which `extrapolated_frechet` extrapolates, ascending; empty where there are too few images.

    Ten, evenly spaced in 1/N from a fifth of the images, or as many as make a covariance of full rank, to all of them.

    >>> extrapolation_sizes(1024, 64)[:3], extrapolation_sizes(1024, 64)[-1], extrapolation_sizes(1024, 2048)
    ([205, 225, 249], 1024, [])
    """
    least = max(-(-count // 5), dim + 1)
    if 2 * least > count:
        return []
    inverse = np.linspace(1 / least, 1 / count, ADDED_PROTOCOL["extrapolation_points"])
    return [int(size) for size in np.rint(1 / inverse)]


def extrapolated_frechet(generated: Tensor, real: Moments) -> float:
    """The Frechet distance at N -> infinity, FD_inf: a line through the distances of subsets, over 1/N, at 0.

    Args:
        generated: features (N, dim).
        real: moments of the real images; their own number still biases it.

    Raises:
        ValueError: too few images (see `extrapolation_sizes`), different widths, or features that are not finite.
    """
    sizes = extrapolation_sizes(*generated.shape)
    if not sizes:
        raise ValueError(f"{len(generated)} images are too few to extrapolate from: {2 * (generated.shape[1] + 1)} are needed")
    distances = [
        frechet(Moments.of(generated[torch.from_numpy(_order(len(generated), number)[:size])]), real)
        for number, size in enumerate(sizes)
    ]
    return float(np.polynomial.polynomial.polyfit(1 / np.array(sizes), distances, 1)[0])


def distance_of_equals(halves: float, real_count: int, count: int) -> float:
    """What the Frechet distance of `count` further real images to all `real_count` would be: the bias of these numbers.

    Two halves are c (2 / half) apart, `count` and `real_count` images c (1 / count + 1 / real_count): c is the same.

    Args:
        halves: distance between two halves of the real images, see `frechet.halves_distance`.
        real_count: all real images.
        count: generated images behind the score that it stands beside.
    """
    half = real_count // 2
    return halves * (1 / count + 1 / real_count) * half / 2
