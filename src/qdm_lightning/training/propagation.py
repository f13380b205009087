"""S(t) of a run: measured on its teacher with its sampler, and shared by the runs that have both in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from qdm_lightning.base.files import read_json, write_json
from qdm_lightning.base.ranks import rank
from qdm_lightning.diffusion.propagation import at_every_timestep, error_propagation, network_calls
from qdm_lightning.diffusion.sampling import image_seeds
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.models.spec import key_settings
from qdm_lightning.training.teacher_images import images_key

FILE = "propagation.json"
"""In the run's folder: {"t": [timesteps], "S": [squared deviation of the image for a unit of squared error]}."""

IMAGES, POINTS = 128, 20


def propagation(image_sampler: ImageSampler, model: Any, cache: Path, folder: Path, progress: Any) -> Tensor:
    """S(t), (T,) float64, from the run's folder, from the cache, or measured now; it is left in both.

    Args:
        image_sampler: draws with the teacher.
        model: resolved settings of the network.
        cache: folder of all caches.
        folder: the run's.
        progress: shows the stage.
    """
    seeds = image_seeds(0, IMAGES)
    own, shared = (
        folder / FILE,
        cache / "propagation" / f"{images_key(image_sampler, seeds, [key_settings(model), POINTS])}.json",
    )
    known = next((file for file in (own, shared) if file.is_file()), None)
    content = read_json(known, "delete it, and it is measured again") if known else _measured(image_sampler, seeds, progress)
    if not rank():
        for file in (own, shared):
            if file != known:
                write_json(file, content)
    measured = dict(zip(content["t"], content["S"], strict=True))
    return at_every_timestep(measured, image_sampler.diffusion.num_train_timesteps)


def _measured(image_sampler: ImageSampler, seeds: list[int], progress: Any) -> dict[str, Any]:
    s = image_sampler
    with progress.stage("error propagation", network_calls(s.sampler, s.diffusion, IMAGES, POINTS), "steps") as stage:
        measured = error_propagation(
            s.estimator,
            s.sampler,
            s.diffusion,
            shape=s.shape,
            seeds=seeds,
            labels=s.labels(seeds),
            points=POINTS,
            device=s.device,
            on_step=lambda: stage.advance(1),
        )
    return {"t": list(measured), "S": list(measured.values())}
