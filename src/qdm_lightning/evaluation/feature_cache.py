"""From seeds to features, chunk by chunk: what is there already is not drawn again, whoever drew it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.evaluation.chunks import Chunk, ChunkFolder, DamagedChunk
from qdm_lightning.metrics.frechet import feature_batches
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.runs.provenance import environment

Step = Callable[[], None]
Say = Callable[[str], None]


@dataclass(kw_only=True)
class FeatureCache:
    """Makes the features of chunks of seeds, and keeps them (and the images) in files.

    Args:
        image_sampler: draws.
        feature_network: of the scores; on the image_sampler's device.
        images: where images are kept; None keeps none.
        features: where features are kept, with logits where the network has them, and each image's SHA-256.
    """

    image_sampler: ImageSampler
    feature_network: nn.Module
    images: ChunkFolder | None
    features: ChunkFolder

    def missing(self, chunks: Sequence[Sequence[int]], say: Say) -> list[Sequence[int]]:
        """Those of the chunks of seeds whose features are not there, or are damaged; `say` tells of the latter."""
        return [seeds for seeds in chunks if _read(self.features, seeds, say) is None]

    def make(self, seeds: Sequence[int], on_step: Step, say: Say) -> None:
        """Features of one chunk, from its images where they are there; `on_step` is called as by `ImageSampler.draw`."""
        drawn = _read(self.images, seeds, say) if self.images is not None else None
        if drawn is None:
            drawn = self._draw(seeds, on_step)
        else:
            for _ in range(self.image_sampler.steps(len(seeds))):
                on_step()
        begin = time.perf_counter()
        pixels = torch.from_numpy(drawn.arrays["images"])
        names = ("features", "logits") if hasattr(self.feature_network, "features_and_logits") else ("features",)
        batches = list(feature_batches(self.feature_network, pixels, logits="logits" in names))
        arrays = {name: torch.cat(parts).numpy() for name, parts in zip(names, zip(*batches, strict=True), strict=True)}
        arrays["images_sha256"] = image_hashes(drawn.arrays["images"])
        seconds = {**drawn.meta["seconds"], "features": time.perf_counter() - begin}
        self.features.write(seeds, arrays, {"seconds": seconds, "environment": drawn.meta["environment"]})

    def _draw(self, seeds: Sequence[int], on_step: Step) -> Chunk:
        begin = time.perf_counter()
        images = to_uint8(self.image_sampler.draw(seeds, on_step)).numpy()
        meta = {
            "seconds": {"sampling": time.perf_counter() - begin},
            "environment": environment(self.image_sampler.device),
        }
        if self.images is not None:
            self.images.write(seeds, {"images": images}, meta)
        return Chunk({"images": images}, meta)


def _read(folder: ChunkFolder, seeds: Sequence[int], say: Say) -> Chunk | None:
    try:
        return folder.read(seeds)
    except DamagedChunk as error:
        say(f"{error}; it is made again")
        return None


def image_hashes(images: np.ndarray) -> np.ndarray:
    """SHA-256 of the bytes of each image (N, C, H, W) uint8, as (N, 32) uint8."""
    digests = [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(images), 32)
