"""Which timesteps a student's distance comes from: the student estimates the noise in one range of t, the teacher elsewhere.

    python experiments/ablation_digits_scale/parts.py RUN [--images 2048] [--ranges 0,1000 0,100 100,400 ...]

RUN is a folder of a digits run. For each range, of DDIM-50 images: `fd_digits`, their distance to the teacher's images in place
of real ones, `fd_digits` once they are rounded to the 17 gray levels that real ones have, their mean squared deviation from the
teacher's by the same seeds, and how much less they scatter (difference of the standard deviations of their values in [-1, 1]).
`--spread` also draws with the student's estimates stretched, at each t, to the teacher's standard deviation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from qdm_lightning.data.digits import load_digits
from qdm_lightning.diffusion.images import to_float, to_uint8
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.sampling import timesteps
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.metrics.digits import DigitsFeatures
from qdm_lightning.metrics.frechet import features, frechet_distance
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.quantization import cached_weights
from qdm_lightning.training.student_files import load_student
from qdm_lightning.training.teacher import ASSETS

DIFFUSION, SAMPLER = DiffusionConfig(), SamplerConfig(kind="ddim", steps=50, batch_size=256)


class Parts(nn.Module):
    """The student from timestep `low` up to, without, `high`, its estimate times `stretch[t]`; the teacher elsewhere."""

    def __init__(self, student: nn.Module, teacher: nn.Module, low: int, high: int, stretch: dict[int, float]) -> None:
        super().__init__()
        self.student, self.teacher, self.low, self.high, self.stretch = student, teacher, low, high, stretch

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        step = int(t[0])
        if not self.low <= step < self.high:
            return self.teacher(x, t)
        return self.student(x, t) * self.stretch.get(step, 1.0)


@torch.no_grad()
def spreads(student: nn.Module, teacher: nn.Module, images: Tensor) -> dict[int, float]:
    """By timestep of the sampler, the standard deviation of the teacher's estimates over that of the student's."""
    generator, scheduler, found = torch.Generator().manual_seed(0), noise_scheduler(DIFFUSION), {}
    with cached_weights(student):
        for step in map(int, timesteps(SAMPLER, DIFFUSION)):
            x0 = to_float(images[torch.randint(len(images), (256,), generator=generator)])
            t = torch.full((256,), step)
            x = add_noise(scheduler, x0, torch.randn(x0.shape, generator=generator), t)
            found[step] = float(teacher(x, t).std() / student(x, t).std())
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--ranges", nargs="*", default=["0,1000", "0,100", "100,400", "400,700", "700,1000"])
    parser.add_argument("--spread", action="store_true")
    asked = parser.parse_args()
    real, network = load_digits()[0], DigitsFeatures()
    wanted = features(network, real)
    teacher, student = (
        Denoiser(unet.to(memory_format=torch.channels_last)).eval()
        for unet in (load_unet(ASSETS / "teacher_digits"), load_student(asked.run))
    )

    def draw(parts: Parts) -> Tensor:
        one = ImageSampler(network=parts, sampler=SAMPLER, diffusion=DIFFUSION, shape=(1, 8, 8), device=torch.device("cpu"))
        return one.draw(range(asked.images))

    levels = real.unique()

    def distances(images: Tensor, teachers: Tensor) -> str:
        seen = to_uint8(images)
        rounded = levels[(seen[..., None].int() - levels.int()).abs().argmin(-1)]
        pairs = (wanted, seen), (features(network, to_uint8(teachers)), seen), (wanted, rounded)
        return " | ".join(f"{frechet_distance(to, features(network, drawn)):.3f}" for to, drawn in pairs)

    own = draw(Parts(student, teacher, 0, 0, {}))
    print("the student at t from, to | fd_digits | to the teacher's | rounded | image_mse | standard deviation")
    print(f"nowhere | {distances(own, own)} | |")
    ranges = [(low, high, {}) for low, high in (map(int, pair.split(",")) for pair in asked.ranges)]
    if asked.spread:
        ranges.append((0, DIFFUSION.num_train_timesteps, spreads(student, teacher, real)))
    for low, high, stretch in ranges:
        images = draw(Parts(student, teacher, low, high, stretch))
        deviation, scatter = float((images - own).square().mean()), float(images.std() - own.std())
        name = f"{low}, {high}{', stretched' if stretch else ''}"
        print(f"{name} | {distances(images, own)} | {deviation:.5f} | {scatter:+.4f}", flush=True)


if __name__ == "__main__":
    main()
