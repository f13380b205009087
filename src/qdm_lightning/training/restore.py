"""The networks of an earlier run, rebuilt from its folder: its teacher, and its student with the weights of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdm_lightning.base.files import file_hash, read_json
from qdm_lightning.metrics.weights import state_hash
from qdm_lightning.models.denoiser import Denoiser, denoiser
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.training.checkpoint_io import fill, fill_from_checkpoint, load_checkpoint
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.network_settings import KEY, check_settings, network_settings, quantization_settings
from qdm_lightning.training.student import prepare_student, student_settings
from qdm_lightning.training.student_files import FOLDER, read_student


@dataclass(frozen=True)
class Restored:
    """A network in eval mode, frozen, and `origin`: where its weights come from, and a `warning` where they could not be
    checked whole."""

    network: Denoiser
    origin: dict[str, Any]


def restore(experiment: Experiment, which: str, weights: str, checkpoint: str, device: torch.device) -> Restored:
    """`restore_teacher` or `restore_student`, by `which`."""
    if which == "student":
        return restore_student(experiment, device, weights=weights, checkpoint=checkpoint)
    if weights != "ema":
        raise ValueError("network=teacher keeps no raw weights, only its average: leave out weights=raw")
    return restore_teacher(experiment, device)


def restore_teacher(experiment: Experiment, device: torch.device) -> Restored:
    """The run's own copy of its teacher.

    Raises:
        FileNotFoundError: the run never got as far.
        ValueError: its files are damaged.
    """
    unet, folder = _teacher_unet(experiment), experiment.run_dir / "teacher"
    files = list((folder / "unet").glob("*.safetensors"))
    file = files[0] if len(files) == 1 else folder
    digest = file_hash(file) if file.is_file() else state_hash(unet)
    return _restored(unet, device, experiment, file, weights="ema", sha256=digest, step=None)


def restore_student(
    experiment: Experiment, device: torch.device, *, weights: str = "ema", checkpoint: str = "best"
) -> Restored:
    """The run's student. A run with `quant.mode=ptq` has no checkpoints: its student comes from its `student` folder.

    Args:
        experiment: that of the run, from its own configuration.
        weights: `ema` or `raw`.
        checkpoint: `best`, `last`, or a file.

    Raises:
        FileNotFoundError: no such checkpoint, or the run never got as far.
        ValueError: a full-precision run, which has no student, or a checkpoint that is damaged or another network's, by the
            settings that it carries or, where it is of an older version, by its names and shapes.
    """
    run_dir = experiment.run_dir
    if experiment.quant.is_float:
        raise ValueError(f"{run_dir} trained at 32 bits: it has no student, type network=teacher")
    student, _ = prepare_student(_teacher_unet(experiment), experiment)
    settings = student_settings(student, experiment)
    goes_on = "python -m qdm_lightning.train run=... goes on"
    if experiment.quant.mode == "ptq" and checkpoint == "best":
        _existing(run_dir / FOLDER, f"run={run_dir} has no student yet: {goes_on}")
        files = read_student(run_dir / FOLDER)
        state, warning = files.state(settings)
        path, weights, step, warnings = files.weights, "calibrated", 0, {"warning": warning} if warning else {}
        fill(student, state, path)
    else:
        path = Path(checkpoint).expanduser().resolve()
        if checkpoint in ("best", "last"):
            path = run_dir / "checkpoints" / f"{checkpoint}.ckpt"
            _existing(path, f"{path} is not there: the run was ended before its first checkpoint, {goes_on}")
        step, warnings = fill_from_checkpoint(student, path, settings, weights)
    return _restored(student, device, experiment, path, weights=weights, sha256=file_hash(path), step=step, **warnings)


def check_checkpoints(experiment: Experiment) -> None:
    """Raise UserError where a checkpoint in a run's folder is of another network than the run's, before it goes on with it."""
    config = experiment.run_dir / "teacher" / "unet" / "config.json"
    quantization = None if experiment.quant.is_float else quantization_settings(experiment.resolved)
    wanted = network_settings(read_json(config) if config.is_file() else {}, experiment.diffusion, quantization)
    for file in sorted((experiment.run_dir / "checkpoints").glob("*.ckpt")):
        try:
            checkpoint = load_checkpoint(file)
        except ValueError:
            continue  # damaged: whoever needs it says so
        check_settings(checkpoint.get(KEY), wanted, file)


def _teacher_unet(experiment: Experiment) -> nn.Module:
    hint = f"run={experiment.run_dir} has no teacher yet: train it to its end, python -m qdm_lightning.train run=..."
    return load_unet(_existing(experiment.run_dir / "teacher" / "unet", hint).parent)


def _existing(path: Path, hint: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(hint)
    return path


def _restored(unet: nn.Module, device: torch.device, experiment: Experiment, path: Path, **origin: Any) -> Restored:
    """The network, and its origin: the path of its file, inside the run folder where it lies there, and what else is known."""
    network = denoiser(unet.to(memory_format=torch.channels_last).to(device), experiment.diffusion).requires_grad_(False).eval()
    run_dir = experiment.run_dir
    file = path.relative_to(run_dir).as_posix() if path.is_relative_to(run_dir) else str(path)
    return Restored(network, {"file": file, **origin})
