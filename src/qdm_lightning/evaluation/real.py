"""The real images of an evaluation: the run's training images, or published statistics that stand for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qdm_lightning.data.module import content_hash
from qdm_lightning.evaluation.scores import Choice
from qdm_lightning.metrics.reference import Reference, import_reference, reference
from qdm_lightning.training.experiment import Experiment


@dataclass(frozen=True)
class RealImages:
    """The real images, before anything is computed: `images` (N, C, H, W), or None where `imported` statistics stand for them.

    `source` is the hash of their content, or of the statistics.
    """

    images: Tensor | None
    imported: Reference | None
    source: str
    origin: str
    count: int | None


def real_images(experiment: Experiment, imported: str | None) -> RealImages:
    """The run's training images, or the statistics in the file `imported`.

    Raises:
        FileNotFoundError, ValueError: no such images, or a file that holds no statistics of this network's width.
    """
    if imported is not None:
        path = Path(imported).expanduser().resolve()
        found = import_reference(path, experiment.feature_network)
        return RealImages(None, found, found.sha256, str(path), found.moments.count)
    experiment.data.setup()
    images = experiment.data.train_images
    origin = f"training images of {experiment.resolved['data'].get('_target_')}"
    return RealImages(images, None, content_hash(images), origin, len(images))


def statistics(experiment: Experiment, real: RealImages, choice: Choice, progress: Any) -> Reference:
    """What the scores of `choice` need of the real images, from the cache where it is there."""
    if real.imported is not None:
        return real.imported
    assert real.images is not None
    done: list[int] = []
    with progress.stage("reference", len(real.images), "images") as stage:

        def count(images: int) -> None:
            done.append(images)
            stage.advance(images)

        found = reference(
            experiment.feature_network,
            real.images,
            images_hash=real.source,
            cache=Path(experiment.paths.cache),
            keep_features=bool({"kid", "prc"} & set(choice.taken)),
            on_batch=count,
            say=progress.say,
        )
        stage.skip(len(real.images) - sum(done))  # what the cache had
    return found
