"""Samplers on the digits teacher: `python experiments/samplers/table.py [seeds]`; 1,024 images for each seed and row.

`fd_digits` is that of the package's own runs: images of `image_seeds(seed, 1024)` against the training images.
"""

from __future__ import annotations

import sys

import torch

from qdm_lightning.data.digits import DigitsData
from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.diffusion.sampling import image_seeds
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.metrics.digits import DigitsFeatures
from qdm_lightning.metrics.frechet import features, frechet_distance
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.training.teacher import ASSETS

SOLVERS = {"dpmsolver": "DPMSolverMultistep", "unipc": "UniPCMultistep", "heun": "HeunDiscrete"}
ROWS = [
    *((steps, "ddim", "") for steps in (50, 20, 10)),
    *((steps, "dpmsolver", spacing) for spacing in ("trailing", "leading") for steps in (20, 10)),
    *((steps, "unipc", "trailing") for steps in (20, 10)),
    *((steps, "heun", "trailing") for steps in (10, 5)),
]


def sampler(steps: int, name: str, spacing: str) -> SamplerConfig:
    """As `sampler=<name> sampler.steps=<steps> sampler.scheduler.timestep_spacing=<spacing>`."""
    if name == "ddim":
        return SamplerConfig(steps=steps)
    scheduler = {"_target_": f"diffusers.{SOLVERS[name]}Scheduler", "timestep_spacing": spacing}
    return SamplerConfig(kind="diffusers", steps=steps, scheduler=scheduler)


def main(seeds: list[int]) -> None:
    """Print the table."""
    teacher = Denoiser(load_unet(ASSETS / "teacher_digits").to(memory_format=torch.channels_last)).eval()
    feature_network, data = DigitsFeatures(), DigitsData()
    data.prepare_data()
    data.setup("fit")
    real = features(feature_network, data.train_images)
    print("| sampler | steps | calls of the network | `fd_digits` |\n|---|---|---|---|")
    for row in ROWS:
        drawn_by = ImageSampler(
            network=teacher,
            sampler=sampler(*row),
            diffusion=DiffusionConfig(),
            shape=(1, 8, 8),
            device=torch.device("cpu"),
        )
        found = []
        for seed in seeds:
            images = to_uint8(drawn_by.draw(image_seeds(seed, 1024)))
            found.append(frechet_distance(real, features(feature_network, images)))
        values = torch.tensor(found)
        spread = f" ± {values.std():.2f}" if len(found) > 1 else ""
        steps, name, spacing = row
        print(f"| `{name}` {spacing} | {steps} | {drawn_by.steps(128)} | {values.mean():.2f}{spread} |", flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [0, 1, 2])
