"""Mean and covariance of features, streamed in float64, and the Frechet distance between two of them.

A stream may arrive in any order: chunks are folded in the order of their index, so that the same chunks give the same bits.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

BLOCK = 4096
"""Rows that are folded together: each fold touches the whole covariance."""


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
        stream = MomentsStream(features.shape[-1])
        stream.add(0, features)
        return stream.result()


class MomentsStream:
    """Moments of chunks of features that come one after another, in any order.

    Chunks are gathered in the order of their index, and folded (Chan, Golub and LeVeque 1983, eq. 2.1) when `BLOCK` rows are
    there: in memory are at most these and the chunks that came early.

    Args:
        dim: width of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._next = 0
        self._early: dict[int, Tensor] = {}
        self._gathered: list[Tensor] = []

    def add(self, index: int, features: Tensor) -> None:
        """Take chunk `index` (0, 1, 2, ...), features (n, dim) with n >= 1.

        Raises:
            ValueError: the chunk is already there, has another width or no rows, or holds values that are not finite.
        """
        if index < self._next or index in self._early:
            raise ValueError(f"chunk {index} of the features came twice")
        if features.ndim != 2 or features.shape[1] != len(self._mean) or not len(features):
            raise ValueError(f"chunk {index}: features (n, {len(self._mean)}) are wanted, not {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise ValueError(f"chunk {index}: features are not finite, the images or the network's weights are broken")
        self._early[index] = features.cpu()
        while self._next in self._early:
            self._gathered.append(self._early.pop(self._next))
            self._next += 1
            if sum(map(len, self._gathered)) >= BLOCK:
                self._fold()

    def _fold(self) -> None:
        gathered, self._gathered = self._gathered, []
        rows = (torch.cat(gathered) if len(gathered) > 1 else gathered[0]).to(torch.float64, copy=True)
        mean = rows.mean(0)
        centered = rows.sub_(mean).numpy()
        scatter = torch.from_numpy(centered.T @ centered)  # numpy's product knows that it is symmetric: half the work
        shift, count = mean - self._mean, self.count + len(rows)
        if self.count:
            scatter += self._scatter
            scatter += torch.outer(shift, shift) * (self.count * len(rows) / count)
        self._scatter = scatter
        self._mean += shift * (len(rows) / count)
        self.count = count

    def result(self) -> Moments:
        """Moments of all chunks so far. Raises ValueError below two vectors, or while a chunk before another is missing."""
        if self._early:
            raise ValueError(f"chunk {self._next} of the features is missing, while chunk {min(self._early)} is there")
        if self._gathered:
            self._fold()
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance: at least 2 are needed")
        return Moments(mu=self._mean.numpy().copy(), sigma=(self._scatter / (self.count - 1)).numpy(), count=self.count)


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance between two Gaussians, computed by torch-fidelity in float64 (Heusel et al. 2017, eq. 6).

    Raises:
        ValueError: the moments have different widths.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"moments of width {len(a.mu)} and {len(b.mu)} do not compare: they come from different networks")
    first, second = (
        {"mu": m.mu.astype(np.float64, copy=False), "sigma": m.sigma.astype(np.float64, copy=False)} for m in (a, b)
    )
    return float(fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID])


def save_moments(path: Path, moments: Moments) -> None:
    """Write `mu`, `sigma` and `count` (-1: unknown) to an .npz, whole or not at all."""
    count = -1 if moments.count is None else moments.count
    save_arrays(path, mu=moments.mu, sigma=moments.sigma, count=np.int64(count))


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays to an .npz: beside (`<name>.<process>.part`), flushed to the disk, renamed."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as stream:
            np.savez(stream, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an .npz with arrays mu (dim,) and sigma (dim, dim) is wanted")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            mu, sigma = archive["mu"].astype(np.float64), archive["sigma"].astype(np.float64)
            count = int(archive["count"]) if "count" in archive.files else -1
    except (OSError, KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged or holds no statistics ({error}): an .npz with arrays mu and sigma is wanted"
        ) from error
    width = len(mu) if dim is None and mu.ndim == 1 else dim
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise ValueError(
            f"{path} holds mu {mu.shape} and sigma {sigma.shape}, not ({width},) and ({width}, {width}): another network's?"
        )
    if not (np.isfinite(mu).all() and np.allclose(sigma, sigma.T, rtol=1e-6, atol=1e-9)):
        raise ValueError(f"{path}: mu or sigma is not finite, or sigma is not symmetric")
    return Moments(mu=mu, sigma=sigma, count=None if count < 0 else count)
