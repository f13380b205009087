"""Features of images and the Frechet distance between two sets of them, in float64.

A feature network is an `nn.Module` with attributes `name` (str) and `dim` (int) and
`forward(uint8 images (N, C, H, W)) -> float features (N, dim)`; one that classifies may also have
`features_and_logits(images) -> (features (N, dim), logits (N, classes))`, and one that is large an attribute `batch_size`;
one that resamples its images an attribute `resize`, a few words that say how.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from qdm_lightning.metrics.moments import Moments, frechet

PUBLISHED = "6726825d"
"""First digits of the SHA-256 of the Inception weights that FID is defined by; the published file's name carries them."""


def check_network(network: nn.Module) -> nn.Module:
    """Return `network` if it can be used as a feature network.

    Raises:
        ValueError: no module, no attribute `name` (lower-case letters, digits, _) or `dim` (positive int), or one that is
            named `inception` without the published weights.
    """
    name, dim = getattr(network, "name", None), getattr(network, "dim", None)
    named = isinstance(name, str) and re.fullmatch(r"[a-z0-9_]+", name) is not None
    if not isinstance(network, nn.Module) or not named or not isinstance(dim, int) or dim < 1:
        raise ValueError(
            f"metrics: {type(network).__name__} (name={name!r}, dim={dim!r}) is no feature network: it must be an nn.Module "
            "with attributes name (lower-case letters, digits, _) and dim (positive int), see metrics=digits"
        )
    if name == "inception" and not str(getattr(network, "weights_sha256", None)).startswith(PUBLISHED):
        raise ValueError(
            f"metrics: {type(network).__name__} is named 'inception' without the published weights ({PUBLISHED}...), and its "
            "distance would pass for FID: give it another name, or type metrics=inception"
        )
    return network


def frechet_key(network: nn.Module) -> str:
    """Name of the distance over `network`: `fid` for Inception with its published weights alone, otherwise `fd_<name>`."""
    name = check_network(network).name
    return "fid" if name == "inception" else f"fd_{name}"


def batch_size_of(network: nn.Module) -> int:
    """Images that go through `network` together: its attribute `batch_size`, or 256."""
    return int(getattr(network, "batch_size", 256))


@torch.no_grad()
def feature_batches(
    network: nn.Module,
    images: Tensor,
    batch_size: int | None = None,
    *,
    logits: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Features of `images`, batch by batch, computed in eval mode on the network's device.

    The last batch is padded to `batch_size`, so that an image's features do not depend on how many others there are.

    Args:
        network: a feature network.
        images: (N, C, H, W) uint8; a memory-mapped tensor is read piece by piece.
        batch_size: images that go through the network together; None takes `batch_size_of(network)`.
        logits: ask for class logits too, by the network's `features_and_logits(images)`.
        on_batch: called with the number of images after every batch.

    Yields:
        (features (n, dim),) or (features (n, dim), logits (n, classes)), float32 on the CPU.

    Raises:
        ValueError: `images` is no uint8 (N, C, H, W), the network returns another shape than (N, dim), or has no logits.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"features are taken of uint8 images (N, C, H, W), not of {images.dtype} {tuple(images.shape)}")
    dim = int(check_network(network).dim)  # type: ignore[arg-type]
    batch_size = batch_size_of(network) if batch_size is None else batch_size
    if logits and not hasattr(network, "features_and_logits"):
        raise ValueError(f"metrics: {network.name} has no class logits (no method features_and_logits), so no Inception Score")
    device = next((p.device for p in [*network.parameters(), *network.buffers()]), torch.device("cpu"))
    for begin in range(0, len(images), batch_size):
        batch = images[begin : begin + batch_size]
        padding = batch[-1:].expand(batch_size - len(batch), *batch.shape[1:])
        padded, training = torch.cat([batch, padding]).to(device), network.training
        network.eval()
        try:
            results = network.features_and_logits(padded) if logits else (network(padded),)  # type: ignore[operator]
        finally:
            network.train(training)
        if results[0].shape != (batch_size, dim):
            shape = tuple(results[0].shape)
            raise ValueError(f"metrics: {network.name} returned {shape} for {batch_size} images, not ({batch_size}, {dim})")
        yield tuple(result[: len(batch)].float().cpu() for result in results)
        if on_batch is not None:
            on_batch(len(batch))


def features(network: nn.Module, images: Tensor, batch_size: int | None = None) -> Tensor:
    """Features (N, dim) float32 of `images` (N, C, H, W) uint8, on the CPU. Arguments and errors: `feature_batches`."""
    rows = (rows for (rows,) in feature_batches(network, images, batch_size))
    return torch.cat([torch.empty(0, int(network.dim)), *rows])  # type: ignore[arg-type]


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features, see `moments.frechet`.

    Args:
        features_a: (N, dim), N >= 2.
        features_b: (M, dim), M >= 2.

    Raises:
        ValueError: fewer than two rows, different widths, or values that are not finite.
    """
    return frechet(Moments.of(features_a), Moments.of(features_b))


def halves_distance(rows: Tensor) -> float:
    """Frechet distance between two halves of one set of features (N, dim), parted at random but always alike: the floor.

    Raises:
        ValueError: fewer than four rows.
    """
    if len(rows) < 4:
        raise ValueError(f"the distance between two halves needs at least 4 images, not {len(rows)}")
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(rows)))  # a stream that numpy promises for good
    half = len(rows) // 2
    return frechet_distance(rows[order[:half]], rows[order[half : 2 * half]])
