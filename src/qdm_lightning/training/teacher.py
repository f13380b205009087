"""The full-precision teacher: trained once and cached, or taken from a run or a diffusers folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from qdm_lightning.base.files import atomic_path, write_json
from qdm_lightning.base.ranks import rank
from qdm_lightning.diffusion.spec import NeMConfig
from qdm_lightning.models.diffusers_io import load_diffusion, load_unet, save_pipeline
from qdm_lightning.training.callbacks import StageProgress
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.spec import OptimizerConfig
from qdm_lightning.training.trainer import fit
from qdm_lightning.training.validation_set import ValidationSet

FORMAT = 1
"""Raised when the way of training changes, so that older cached teachers are not taken for new ones."""


def teacher_key(experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """A short hash, and the settings behind it: everything that determines an `auto` teacher."""
    settings = {
        "format": FORMAT,
        "data": experiment.data.fingerprint(),
        "batch_size": experiment.data.batch_size,
        "flip": experiment.data.flip,
        "model": experiment.resolved["model"],
        "diffusion": asdict(experiment.diffusion),
        "teacher": asdict(experiment.teacher),
        "precision": experiment.trainer.precision,
        "val_every": experiment.trainer.val_every,
        "val_images": experiment.trainer.val_images,
    }
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16], settings


def obtain_teacher(
    experiment: Experiment, validation: ValidationSet, progress: Any, loggers: list[Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher's U-Net, in eval mode, and a record of where it comes from. A copy is left in `<run>/teacher`.

    Raises:
        FileNotFoundError, ValueError: no teacher at `teacher.path`, or one that does not fit the data.
    """
    kept = experiment.run_dir / "teacher"
    config = experiment.teacher
    origin = kept / "origin.json"
    if experiment.resume and (kept / "unet").is_dir():
        return load_unet(kept), json.loads(origin.read_text("utf-8")) if origin.is_file() else {"source": str(kept)}
    record: dict[str, Any]
    if config.source == "auto":
        unet, record = _cached(experiment, validation, progress, loggers)
    else:
        assert config.path is not None
        unet = (
            _from_checkpoint(experiment, Path(config.path).expanduser())
            if config.source == "checkpoint"
            else load_unet(config.path)
        )
        record = {"source": config.source, "path": str(config.path)}
    _check_shape(experiment, unet)
    save_pipeline(unet, experiment.diffusion, kept)
    write_json(origin, record)
    return unet.eval(), record


def _cached(
    experiment: Experiment, validation: ValidationSet, progress: Any, loggers: list[Any]
) -> tuple[nn.Module, dict[str, Any]]:
    key, settings = teacher_key(experiment)
    root = Path(experiment.paths.cache).expanduser() / "teachers"
    root.mkdir(parents=True, exist_ok=True)
    folder, work, leader = root / key, root / f"{key}.work", root / f"{key}.leader"
    if rank():
        _follow(experiment, folder, leader, lambda: _train(experiment, validation, work / "checkpoints", progress, loggers))
    with _locked(root / f"{key}.lock", progress):
        trained = not (folder / "teacher.json").is_file()
        if trained:
            with atomic_path(leader) as beside:
                beside.write_text(str(experiment.run_dir), "utf-8")
            fitted = _train(experiment, validation, work / "checkpoints", progress, loggers)
            staged = work / "publish"
            shutil.rmtree(staged, ignore_errors=True)
            save_pipeline(fitted.pop("unet"), experiment.diffusion, staged)
            write_json(staged / "teacher.json", {"key": key, "settings": settings, **fitted})
            shutil.rmtree(folder, ignore_errors=True)
            staged.rename(folder)
            shutil.rmtree(work)
            leader.unlink()
    record = json.loads((folder / "teacher.json").read_text("utf-8"))
    return load_unet(folder), {"source": "auto", "key": key, "trained_now": trained, "val_loss": record["val_loss"]}


def _follow(experiment: Experiment, folder: Path, leader: Path, train: Callable[[], Any]) -> None:
    """In all ranks but the first: train the teacher if the first rank of this run does, and wait if another run's does.

    The first rank alone holds the lock, and says in the file `leader` which run that is: ranks that were started by
    themselves, as on another node, would else train while their first rank waits, and it would never join them.
    """
    while not (folder / "teacher.json").is_file():
        if leader.is_file() and leader.read_text("utf-8") == str(experiment.run_dir):
            train()
            return
        time.sleep(0.2)


@contextmanager
def _locked(file: Path, progress: Any) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say("waiting for the teacher, which another run trains")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _train(
    experiment: Experiment, validation: ValidationSet, folder: Path, progress: Any, loggers: list[Any]
) -> dict[str, Any]:
    config = experiment.teacher
    torch.manual_seed(config.seed)
    module = DiffusionModule(
        experiment.build_model().to(memory_format=torch.channels_last),
        None,
        diffusion=experiment.diffusion,
        nem=NeMConfig(mode="off"),
        optimizer=OptimizerConfig(
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
            ema_decay=config.ema_decay,
            gradient_clip=config.gradient_clip,
        ),
        max_steps=config.max_steps,
        seed=config.seed,
        flip=experiment.data.flip,
        prefix="teacher/",
    )
    with progress.stage("teacher", config.max_steps, "steps") as stage:
        fitted = fit(
            module,
            experiment.data,
            validation,
            experiment.trainer,
            folder=folder,
            max_steps=config.max_steps,
            seed=config.seed,
            loggers=loggers,
            callbacks=[StageProgress(stage)],
        )
    return {**fitted, "unet": module.ema_student.unet}


def _from_checkpoint(experiment: Experiment, path: Path) -> nn.Module:
    """A run of ours (its `teacher` folder), or a checkpoint file of a full-precision run."""
    if path.is_dir():
        if not (path / "teacher").is_dir():
            raise FileNotFoundError(f"teacher.path={path} has no teacher folder: give the folder of a run, or a .ckpt file")
        return load_unet(path / "teacher")
    state = load_checkpoint(path)["state_dict"]
    prefix = "ema.module.unet."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    unet = experiment.build_model()
    missing = sorted(set(unet.state_dict()) ^ set(weights))
    if missing:
        raise ValueError(
            f"teacher.path={path} is no checkpoint of this model: {len(missing)} names differ, such as {missing[0]}"
        )
    unet.load_state_dict(weights)
    return unet


def check_schedule(experiment: Experiment) -> None:
    """A teacher that was trained on another noise schedule would mislead the student.

    Raises:
        FileNotFoundError, ValueError: no teacher at `teacher.path`, or one of another schedule.
    """
    path = experiment.teacher.path
    if path is None or (experiment.resume and (experiment.run_dir / "teacher" / "unet").is_dir()):
        return
    place = path
    if experiment.teacher.source == "checkpoint":
        folder = Path(path).expanduser()
        run = folder if folder.is_dir() else folder.absolute().parents[1]  # <run>/checkpoints/<file>
        if not (run / "teacher").is_dir():
            return
        place = str(run / "teacher")
    ours = asdict(experiment.diffusion)
    different = {k: v for k, v in (load_diffusion(place) or {}).items() if ours.get(k) != v}
    if different:
        say = " ".join(f"diffusion.{k}={v}" for k, v in different.items())
        raise ValueError(f"teacher.path={path} was trained on another noise schedule: type {say}")


def _check_shape(experiment: Experiment, unet: Any) -> None:
    channels, size = experiment.data.channels, experiment.data.image_size
    if (unet.config.in_channels, unet.config.sample_size) != (channels, size):
        wanted = f"{unet.config.in_channels} channel(s) of {unet.config.sample_size} pixels"
        raise ValueError(
            f"the teacher takes {wanted}, the data have {channels} of {size}: choose other data, "
            f"for example data=images data.image_size={unet.config.sample_size}"
        )
