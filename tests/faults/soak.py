"""A soak in one process: many small sampling calls and many training steps, and nothing that grows.

`python tests/faults/soak.py` makes 2,000 calls and 10,000 steps of the smallest network, in minutes on one core, and prints
what it counted; status 1 where memory grew by more than 2 % or a handle, process, thread or temporary folder was left.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import torch

from qdm_lightning.data.digits import DigitsData
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig, SamplerConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.models.unet import build_unet
from qdm_lightning.quantization import MinMax, QuantConfig, calibrate, compiled, prepare
from qdm_lightning.quantization.preparation import Quantizers
from qdm_lightning.quantization.quantizer import LSQActivation, LSQWeight
from qdm_lightning.quantization.taq import EMANormalizedActivation
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.spec import OptimizerConfig, TrainerConfig
from qdm_lightning.training.trainer import fit
from qdm_lightning.training.validation_set import ValidationSet

ALLOWED = 0.02
"""Growth of the resident memory between the second tenth of the work and its end."""

FITS = 10
"""Trainings that the steps are shared among: each starts a trainer, loggers and checkpoints of its own."""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def left() -> dict[str, int]:
    """What a call may leave behind, by its kind."""
    gc.collect()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    handles = len(os.listdir("/proc/self/fd"))
    return {
        "handles": handles,
        "processes": len(children),
        "threads": threading.active_count(),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
    }


def smallest() -> DiffusionModule:
    """A calibrated W4A4 student with TaQ's tables, and its teacher, of one level of 4 channels."""
    torch.manual_seed(0)
    network = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [4],
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
    }
    teacher, student = build_unet(**network), build_unet(**network)
    student.load_state_dict(teacher.state_dict())
    prepare(
        student,
        QuantConfig(weight_bits=4, act_bits=4),
        Quantizers.with_taq(LSQWeight, LSQActivation, EMANormalizedActivation, "attention"),
    )
    calibrate(student, lambda: Denoiser(student)(torch.randn(100, 1, 8, 8), torch.arange(100) * 10), MinMax())
    return DiffusionModule(
        student,
        teacher,
        diffusion=DiffusionConfig(),
        nem=NeMConfig(),
        optimizer=OptimizerConfig(),
        max_steps=1,
        seed=0,
        flip=False,
    )


def train(folder: Path, steps: int) -> None:
    """A training of its own, with validations, checkpoints and all callbacks."""
    module, data = smallest(), DigitsData(batch_size=4)
    module.max_steps = steps
    data.setup()
    stage = SimpleNamespace(skip=lambda n: None, advance=lambda n, **fields: None)
    config = TrainerConfig(max_steps=steps, val_every=max(steps // 4, 1), val_images=16, accelerator="cpu", devices=1)
    fit(
        module,
        data,
        ValidationSet.from_images(data.val_images, 1000, 16),
        config,
        folder=folder,
        stage=stage,
        loggers=[],
        callbacks=[],
    )


def sample(count: int) -> None:
    """`count` calls of two images in two steps."""
    module = smallest()
    drawn_by = ImageSampler(
        network=Denoiser(module.student.unet).eval(),
        sampler=SamplerConfig(steps=2, batch_size=2),
        diffusion=DiffusionConfig(),
        shape=(1, 8, 8),
        device=torch.device("cpu"),
    )
    for call in range(count):
        drawn_by.draw([2 * call, 2 * call + 1])


def soak(calls: int, steps: int) -> tuple[list[int], dict[str, int], dict[str, int]]:
    """Resident memory after each tenth of the work, and what was left after the first one and at the end."""
    memory, before = [], {}
    for tenth in range(FITS):
        sample(calls // FITS)
        with tempfile.TemporaryDirectory() as folder:
            train(Path(folder), steps // FITS)
        memory.append(resident())
        before = before or left()
        print(f"tenth {tenth + 1}: {memory[-1] / 2**20:.1f} MiB {left()}", flush=True)
    return memory, before, left()


def main() -> None:
    """Print the counts; status 1 where something grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    compiled.set_mode("off")
    with tempfile.TemporaryDirectory() as own:  # where nobody else's files come and go
        tempfile.tempdir = own
        memory, before, after = soak(args.calls, args.steps)
        tempfile.tempdir = None
    growth = max(memory[1:]) / memory[1] - 1
    grown = {kind: count - before[kind] for kind, count in after.items() if count > before[kind]}
    print(f"{args.calls} sampling calls, {args.steps} steps: memory +{100 * growth:.2f} %, left behind: {grown or 'nothing'}")
    sys.exit(growth > ALLOWED or bool(grown))


if __name__ == "__main__":
    main()
