"""What is measured: a network of a run, how its images are drawn, and their seeds in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qdm_lightning.diffusion.sampling import image_seeds, timesteps
from qdm_lightning.evaluation.chunks import data_hash
from qdm_lightning.evaluation.spec import EvaluationConfig, RestoreConfig, parse_seeds
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.training.devices import measuring_device, set_up
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.restore import Restored, restore


@dataclass(frozen=True)
class Plan:
    """What is measured: the network, how its images are drawn, and their seeds, chunk by chunk."""

    which: str
    restored: Restored
    image_sampler: ImageSampler
    seeds: list[int]
    chunks: list[list[int]]
    identity: dict[str, Any]


def identity(experiment: Experiment, which: str, origin: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """Everything that determines an image beside its seed and the machine."""
    settings = {name: experiment.resolved[name] for name in ("quant", "taq")} if which == "student" else {}
    return {
        "network": which,
        "weights": origin["weights"],
        "checkpoint_sha256": origin["sha256"],
        "settings_sha256": data_hash(settings),
        "sampler": asdict(experiment.sampler),
        "diffusion": asdict(experiment.diffusion),
        "shape": list(shape),
    }


def restored_sampler(experiment: Experiment, config: RestoreConfig) -> tuple[str, Restored, ImageSampler]:
    """Which network `config` means, that network, and a image_sampler with it."""
    set_up(experiment.trainer)
    device = measuring_device(config.accelerator)
    which = config.network or ("teacher" if experiment.quant.is_float else "student")
    restored = restore(experiment, which, config.weights, config.checkpoint, device)
    return which, restored, image_sampler(experiment, restored, device)


def image_sampler(experiment: Experiment, restored: Restored, device: torch.device) -> ImageSampler:
    """A image_sampler with a restored network, by the experiment's sampler. Raises ValueError for more steps than T."""
    timesteps(experiment.sampler, experiment.diffusion)
    unet: Any = restored.network.unet
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return ImageSampler(
        network=restored.network,
        sampler=experiment.sampler,
        diffusion=experiment.diffusion,
        shape=(unet.config.in_channels, height, width),
        device=device,
    )


def plan_evaluation(experiment: Experiment, config: EvaluationConfig) -> Plan:
    """Restore the network and divide the seeds. Raises FileNotFoundError, ValueError where run or settings forbid it."""
    which, restored, drawn_by = restored_sampler(experiment, config)
    if config.seeds is not None:
        seeds = parse_seeds(config.seeds)
    else:
        seed = experiment.seed if config.seed is None else config.seed
        seeds = image_seeds(seed, config.num_samples or experiment.num_samples)
    size = config.images_per_file(experiment.sampler.batch_size)
    chunks = [seeds[first : first + size] for first in range(0, len(seeds), size)]
    known = identity(experiment, which, restored.origin, drawn_by.shape)
    return Plan(which, restored, drawn_by, seeds, chunks, known)
