"""Integer execution against the simulation over many images: digits by default, or a diffusers folder's network.

    python experiments/integer/verify.py [--images 2048] [--steps 50] [--bits 2 3 4 8] [--taq off ema scale normalize]
    python experiments/integer/verify.py --teacher FOLDER --images 512

For each student, calibrated and not trained: layer by layer, outputs from the same codes and codes from the same activation;
then image by image, by the same seeds, the mean squared deviation of integer from simulated images, beside that of a simulation
whose every layer input is moved by one rounding of float32; and the Frechet distances of all three to the real images (digits'
features; for another teacher, pixels averaged to 4x4, to its own images), with the deviation of their halves as sampling error.
`--student RUN` takes a trained one from a run's folder.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.data.digits import load_digits
from qdm_lightning.diffusion.images import to_float, to_uint8
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.sampling import sample
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.integer import provenance, to_integer, verify
from qdm_lightning.metrics.digits import DigitsFeatures
from qdm_lightning.metrics.frechet import frechet_distance
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.quantization import (
    EMANormalizedActivation,
    GroupedActivation,
    LSQActivation,
    LSQWeight,
    MSESearch,
    NormalizedActivation,
    QuantConfig,
    Quantizers,
    cached_weights,
    calibrate,
    compiled,
    prepare,
)
from qdm_lightning.quantization.layers import QuantizedLayer
from qdm_lightning.quantization.spec import SCOPES
from qdm_lightning.training.student_files import load_student
from qdm_lightning.training.teacher import ASSETS

TAQ = {"off": None, "ema": EMANormalizedActivation, "scale": GroupedActivation, "normalize": NormalizedActivation}
WIDTHS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w3a3": (3, 3), "w2a2": (2, 2)}
DIFFUSION = DiffusionConfig()


def calibrated(teacher: nn.Module, images: Tensor, width: str, taq: str, scope: str) -> Denoiser:
    unet: Any = copy.deepcopy(teacher).eval()
    weight_bits, act_bits = WIDTHS[width]
    quantizers = Quantizers.with_taq(LSQWeight, LSQActivation, TAQ[taq], scope)
    prepare(unet, QuantConfig(weight_bits=weight_bits, act_bits=act_bits), quantizers)
    network = Denoiser(unet.to(memory_format=torch.channels_last)).eval()
    generator = torch.Generator().manual_seed(0)
    scheduler = noise_scheduler(DIFFUSION)

    def run() -> None:
        for part in range(4):
            t = (torch.arange(part, 1000, 8) + torch.randint(2, (125,), generator=generator)).clamp(max=999)
            x0 = to_float(images[torch.randint(len(images), (len(t),), generator=generator)])
            x = add_noise(scheduler, x0, torch.randn(x0.shape, generator=generator), t)
            network(x.contiguous(memory_format=torch.channels_last), t)

    calibrate(network, run, MSESearch())
    return network


def draw(network: nn.Module, count: int, steps: int, batch: int) -> Tensor:
    config = next(m.config for m in network.modules() if hasattr(m, "config"))
    sampler = SamplerConfig(kind="ddim", steps=steps, batch_size=batch)
    shape = (config.in_channels, config.sample_size, config.sample_size)
    with torch.no_grad(), cached_weights(network):
        return sample(network, sampler, DIFFUSION, shape=shape, seeds=list(range(count)), device=torch.device("cpu"))


@contextmanager
def shaken(network: nn.Module) -> Iterator[None]:
    """Within the block every layer's input is moved by one rounding, up or down by chance."""
    generator = torch.Generator().manual_seed(1)

    def shake(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        way = torch.randint(2, x.shape, generator=generator, dtype=torch.int8) * 2.0 - 1
        return (torch.nextafter(x, x + way), *inputs[1:])

    handles = [m.register_forward_pre_hook(shake) for m in network.modules() if isinstance(m, QuantizedLayer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers(simulated: nn.Module, integer: nn.Module, images: Tensor) -> dict[str, Any]:
    """The worst of `verify` over a batch of noised images at different timesteps."""
    t = torch.tensor([20, 250, 500, 750, 980]).repeat(4)
    x0 = to_float(images[: len(t)])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    x = add_noise(noise_scheduler(DIFFUSION), x0, noise, t).contiguous(memory_format=torch.channels_last)
    found = verify(simulated, integer, lambda network: network(x, t))
    products = [one for one in found if not one.codes]
    rest = [one for one in found if one.codes]
    return {
        "layers": len(found),
        "error": max(one.error for one in rest),
        "flipped": sum(one.flipped for one in rest) / sum(one.codes for one in rest),
        "farthest": max(one.farthest for one in rest),
        "attention_error": max((one.error for one in products), default=None),
    }


def compare(
    simulated: nn.Module, options: argparse.Namespace, real: Tensor, features: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    integer, report = to_integer(simulated)
    found = {"float_layers": len(report.float_layers), **layers(simulated, integer, real)}
    with shaken(simulated):
        moved = draw(simulated, options.images, options.steps, options.batch)
    images = {
        "simulated": draw(simulated, options.images, options.steps, options.batch),
        "shaken": moved,
        "integer": draw(integer, options.images, options.steps, options.batch),
    }
    target = features(real)
    for name, own in images.items():
        rows = features(to_uint8(own))
        found[f"distance_{name}"] = frechet_distance(rows, target)
        if name == "simulated":
            half = len(rows) // 2
            halves = [frechet_distance(part, target) for part in (rows[:half], rows[half:])]
            found["distance_sampling_error"] = abs(halves[0] - halves[1]) / 2
        else:
            deviation = (own - images["simulated"]).square().flatten(1).mean(1)
            found[f"mse_{name}"] = deviation.mean().item()
            found[f"mse_{name}_median"] = deviation.median().item()
            found[f"same_pixels_{name}"] = (to_uint8(own) == to_uint8(images["simulated"])).float().mean().item()
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}


def pooled(images: Tensor) -> Tensor:
    """Pixels averaged to 4x4, (N, 16 C)."""
    return F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--widths", nargs="*", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--taq", nargs="*", default=list(TAQ), choices=list(TAQ))
    parser.add_argument("--scope", default="qkv", choices=SCOPES)
    parser.add_argument("--teacher", type=Path, help="a diffusers folder; None: the digits that ship with the package")
    parser.add_argument("--student", type=Path, help="a run's folder, whose trained student is compared")
    options = parser.parse_args()
    compiled.set_mode("on")
    teacher = load_unet(ASSETS / "teacher_digits" if options.teacher is None else options.teacher).eval()
    if options.teacher is None:
        real, features = load_digits()[0], DigitsFeatures()
    else:
        real, features = to_uint8(draw(Denoiser(teacher).eval(), 512, 20, options.batch)), pooled
    print(json.dumps({**provenance(), "images": options.images, "steps": options.steps, "teacher": str(options.teacher)}))
    if options.student is not None:
        student = Denoiser(load_student(options.student)).eval()
        print(json.dumps({"student": options.student.name, **compare(student, options, real, features)}), flush=True)
        return
    for width in options.widths:
        for taq in options.taq:
            student = calibrated(teacher, real, width, taq, options.scope)
            found = compare(student, options, real, features)
            print(json.dumps({"width": width, "taq": taq, "scope": options.scope, **found}), flush=True)


if __name__ == "__main__":
    main()
