"""What a run measures at its end: distances, the student's deviation from its teacher, and where in t it errs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.diffusion.losses import per_sample_mse
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.sampling import image_seeds, sample, timesteps
from qdm_lightning.metrics.frechet import features, frechet_distance, frechet_key, halves_distance
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.validation_set import ValidationSet


class Measurer:
    """Samples and scores networks of one experiment, all from the same seeds against the same real images."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.real = features(experiment.feature_network, experiment.data.train_images)
        self.key = frechet_key(experiment.feature_network)

    def floor(self) -> dict[str, float]:
        """Distance between two halves of the real images."""
        return {self.key: halves_distance(self.real)}

    @property
    def seeds(self) -> list[int]:
        """Of the images that the experiment measures."""
        return image_seeds(self.experiment.seed, self.experiment.num_samples)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        data = self.experiment.data
        return data.channels, int(data.image_size or 0), int(data.image_size or 0)

    def draw(self, network: Callable[[Tensor, Tensor], Tensor], progress: Any, name: str) -> Tensor:
        """Images of the experiment's seeds, (num_samples, C, H, W) float32 in [-1, 1] on the CPU."""
        e, seeds = self.experiment, self.seeds
        rounds = -(-len(seeds) // e.sampler.batch_size) * len(timesteps(e.sampler, e.diffusion))
        device = next(network.parameters()).device  # type: ignore[attr-defined]
        with progress.stage(name, rounds, "steps") as stage:
            return sample(
                network, e.sampler, e.diffusion, shape=self.shape, seeds=seeds, device=device, on_step=lambda: stage.advance(1)
            )

    def distance(self, images: Tensor) -> dict[str, float]:
        """Frechet distance of float images to the real training images, by its key."""
        return {self.key: frechet_distance(self.real, features(self.experiment.feature_network, to_uint8(images)))}


@torch.no_grad()
def nem_error(
    student: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], Tensor],
    validation_set: ValidationSet,
    experiment: Experiment,
    device: torch.device,
) -> list[float]:
    """L_NeM on the held-out set by bucket of t, from t = 0 up."""
    scheduler = noise_scheduler(experiment.diffusion)
    errors = []
    for x0, t, eps in validation_set.batches(experiment.sampler.batch_size):
        x = add_noise(scheduler, x0, eps, t).to(device, memory_format=torch.channels_last)
        errors.append(per_sample_mse(teacher(x, t.to(device)), student(x, t.to(device))).cpu())
    return validation_set.by_bucket(torch.cat(errors))
