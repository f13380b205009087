"""The full-precision teacher: shipped, trained once and cached, or taken from a run or a diffusers folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import nn

from qdm_lightning.base.checks import one_line
from qdm_lightning.base.checksums import remove_checked
from qdm_lightning.base.files import atomic_folder, data_hash, read_json, remove_leftovers, sha256, write_json, write_whole
from qdm_lightning.base.ranks import rank
from qdm_lightning.diffusion.spec import NeMConfig
from qdm_lightning.models.denoiser import check_channels
from qdm_lightning.models.diffusers_io import load_diffusion, load_unet, save_pipeline
from qdm_lightning.models.spec import PretrainedConfig, check_classes, key_settings
from qdm_lightning.models.unet import label_rows
from qdm_lightning.training.checkpoint_io import fill_from_checkpoint
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.network_settings import network_settings, unet_config
from qdm_lightning.training.resume import mend_best, resume_point
from qdm_lightning.training.spec import TEACHER_OPTIMIZER, OptimizerConfig
from qdm_lightning.training.student import prepare_student

FORMAT = 2
"""Raised when the way of training changes, so that older cached teachers are not taken for new ones."""

ASSETS = Path(__file__).parent / "assets"
"""Teachers that come with the package, each a folder as in the cache; experiments/embedded/teacher.py makes one."""

FITTED = "teacher.json"
"""File of a cached or shipped teacher: its key, the settings behind it, what its training came to. Its last file."""

Fit = Callable[[DiffusionModule, Path], Mapping[str, Any]]
"""fit(module, folder of checkpoints): trains the module and returns what `trainer.fit` returns."""


def teacher_key(experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """A short hash, and the settings behind it: everything that determines an `auto` teacher."""
    settings = {
        "format": FORMAT,
        "data": experiment.data.fingerprint(),
        **({"labels": experiment.data.labels_fingerprint()} if experiment.data.labelled else {}),
        "batch_size": experiment.data.batch_size,
        "flip": experiment.data.flip,
        "model": key_settings(experiment.resolved["model"]),
        "diffusion": experiment.diffusion.settings(),
        "teacher": {name: value for name, value in asdict(experiment.teacher).items() if name != "retrain"},
        "precision": experiment.trainer.precision,
        "val_every": experiment.trainer.val_every,
        "val_images": experiment.trainer.val_images,
    }
    return data_hash(settings)[:16], settings


def obtain_teacher(experiment: Experiment, fit: Fit, say: Callable[[str], None]) -> tuple[UNet2DModel, dict[str, Any]]:
    """The teacher's U-Net, in eval mode, and its origin, which says where it comes from. A copy is left in `<run>/teacher`.

    Raises:
        FileNotFoundError, ValueError: no teacher at `teacher.path`, or one that does not fit the data.
    """
    own, config = experiment.run_dir / "teacher", experiment.teacher
    if experiment.has_teacher:
        file, again = own / "origin.json", f"remove {own} to take the teacher from its source again"
        return _nameless(load_unet(own, again)), read_json(file, again) if file.exists() else {"source": str(own)}
    origin: dict[str, Any] = {"source": config.source, "path": str(config.path)}
    unet, warnings = _given(experiment)
    if unet is None:
        unet, origin = _auto(experiment, fit, say)
    origin |= warnings
    _check_shape(experiment, unet)
    if without := without_schedule(experiment):
        taken = " ".join(f"diffusion.{k}={v}" for k, v in experiment.diffusion.settings().items())
        origin["warning"] = f"{without} has no scheduler beside it: its noise schedule was taken to be {taken}"
    if "warning" in origin:
        say(f"warning: {origin['warning']}")
    _nameless(unet)
    if not rank():  # else a rank would write into the folder that another one replaces
        with atomic_folder(own) as new:  # its origin appears with it
            save_pipeline(unet, experiment.diffusion, new)
            write_json(new / "origin.json", origin)
    return unet.eval(), origin


def _nameless(unet: UNet2DModel) -> UNet2DModel:
    """Without the path that it was loaded from, which diffusers would write into every copy, the student's too."""
    unet.register_to_config(_name_or_path="")
    return unet


def _auto(experiment: Experiment, fit: Fit, say: Callable[[str], None]) -> tuple[UNet2DModel, dict[str, Any]]:
    """The teacher of these settings: the package's, or the cache's, where it is trained first if it is not there."""
    key, settings = teacher_key(experiment)
    assets = [] if experiment.teacher.retrain else sorted(ASSETS.glob(f"*/{FITTED}"))
    shipped = [file.parent for file in assets if read_json(file)["key"] == key]
    folder, trained = (shipped[0], False) if shipped else _cached(experiment, key, settings, fit, say)
    fitted = read_json(folder / FITTED)
    trained |= experiment.resume and fitted.get("trained_by") == _name(experiment)  # before this run was interrupted
    origin = {"source": "auto", "key": key, "trained_now": trained, "val_loss": fitted["val_loss"]}
    return load_unet(folder), {**origin, "shipped": True} if shipped else origin


def _cached(
    experiment: Experiment, key: str, settings: Mapping[str, Any], fit: Fit, say: Callable[[str], None]
) -> tuple[Path, bool]:
    """The teacher's folder in the cache, and whether it was trained for that now."""
    root = Path(experiment.paths.cache).expanduser() / "teachers"
    root.mkdir(parents=True, exist_ok=True)
    folder, work, leader = root / key, root / f"{key}.work", root / f"{key}.leader"
    retrain, train = experiment.teacher.retrain, partial(_train, experiment, fit, work / "checkpoints")
    if rank():
        _follow(experiment, folder, leader, train)
    with _locked(root / f"{key}.lock", say):
        if not rank():
            for written in (folder, leader, work / "checkpoints" / "*"):
                remove_leftovers(written)
        missing = not rank() and (retrain or not _is_sound(folder, say))
        if missing:
            if (retrain and not experiment.resume) or not _goes_on(work / "checkpoints", say):
                remove_checked(work)
            write_whole(leader, str(experiment.run_dir).encode(), checksum=False)
            unet, fitted = train()
            with atomic_folder(folder) as new:
                save_pipeline(unet, experiment.diffusion, new)
                write_json(new / FITTED, {"key": key, "settings": settings, "trained_by": _name(experiment), **fitted})
            remove_checked(work)
            leader.unlink()
    return folder, missing


def _name(experiment: Experiment) -> str:
    """A name of the run's folder that says nothing of the machine."""
    return sha256([str(experiment.run_dir)])[:16]


def _is_sound(folder: Path, say: Callable[[str], None]) -> bool:
    """True where a teacher is there and none of its files is damaged; `say` tells of one that is."""
    if not folder.exists():
        return False
    try:
        load_unet(folder)
        load_diffusion(folder)
        float(read_json(folder / FITTED)["val_loss"])
    except (ValueError, FileNotFoundError, KeyError, TypeError) as error:
        say(f"the cached teacher {folder} is not whole ({one_line(error)}); it is trained again")
        return False
    return True


def _goes_on(checkpoints: Path, say: Callable[[str], None]) -> bool:
    """True unless a half-trained teacher lies there that is too damaged to go on with; `say` tells of that."""
    try:
        point = resume_point(checkpoints)
        mended = mend_best(checkpoints, point) if point else ""
        if mended:
            say(mended)
    except ValueError as error:
        say(f"{one_line(error)}; the teacher is trained from the start")
        return False
    return True


def _follow(experiment: Experiment, folder: Path, leader: Path, train: Callable[[], Any]) -> None:
    """In all ranks but the first: train the teacher if the first rank of this run does, and wait if another run's does.

    The first rank alone holds the lock, and says in the file `leader` which run that is: ranks that were started by
    themselves, as on another node, would else train while their first rank waits, and it would never join them.
    """
    while experiment.teacher.retrain or not _is_sound(folder, lambda line: None):
        if leader.is_file() and leader.read_text("utf-8") == str(experiment.run_dir):
            train()
            return
        time.sleep(0.2)


def _locked(file: Path, say: Callable[[str], None]) -> AcquireReturnProxy:
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say("waiting for the teacher, which another run trains")
        return lock.acquire()


def _train(experiment: Experiment, fit: Fit, checkpoints: Path) -> tuple[Any, Mapping[str, Any]]:
    """Train the teacher, which is a function of the settings alone; its U-Net, and what `fit` returns."""
    config = experiment.teacher
    torch.manual_seed(config.seed)
    unet: Any = experiment.build_model().to(memory_format=torch.channels_last)
    module = DiffusionModule(
        unet,
        None,
        settings=network_settings(unet_config(unet), experiment.diffusion),
        diffusion=experiment.diffusion,
        nem=NeMConfig(mode="off"),
        optimizer=OptimizerConfig(**{name: getattr(config, name) for name in TEACHER_OPTIMIZER}),
        max_steps=config.max_steps,
        seed=config.seed,
        flip=experiment.data.flip,
        prefix="teacher/",
    )
    fitted = fit(module, checkpoints)
    return module.ema_student.unet, fitted


def _from_checkpoint(experiment: Experiment, path: Path) -> tuple[Any, dict[str, str]]:
    """A run of ours (its `teacher` folder), or a checkpoint file of a full-precision run; and a warning for the record."""
    if path.is_dir():
        if not (path / "teacher").is_dir():
            raise FileNotFoundError(f"teacher.path={path} has no teacher folder: give the folder of a run, or a .ckpt file")
        return load_unet(path / "teacher"), {}
    unet = experiment.build_model()
    _, warnings = fill_from_checkpoint(unet, path, network_settings(unet_config(unet), experiment.diffusion))
    return unet, warnings


def check_networks(experiment: Experiment) -> None:
    """Find out before anything is trained or logged what else would end the run after hours: the teacher cannot be read or does
    not take the data, the rules name no layer, or a quantizer does not go with its layer.

    Raises:
        FileNotFoundError, ValueError: one of these.
    """
    if experiment.has_teacher:
        config = read_json(experiment.run_dir / "teacher" / "unet" / "config.json")
        experiment.data.labelled = config.get("num_class_embeds") is not None
        return
    with torch.random.fork_rng(devices=[]):
        unet = _given(experiment)[0] or experiment.build_model()
        if not isinstance(unet, nn.Module):
            raise ValueError(f"model._target_ makes a {type(unet).__name__}, which is no network")
        _check_shape(experiment, unet)
        experiment.data.labelled = label_rows(unet) is not None
        if experiment.data.labelled:
            experiment.data.all_labels()
        if not experiment.quant.is_float:
            prepare_student(unet, experiment)


def _given(experiment: Experiment) -> tuple[Any, dict[str, str]]:
    """The U-Net at `teacher.path`, None where the teacher is trained, and a warning for its origin where there is one."""
    source, path = experiment.teacher.source, str(experiment.teacher.path)
    if source == "checkpoint":
        return _from_checkpoint(experiment, Path(path).expanduser())
    return (None if source == "auto" else load_unet(path)), {}


def check_schedule(experiment: Experiment) -> None:
    """A teacher that was trained on another noise schedule would mislead the student.

    Raises:
        FileNotFoundError, ValueError: no teacher where the settings say, or one of another schedule.
    """
    name, place = _foreign_network(experiment)
    if place is None:
        return
    different = {k: v for k, v in (load_diffusion(place) or {}).items() if getattr(experiment.diffusion, k) != v}
    if different:
        say = " ".join(f"diffusion.{k}={v}" for k, v in different.items())
        raise ValueError(f"{name} was trained on another noise schedule: type {say}")


def without_schedule(experiment: Experiment) -> str:
    """The setting that names a foreign network beside which no file says what it was trained on; empty if there is none.

    Raises:
        FileNotFoundError, ValueError: no network there, or one of another process.
    """
    name, place = _foreign_network(experiment)
    return name if place is not None and load_diffusion(place) is None else ""


def _foreign_network(experiment: Experiment) -> tuple[str, str | None]:
    """The setting that names a network which others trained, or another run, and its diffusers folder or hub id.

    None where there is no such network, or the run has its own copy already.
    """
    config, model = experiment.teacher, experiment.resolved.get("model") or {}
    name, place = f"teacher.path={config.path}", config.path
    if config.source == "auto" and model.get("_target_") == PretrainedConfig._target_:
        name, place = f"model.path={model['path']}", str(model["path"])
    if config.source == "checkpoint":
        folder = Path(str(config.path)).expanduser()
        run = folder if folder.is_dir() else folder.absolute().parent.parent  # <run>/checkpoints/<file>
        place = str(run / "teacher") if (run / "teacher").is_dir() else None
    return name, None if experiment.has_teacher else place


def _check_shape(experiment: Experiment, unet: Any) -> None:
    """Raise ValueError where the teacher does not take the data; one that says no size, or says it twice, is told theirs."""
    check_classes(label_rows(unet), experiment.data.classes, experiment.diffusion.label_dropout)
    check_channels(unet, experiment.diffusion)
    channels, size = experiment.data.channels, experiment.data.image_size
    if unet.config.sample_size is None or [*np.atleast_1d(unet.config.sample_size)] == [size, size]:
        unet.register_to_config(sample_size=size)
    if (unet.config.in_channels, unet.config.sample_size) != (channels, size):
        raise ValueError(
            f"the teacher takes {unet.config.in_channels} channel(s) of {unet.config.sample_size} pixels, the data have "
            f"{channels} of {size}: choose other data, for example data=images data.image_size={unet.config.sample_size}"
        )
