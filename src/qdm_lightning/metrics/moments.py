"""Mean and covariance of features in float64, and the Frechet distance between two of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from qdm_lightning.base.files import atomic_path, reading

BLOCK = 4096
"""Rows that are folded together: each fold touches the whole covariance."""

WANTED = "an .npz with arrays mu (dim,) and sigma (dim, dim) is wanted"


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Mean and covariance of feature vectors, float64.

    Attributes:
        mu: (dim,).
        sigma: (dim, dim), divided by count - 1.
        count: number of vectors; None for imported statistics that do not say it.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of features (N, dim). Raises ValueError below two vectors, or where a value is not finite."""
        return cls.of_batches([features])

    @classmethod
    def of_batches(cls, batches: Iterable[Tensor]) -> Moments:
        """Moments of features (n, dim) that come batch after batch, of which at most `BLOCK` rows and one batch are in memory.

        Blocks are folded into one another by Chan, Golub and LeVeque 1983, eq. 2.1: the same batches give the same bits.

        Raises:
            ValueError: fewer than two vectors in all, or a value that is not finite.
        """
        count, mean, scatter = 0, torch.tensor(0.0), torch.tensor(0.0)
        for rows in _blocks(batches):
            total, block_mean = count + len(rows), rows.mean(0)
            centered = rows.sub_(block_mean).numpy()
            block_scatter = torch.from_numpy(centered.T @ centered)  # numpy knows that it is symmetric: half the work
            shift = block_mean - mean
            if count:
                block_scatter += scatter
                block_scatter += torch.outer(shift, shift) * (count * len(rows) / total)
            count, mean, scatter = total, mean + shift * (len(rows) / total), block_scatter
        if count < 2:
            raise ValueError(f"{count} images have no covariance: at least 2 are needed, for example num_samples=1000")
        return cls(mu=mean.numpy(), sigma=(scatter / (count - 1)).numpy(), count=count)


def _blocks(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Copies of `batches` in float64 on the CPU, joined to at least `BLOCK` rows, the last one aside."""
    block: list[Tensor] = []
    for features in batches:
        if not torch.isfinite(features).all():
            raise ValueError("features are not finite: the images or the network's weights are broken")
        block.append(features.cpu())
        if sum(map(len, block)) >= BLOCK:
            yield torch.cat(block).double()
            block = []
    if any(map(len, block)):
        yield torch.cat(block).double()


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance between two Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6), by torch-fidelity in float64.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    Raises:
        ValueError: the moments have different widths.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"moments of width {len(a.mu)} and {len(b.mu)} do not compare: they come from different networks")
    first, second = ({"mu": moments.mu, "sigma": moments.sigma} for moments in (a, b))
    return float(fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID])


def save_moments(path: Path, moments: Moments, **arrays: np.ndarray) -> None:
    """Write `mu`, `sigma`, `count` (-1: unknown) and further `arrays` to an .npz, whole or not at all."""
    count = np.int64(-1 if moments.count is None else moments.count)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, mu=moments.mu, sigma=moments.sigma, count=count, **arrays)  # type: ignore[arg-type]


def load_moments(path: Path, dim: int | None = None) -> Moments:
    """Read an .npz with `mu` (dim,) and `sigma` (dim, dim): ours, or published statistics (pytorch-fid, guided-diffusion).

    Args:
        path: the file.
        dim: width that is wanted; None takes any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, without the two arrays, or of another width.
    """
    path = path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {WANTED}")
    with reading(path, WANTED) as stream, np.load(stream, allow_pickle=False) as archive:
        mu, sigma = archive["mu"].astype(np.float64), archive["sigma"].astype(np.float64)
        count = int(archive["count"]) if "count" in archive.files else -1
    width = len(mu) if dim is None and mu.ndim == 1 else dim
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise ValueError(
            f"{path} holds mu {mu.shape} and sigma {sigma.shape}, not ({width},) and ({width}, {width}): another network's?"
        )
    if not (np.isfinite(mu).all() and np.allclose(sigma, sigma.T, rtol=1e-6, atol=1e-9)):
        raise ValueError(f"{path}: mu or sigma is not finite, or sigma is not symmetric")
    return Moments(mu=mu, sigma=sigma, count=None if count < 0 else count)
