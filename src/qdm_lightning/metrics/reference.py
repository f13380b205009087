"""Statistics of the real images, computed once and cached under a hash of everything that determines them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from qdm_lightning.base.checksums import remove_checked
from qdm_lightning.base.files import data_hash, reading, remove_leftovers, sha256
from qdm_lightning.metrics.constants import PROTOCOL
from qdm_lightning.metrics.frechet import batch_size_of, check_network, feature_batches
from qdm_lightning.metrics.moments import Moments, load_moments, save_moments
from qdm_lightning.metrics.weights import state_hash


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What a score compares generated images with.

    Attributes:
        moments: mean and covariance of the real features.
        features: (N, dim) float32; None where they were not asked for, or where the statistics were imported.
        source: hash of the images, or path of the imported file.
        sha256: hash of mean and covariance, by which a result names its reference.
    """

    moments: Moments
    features: Tensor | None
    source: str
    sha256: str


def reference(
    network: nn.Module,
    images: Tensor,
    *,
    images_hash: str,
    cache: Path | None,
    batch_size: int | None = None,
    keep_features: bool = False,
    on_batch: Callable[[int], None] | None = None,
    say: Callable[[str], None] = print,
) -> Reference:
    """Moments (and features) of real images over `network`; of several processes one computes them, the others wait.

    Args:
        network: a feature network.
        images: (N, C, H, W) uint8, N >= 2.
        images_hash: hash of their content.
        cache: folder to keep the result in (`references/` below it); None keeps nothing.
        batch_size: images that go through the network together; None takes `batch_size_of(network)`.
        keep_features: keep and return the features too (kernel distance, precision and recall need them).
        on_batch: called with the number of images after every batch; not called where the cache has the result.
        say: called with a line about a damaged cache, which is made again.

    Raises:
        ValueError: fewer than two images, or images or features that do not fit.
    """
    batch_size = batch_size_of(check_network(network)) if batch_size is None else batch_size
    batches = (rows for (rows,) in feature_batches(network, images, batch_size, on_batch=on_batch))
    if cache is None:
        moments, features = _computed(batches, keep_features)
    else:
        file = cache.expanduser() / "references" / f"{_key(network, images, images_hash, batch_size)}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            remove_leftovers(file)
            stored = _stored(file, int(network.dim), keep_features, say)  # type: ignore[arg-type]
            moments, features = _computed(batches, keep_features) if stored is None else stored
            if stored is None:
                save_moments(file, moments, **({} if features is None else {"features": features.numpy()}))
    return Reference(moments=moments, features=features, source=images_hash, sha256=moments_hash(moments))


def import_reference(path: Path, network: nn.Module) -> Reference:
    """Published statistics (.npz with `mu`, `sigma`) over `network`. Raises FileNotFoundError, ValueError as `load_moments`."""
    moments = load_moments(path, int(check_network(network).dim))  # type: ignore[arg-type]
    return Reference(moments=moments, features=None, source=str(path), sha256=moments_hash(moments))


def moments_hash(moments: Moments) -> str:
    """SHA-256 (hexadecimal) over mean, covariance and count."""
    arrays = (array.astype("<f8").tobytes() for array in (moments.mu, moments.sigma))
    return sha256([f"{moments.mu.shape} {moments.count}", *arrays])


def _key(network: nn.Module, images: Tensor, images_hash: str, batch_size: int) -> str:
    key = {
        "protocol": PROTOCOL["version"],
        "images": images_hash,
        "shape": list(images.shape),
        "network": str(network.name),
        "weights": state_hash(network),
        "batch_size": batch_size,
        "device": next((p.device.type for p in network.parameters()), "cpu"),
        "torch": torch.__version__,
    }
    return f"{network.name}-{data_hash(key)[:32]}"


def _computed(batches: Iterable[Tensor], keep: bool) -> tuple[Moments, Tensor | None]:
    if not keep:
        return Moments.of_batches(batches), None
    parts = list(batches)
    return Moments.of_batches(parts), torch.cat(parts)


def _stored(file: Path, dim: int, keep: bool, say: Callable[[str], None]) -> tuple[Moments, Tensor | None] | None:
    """What the cache has; None where anything is missing or damaged."""
    if not file.exists():
        return None
    try:
        moments = load_moments(file, dim)
        features = _load_features(file, moments) if keep else None
    except ValueError as error:
        say(f"{error}; it is made again")
        remove_checked(file)
        return None
    return None if keep and features is None else (moments, features)


def _load_features(file: Path, moments: Moments) -> Tensor | None:
    with reading(file) as stream, np.load(stream, allow_pickle=False) as archive:
        if "features" not in archive.files:
            return None
        rows = torch.from_numpy(archive["features"])
        if rows.shape != (moments.count, len(moments.mu)):
            raise ValueError(f"{tuple(rows.shape)} features, not ({moments.count}, {len(moments.mu)})")
    return rows
