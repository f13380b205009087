"""The student: the teacher's copy, prepared for its bits and started from data."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qdm_lightning.diffusion.images import to_float
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.models.denoiser import denoiser
from qdm_lightning.quantization.calibration import calibrate
from qdm_lightning.quantization.preparation import prepare
from qdm_lightning.quantization.summary import QuantizationReport
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.network_settings import network_settings, quantization_settings, unet_config
from qdm_lightning.training.validation_set import spread_timesteps

CALIBRATION_BATCH = 64


def prepare_student(teacher: nn.Module, experiment: Experiment) -> tuple[nn.Module, QuantizationReport]:
    """A copy of the teacher's U-Net with quantized layers, not yet calibrated, and what got how many bits. Dropout is off."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return student, prepare(student, experiment.quant, experiment.quantizers)


def student_settings(student: nn.Module, experiment: Experiment) -> dict[str, Any]:
    """What shapes the student of a run, for its files of weights and for the comparison with them."""
    return network_settings(unet_config(student), experiment.diffusion, quantization_settings(experiment.resolved))


def calibration_timesteps(kind: str, count: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,) of a calibration set.

    `uniform`: spread evenly over all t (Q-Diffusion, arXiv 2302.04304). `normal`: N(0.4 T, T / 2), redrawn within [0, T)
    (PTQ4DM, arXiv 2211.15736: more of the steps near the image).
    """
    if kind == "uniform":
        return spread_timesteps(count, num_train_timesteps, generator)
    drawn = torch.randn(64 * count, generator=generator) * num_train_timesteps / 2 + 0.4 * num_train_timesteps
    inside = drawn[(drawn >= 0) & (drawn < num_train_timesteps)]
    return inside[:count].long()


def calibrate_student(student: nn.Module, experiment: Experiment, progress: Any) -> None:
    """Start every quantizer from training images noised at timesteps that cover all of the process."""
    generator = torch.Generator().manual_seed(experiment.seed)
    batches, images = experiment.quant.calibration_batches, experiment.data.train_images
    total = batches * CALIBRATION_BATCH
    t = calibration_timesteps(
        experiment.quant.calibration_timesteps, total, experiment.diffusion.num_train_timesteps, generator
    )
    pick = torch.randint(len(images), (total,), generator=generator)
    scheduler = noise_scheduler(experiment.diffusion)
    network = denoiser(student, experiment.diffusion).eval()
    classes = experiment.data.train_labels
    device = next(student.parameters()).device

    drawn = generator.get_state()
    passes = 1 if experiment.quant.channel_scales == "off" else 2

    with progress.stage("calibration", passes * batches, "batches") as stage:

        def run() -> None:
            generator.set_state(drawn)  # every pass the same noise
            for chosen, times in zip(pick.split(CALIBRATION_BATCH), t.split(CALIBRATION_BATCH), strict=True):
                x0 = to_float(images[chosen])
                x = add_noise(scheduler, x0, torch.randn(x0.shape, generator=generator), times)
                labels = [] if classes is None else [network.drop_labels(classes[chosen], generator).to(device)]
                network(x.to(device, memory_format=torch.channels_last), times.to(device), *labels)
                stage.advance(1)

        calibrate(student, run, experiment.calibrator(), seed=experiment.seed)
