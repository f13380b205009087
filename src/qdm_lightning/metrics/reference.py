"""Statistics of the real images, computed once and cached under a hash of everything that determines them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from qdm_lightning.metrics.frechet import batch_size_of, check_network, feature_batches
from qdm_lightning.metrics.moments import Moments, MomentsStream, load_moments, save_arrays, save_moments
from qdm_lightning.metrics.protocol import PROTOCOL
from qdm_lightning.metrics.weights import state_hash


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What a score compares generated images with.

    Attributes:
        moments: mean and covariance of the real features.
        features: (N, dim) float32; None where they were not asked for, or where the statistics were imported.
        source: hash of the images, or path of the imported file.
        sha256: hash of mean and covariance, as the record of a result names them.
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
        say: told of a cache that is damaged: it is made again.

    Raises:
        ValueError: fewer than two images, or images or features that do not fit.
    """
    batch_size = batch_size_of(check_network(network)) if batch_size is None else batch_size
    moments_file, features_file = _files(network, images, images_hash, batch_size, cache)
    if moments_file is None or features_file is None:
        moments, rows = _compute(network, images, batch_size, keep_features, on_batch)
    else:
        moments_file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{moments_file}.lock"):
            for left in moments_file.parent.glob(f"{moments_file.stem}.*.part"):
                left.unlink()  # of a killed process: who writes holds the lock
            kept = _kept(moments_file, features_file if keep_features else None, int(network.dim), say)  # type: ignore[arg-type]
            if kept is None:
                kept = _compute(network, images, batch_size, keep_features, on_batch)
                if kept[1] is not None:
                    save_arrays(features_file, features=kept[1].numpy())
                save_moments(moments_file, kept[0])
            moments, rows = kept
    return Reference(moments=moments, features=rows, source=images_hash, sha256=moments_hash(moments))


def import_reference(path: Path, network: nn.Module) -> Reference:
    """Published statistics (.npz with `mu`, `sigma`) over `network`. Raises FileNotFoundError, ValueError as `load_moments`."""
    moments = load_moments(path, int(check_network(network).dim))  # type: ignore[arg-type]
    return Reference(moments=moments, features=None, source=str(path), sha256=moments_hash(moments))


def moments_hash(moments: Moments) -> str:
    """SHA-256 (hexadecimal) over mean, covariance and count."""
    digest = hashlib.sha256(f"{moments.mu.shape} {moments.count}".encode())
    for array in (moments.mu, moments.sigma):
        digest.update(array.astype("<f8").tobytes())
    return digest.hexdigest()


def _files(
    network: nn.Module, images: Tensor, images_hash: str, batch_size: int, cache: Path | None
) -> tuple[Path | None, Path | None]:
    if cache is None:
        return None, None
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
    name = f"{network.name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}"
    folder = cache.expanduser() / "references"
    return folder / f"{name}.npz", folder / f"{name}.features.npz"


def _compute(
    network: nn.Module, images: Tensor, batch_size: int, keep: bool, on_batch: Callable[[int], None] | None
) -> tuple[Moments, Tensor | None]:
    stream, kept = MomentsStream(int(network.dim)), []  # type: ignore[arg-type]
    for index, (rows,) in enumerate(feature_batches(network, images, batch_size, on_batch=on_batch)):
        stream.add(index, rows)
        if keep:
            kept.append(rows)
    return stream.result(), torch.cat(kept) if keep else None


def _kept(
    moments_file: Path, features_file: Path | None, dim: int, say: Callable[[str], None]
) -> tuple[Moments, Tensor | None] | None:
    """What the cache has; None where anything is missing or damaged."""
    if not all(file.is_file() for file in (moments_file, features_file) if file is not None):
        return None
    try:
        moments = load_moments(moments_file, dim)
        return moments, None if features_file is None else _load_features(features_file, moments)
    except ValueError as error:
        say(f"{error}; it is made again")
        return None


def _load_features(path: Path, moments: Moments) -> Tensor:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            rows = torch.from_numpy(archive["features"])
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if rows.shape != (moments.count, len(moments.mu)):
        raise ValueError(f"{path} is damaged: {tuple(rows.shape)} features, not ({moments.count}, {len(moments.mu)})")
    return rows
