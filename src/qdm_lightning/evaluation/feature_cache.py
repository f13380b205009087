"""From seeds to features, chunk by chunk: what is there already is not drawn again, whoever drew it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qdm_lightning.base.checksums import remove_checked
from qdm_lightning.base.files import sha256
from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.evaluation.chunks import Chunk, ChunkFolder
from qdm_lightning.evaluation.protocol import drawn_on
from qdm_lightning.metrics.frechet import feature_batches
from qdm_lightning.models.image_sampler import ImageSampler

Chunks = Sequence[Sequence[int]]
"""Seeds of images, in lists of those that share a file."""


@dataclass(kw_only=True)
class FeatureCache:
    """Makes the features of chunks of seeds, and keeps them (and the images) in files.

    Args:
        image_sampler: draws.
        feature_network: takes the features, on the device of `image_sampler`.
        images: where images are kept; None keeps none.
        features: where features are kept, with logits where the network has them, and each image's SHA-256.
    """

    image_sampler: ImageSampler
    feature_network: nn.Module
    images: ChunkFolder | None
    features: ChunkFolder

    def missing(self, chunks: Chunks, say: Callable[[str], None]) -> list[Sequence[int]]:
        """Those of the chunks whose features are not there, or are damaged; `say` tells of the latter."""
        return [seeds for seeds in chunks if _read(self.features, seeds, say) is None]

    def steps(self, chunks: Chunks) -> int:
        """Steps of sampling that the images of `chunks` take."""
        return sum(self.image_sampler.steps(len(seeds)) for seeds in chunks)

    def fill(self, chunks: Chunks, progress: Any, stage: str = "sampling", before: int = 0) -> None:
        """Make chunks, from their images where they are there.

        Args:
            progress: shows a stage of the name `stage`, in which `before` steps were done already.
        """
        with progress.stage(stage, before + self.steps(chunks), "steps") as shown:
            shown.skip(before)
            for seeds in chunks:
                images = None if self.images is None else _read(self.images, seeds, progress.say)
                if images is not None:
                    shown.advance(self.image_sampler.steps(len(seeds)))
                self._take_features(seeds, images or self._draw(seeds, shown.advance))

    def _take_features(self, seeds: Sequence[int], images: Chunk) -> None:
        begin = time.perf_counter()
        pixels = torch.from_numpy(images.arrays["images"])
        names = ("features", "logits") if hasattr(self.feature_network, "features_and_logits") else ("features",)
        batches = list(feature_batches(self.feature_network, pixels, logits="logits" in names))
        arrays = {name: torch.cat(parts).numpy() for name, parts in zip(names, zip(*batches, strict=True), strict=True)}
        hashes = b"".join(bytes.fromhex(sha256([np.ascontiguousarray(image)])) for image in images.arrays["images"])
        arrays["images_sha256"] = np.frombuffer(hashes, dtype=np.uint8).reshape(len(seeds), 32)
        seconds = {**images.meta["seconds"], "features": time.perf_counter() - begin}
        self.features.write(seeds, arrays, {"seconds": seconds, "environment": images.meta["environment"]})

    def _draw(self, seeds: Sequence[int], on_step: Callable[[], None]) -> Chunk:
        begin = time.perf_counter()
        images = to_uint8(self.image_sampler.draw(seeds, on_step)).numpy()
        meta = {
            "seconds": {"sampling": time.perf_counter() - begin},
            "environment": drawn_on(self.image_sampler),
        }
        if self.images is not None:
            self.images.write(seeds, {"images": images}, meta)
        return Chunk({"images": images}, meta)

    def read(self, chunks: Chunks) -> list[Chunk]:
        """Features of all images.

        Raises:
            ValueError: an image is missing (50,000 means 50,000), or a file is damaged.
        """
        features = {tuple(seeds): self.features.read(seeds) for seeds in chunks}
        missing = [seeds for seeds, chunk in features.items() if chunk is None]
        if missing:
            raise ValueError(
                f"{sum(map(len, missing))} of {sum(map(len, chunks))} images are missing, the first has seed {missing[0][0]}: "
                "the shards are not done; leave out merge=true to draw them here"
            )
        return [chunk for chunk in features.values() if chunk is not None]


def _read(folder: ChunkFolder, seeds: Sequence[int], say: Callable[[str], None]) -> Chunk | None:
    try:
        return folder.read(seeds)
    except ValueError as error:
        say(f"{error}; it is made again")
        remove_checked(folder.file(seeds))
        return None
