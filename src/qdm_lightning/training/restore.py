"""The networks of an earlier run, rebuilt from its folder: its teacher, and its student with the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qdm_lightning.base.files import file_hash
from qdm_lightning.loggers import finish, named_loggers
from qdm_lightning.metrics.weights import state_hash
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.quantization import compiled
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.spec import TrainerConfig
from qdm_lightning.training.student import prepare_student
from qdm_lightning.training.student_files import FOLDER, WEIGHTS

PREFIXES = {"ema": "ema.module.unet.", "raw": "student.unet."}
"""Where a checkpoint keeps the student's averaged weights, and those of the optimizer."""


@dataclass(frozen=True)
class Restored:
    """A network in eval mode, frozen, and `origin`, a record of where its weights come from."""

    network: Denoiser
    origin: dict[str, Any]


def set_up(trainer: TrainerConfig) -> None:
    """Threads and compilation as a run's settings say; before any network runs."""
    if trainer.threads:
        torch.set_num_threads(trainer.threads)
    compiled.set_mode(trainer.compile)


def restore(experiment: Experiment, which: str, weights: str, checkpoint: str, device: torch.device) -> Restored:
    """`restore_teacher` or `restore_student`, by `which`."""
    if which == "teacher":
        if weights != "ema":
            raise ValueError("network=teacher keeps no raw weights, only its average: leave out weights=raw")
        return restore_teacher(experiment, device)
    return restore_student(experiment, device, weights=weights, checkpoint=checkpoint)


def restore_teacher(experiment: Experiment, device: torch.device) -> Restored:
    """The run's own copy of its teacher.

    Raises:
        FileNotFoundError: the run never got as far.
        ValueError: its files are damaged.
    """
    folder = experiment.run_dir / "teacher"
    unet = _teacher_unet(experiment)
    origin = {"file": "teacher", "weights": "ema", "sha256": state_hash(unet), "step": None}
    files = sorted((folder / "unet").glob("*.safetensors"))
    if len(files) == 1:
        origin |= {"file": files[0].relative_to(experiment.run_dir).as_posix(), "sha256": file_hash(files[0])}
    return Restored(_frozen(unet, device), origin)


def restore_student(
    experiment: Experiment, device: torch.device, *, weights: str = "ema", checkpoint: str = "best"
) -> Restored:
    """The run's student. A run with `quant.mode=ptq` has no checkpoints: its student comes from its `student` folder.

    Args:
        experiment: of the run, from its own configuration.
        weights: `ema` or `raw`.
        checkpoint: `best`, `last`, or a file.

    Raises:
        FileNotFoundError: no such checkpoint, or the run never got as far.
        ValueError: a full-precision run, which has no student, or a checkpoint that is damaged or another network's.
    """
    if experiment.quant.is_float:
        raise ValueError(f"{experiment.run_dir} trained at 32 bits: it has no student, type network=teacher")
    student, _ = prepare_student(_teacher_unet(experiment), experiment)
    student.to(memory_format=torch.channels_last)
    if experiment.quant.mode == "ptq" and checkpoint == "best":
        return _calibrated(student, experiment, device)
    path = _checkpoint_file(experiment, checkpoint)
    state = load_checkpoint(path)
    prefix = PREFIXES[weights]
    state_dict = state.get("state_dict", {})
    _fill(student, {n.removeprefix(prefix): value for n, value in state_dict.items() if n.startswith(prefix)}, path)
    origin = {"file": _name(path, experiment.run_dir), "weights": weights, "sha256": file_hash(path)}
    return Restored(_frozen(student, device), origin | {"step": int(state["global_step"])})


def _teacher_unet(experiment: Experiment) -> nn.Module:
    folder = experiment.run_dir / "teacher"
    if not (folder / "unet").is_dir():
        raise FileNotFoundError(
            f"run={experiment.run_dir} has no teacher yet: train it to its end, python -m qdm_lightning.train run=..."
        )
    return load_unet(folder)


def _checkpoint_file(experiment: Experiment, checkpoint: str) -> Path:
    if checkpoint not in ("best", "last"):
        return Path(checkpoint).expanduser().resolve()
    path = experiment.run_dir / "checkpoints" / f"{checkpoint}.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: the run was ended before its first checkpoint, python -m qdm_lightning.train run=... goes on"
        )
    return path


def _calibrated(student: nn.Module, experiment: Experiment, device: torch.device) -> Restored:
    """The student of a run without training steps."""
    path = experiment.run_dir / FOLDER / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"run={experiment.run_dir} has no student yet: python -m qdm_lightning.train run=... goes on")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    _fill(student, state, path)
    origin = {"file": _name(path, experiment.run_dir), "weights": "calibrated", "sha256": file_hash(path), "step": 0}
    return Restored(_frozen(student, device), origin)


def _fill(student: nn.Module, given: dict[str, Tensor], path: Path) -> None:
    """Load tensors that must be exactly the student's."""
    own = student.state_dict()
    wrong = sorted(set(own) ^ set(given)) + sorted(n for n in set(own) & set(given) if own[n].shape != given[n].shape)
    if wrong:
        raise ValueError(f"{path} is no checkpoint of this student: {len(wrong)} tensors do not fit, such as {wrong[0]}")
    student.load_state_dict(given)


def _frozen(unet: nn.Module, device: torch.device) -> Denoiser:
    moved = unet.to(memory_format=torch.channels_last).to(device)
    return Denoiser(moved).requires_grad_(False).eval()


def _name(path: Path, run_dir: Path) -> str:
    return path.relative_to(run_dir).as_posix() if path.is_relative_to(run_dir) else str(path)


@contextmanager
def run_loggers(experiment: Experiment) -> Iterator[list[Any]]:
    """The loggers that the experiment names (its metrics.csv aside), finished after the block."""
    loggers = named_loggers(experiment)
    try:
        yield loggers
    finally:
        finish(loggers)
