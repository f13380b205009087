"""Weights of L_NeM or timesteps drawn by them: whose gradient scatters less, on the digits' teacher and a student of it.

    python experiments/nem_weighting/draws.py RUN [--samples 12]

RUN is a folder of a digits run. With weights w(t) of mean 1 and n(t) = E || grad || ^2 of the gradient of one sample's L_NeM at
t, uniform draws have the second moment E w(t)^2 n(t), draws in proportion to w(t) have E w(t) n(t); their means are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from qdm_lightning.data.digits import load_digits
from qdm_lightning.diffusion.images import to_float
from qdm_lightning.diffusion.losses import per_sample_mse
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.propagation import at_every_timestep, error_propagation
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.diffusion.weighting import MinSNR, Propagation, Uniform
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.training.student_files import load_student
from qdm_lightning.training.teacher import ASSETS

DIFFUSION = DiffusionConfig()
TIMESTEPS = range(10, 1000, 40)


def main() -> None:
    """Print n(t), and both second moments for each weighting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=12)
    asked = parser.parse_args()
    teacher, student = (
        Denoiser(unet) for unet in (load_unet(ASSETS / "teacher_digits").eval(), load_student(asked.run).train())
    )
    images, scheduler, generator = to_float(load_digits()[0]), noise_scheduler(DIFFUSION), torch.Generator().manual_seed(0)
    parameters = list(student.requires_grad_().parameters())

    def squared_gradient(step: int) -> float:
        x0, t = images[torch.randint(len(images), (1,), generator=generator)], torch.tensor([step])
        x = add_noise(scheduler, x0, torch.randn(x0.shape, generator=generator), t)
        with torch.no_grad():
            eps = teacher(x, t)
        found = torch.autograd.grad(per_sample_mse(eps, student(x, t)).mean(), parameters, allow_unused=True)
        return sum(float(part.square().sum()) for part in found if part is not None)

    moments = torch.tensor([sum(squared_gradient(t) for _ in range(asked.samples)) / asked.samples for t in TIMESTEPS])
    print("t: n(t)  " + "  ".join(f"{t}: {float(n):.4f}" for t, n in zip(TIMESTEPS, moments, strict=True)))
    sampler = SamplerConfig(kind="ddim", steps=50, batch_size=128)
    s = at_every_timestep(
        error_propagation(teacher, sampler, DIFFUSION, shape=(1, 8, 8), seeds=range(128), points=20),
        DIFFUSION.num_train_timesteps,
    )
    for weighting in (Uniform(), Propagation(), MinSNR()):
        w = weighting(DIFFUSION, lambda: s)[list(TIMESTEPS)]
        weighted, drawn = float((w.square() * moments).mean()), float((w * moments).mean())
        print(
            f"{type(weighting).__name__}: uniform draws {weighted:.4f}, draws by w(t) {drawn:.4f}, ratio {drawn / weighted:.2f}"
        )


if __name__ == "__main__":
    main()
