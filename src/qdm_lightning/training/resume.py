"""Where training goes on: the last checkpoint, or the one before where that is damaged."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.files import atomic_path
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.checkpoints import BEST, LAST, STATE, best_loss

TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks")
"""What a checkpoint must hold beside its weights, where training goes on from it."""


@dataclass(frozen=True)
class ResumePoint:
    """Where training goes on: `file`, its `step`, and why it is not the last checkpoint (empty where it is)."""

    file: Path
    step: int
    warning: str = ""


def resume_point(checkpoints: Path) -> ResumePoint | None:
    """The last checkpoint in a folder, or the best, which is as old or older, where that one is damaged; None without a last.

    Raises:
        UserError: both are damaged.
    """
    last, best = checkpoints / LAST, checkpoints / BEST
    if not last.exists():
        return None
    try:
        return ResumePoint(last, _step(last))
    except ValueError as error:
        if not last.is_file():  # nor could it be written
            raise
        try:
            step = _step(best)
        except (ValueError, FileNotFoundError):
            raise UserError(f"{error}; nor is {BEST} sound: remove {checkpoints} to train from the start") from error
        return ResumePoint(best, step, f"{error}; training goes on from {BEST}, of step {step}")


def mend_best(checkpoints: Path, point: ResumePoint) -> str:
    """Where `best.ckpt` is damaged or gone, make it again from the checkpoint that training goes on from, if that is the best.

    Args:
        checkpoints: folder.
        point: where training goes on.

    Returns:
        What was done, for the record; empty where nothing was wrong.

    Raises:
        UserError: another one was the best, and is lost.
    """
    try:
        load_checkpoint(checkpoints / BEST)
        return ""
    except (ValueError, FileNotFoundError) as error:
        reached = load_checkpoint(point.file)
        if best_loss(reached) is None:  # none was validated yet
            return ""
        if reached["callbacks"].get(STATE, {}).get("step") != point.step:
            raise UserError(
                f"{error}; the best student is lost: remove {checkpoints} to train from the start, or measure the last one, "
                f"python -m qdm_lightning.evaluate run={checkpoints.parent} checkpoint=last"
            ) from error
        with atomic_path(checkpoints / BEST) as temporary:
            shutil.copyfile(point.file, temporary)
        return f"{error}; it is made again from {point.file.name}, which is the best"


def _step(file: Path) -> int:
    """Step of a checkpoint that training can go on from. Raises ValueError, FileNotFoundError."""
    checkpoint = load_checkpoint(file)
    missing = [name for name in TRAINING if name not in checkpoint]
    if missing:
        raise ValueError(f"{file} is no checkpoint to go on from: it has no {missing[0]}")
    return int(checkpoint["global_step"])
