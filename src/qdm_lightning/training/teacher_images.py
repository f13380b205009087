"""The teacher's images, drawn once and shared by the runs that measure against them: those of a sweep, mostly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qdm_lightning.base.files import atomic_path
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.runs.provenance import environment
from qdm_lightning.training.evaluation import Measurer


def teacher_images(measurer: Measurer, teacher: Denoiser, progress: Any) -> Tensor:
    """The full-precision teacher's images of the experiment's seeds, (num_samples, C, H, W) float32 in [-1, 1] on the CPU.

    They are kept below `paths.cache`, by everything that their last bits depend on: weights, sampler, noise schedule, seeds,
    processor, threads, version of torch. Runs that draw them at the same time write the same file.
    """
    file = Path(measurer.experiment.paths.cache).expanduser() / "teacher_images" / f"{_key(measurer, teacher)}.safetensors"
    kept = _read(file, (len(measurer.seeds), *measurer.shape), progress)
    if kept is not None:
        progress.say(f"the teacher's images come from {file}")
        return kept
    images = measurer.draw(teacher, progress, "sampling (teacher)")
    with atomic_path(file) as beside:
        save_file({"images": images.contiguous()}, beside, metadata={"sha256": _digest(images)})
    return images


def _key(measurer: Measurer, teacher: Denoiser) -> str:
    e = measurer.experiment
    config = getattr(teacher.unet, "config", None)
    if isinstance(config, Mapping):  # of diffusers; `_` begins what tells where it came from
        config = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    where = environment(next(teacher.parameters()).device)
    del where["fake_quantization"]  # the teacher has none
    settings = [asdict(e.sampler), asdict(e.diffusion), e.resolved["model"], config, measurer.shape, measurer.seeds, where]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def _read(file: Path, shape: tuple[int, ...], progress: Any) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as archive:
            images, told = archive.get_tensor("images"), archive.metadata()
        if images.shape == shape and told["sha256"] == _digest(images):
            return images
    except (SafetensorError, KeyError, TypeError, OSError):  # the file is cut, of another kind, or without a checksum
        pass
    progress.say(f"{file} is damaged; the teacher's images are drawn again")
    return None


def _digest(images: Tensor) -> str:
    return hashlib.sha256(_bytes(images)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """Of the values in their logical order, whatever the memory format."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
