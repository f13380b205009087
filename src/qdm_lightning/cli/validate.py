"""Checks of a composed configuration that need neither torch nor the data: names, types, values, and whole combinations."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.files import read_json
from qdm_lightning.cli.messages import unknown_setting
from qdm_lightning.cli.schema import SCHEMAS, TrainConfig, plain, schema_of
from qdm_lightning.data.spec import DigitsConfig, PicturesConfig
from qdm_lightning.diffusion.spec import LEARNED, check_guidance, check_variance
from qdm_lightning.models.spec import PretrainedConfig, UNetConfig, check_classes, check_variance_channels
from qdm_lightning.quantization.spec import TaQOff, check_scope


def refuse_unknown(cfg: DictConfig, schema: type | None = None, key: str = "") -> None:
    """Raise UserError at a setting that the schema has not: Hydra's `+name=` would add any. The user's own nodes are free.

    `schema` is that of the composed root where it is None.
    """
    if schema is None:
        composed = OmegaConf.get_type(cfg)
        schema = composed if composed is not None and is_dataclass(composed) else TrainConfig
    known = {f.name for f in fields(schema)}
    for name in map(str, cfg):
        full = f"{key}.{name}" if key else name
        if name not in known:
            raise UserError(unknown_setting(full, [f"{key}.{k}" if key else k for k in known]))
        node = None if OmegaConf.is_missing(cfg, name) or OmegaConf.is_interpolation(cfg, name) else cfg[name]
        if isinstance(node, DictConfig):
            inner = schema_of(full, node) if full in SCHEMAS else OmegaConf.get_type(node)
            if is_dataclass(inner):
                refuse_unknown(node, inner, full)


def checked_group(cfg: DictConfig, values: dict[str, Any], group: str) -> Any:
    """The settings of an open group as its schema's object (checks run), or as a plain dict where they are the user's own."""
    node = values.get(group)
    if not node:
        raise UserError(f"{group} is missing: type {group}=<option>; --help lists them")
    schema = schema_of(group, cfg[group])
    if schema is not None:
        merged = OmegaConf.merge(OmegaConf.create({group: OmegaConf.structured(schema)}), {group: node})
        return OmegaConf.to_object(merged)[group]  # type: ignore[call-overload, index]
    if not node.get("_target_"):
        raise UserError(f"{group}._target_ is missing: type {group}._target_=<package.module.Class>")
    return node


def validate(cfg: DictConfig) -> TrainConfig:
    """Every check that needs neither torch nor the data: names, types, values, and combinations across groups.

    Returns:
        The settings as objects; a node with the user's own `_target_` stays a dict.

    Raises:
        UserError: an unknown or missing setting, or a combination that contradicts itself.
        ValueError, FileNotFoundError: a value that a settings class refuses.
        OmegaConfBaseException: a missing value, or an interpolation that leads nowhere.
    """
    refuse_unknown(cfg)
    values = plain(cfg)
    closed = {key: value for key, value in values.items() if key not in SCHEMAS}
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), closed, dict.fromkeys(SCHEMAS)))
    assert isinstance(settings, TrainConfig)
    for group in ("data", "model", "taq", "metrics"):
        setattr(settings, group, checked_group(cfg, values, group))
    logger = values["logger"] or {}
    settings.logger = checked_group(cfg, values, "logger") if "_target_" in logger else OmegaConf.to_object(cfg.logger)
    check_combinations(settings)
    return settings


def check_combinations(s: TrainConfig) -> None:
    """Raise UserError (or FileNotFoundError) where settings of different groups contradict one another."""
    _check_shape(s)
    _check_classes(s)
    _check_variance(s)
    steps = s.diffusion.num_train_timesteps
    for name, value in (("sampler.steps", s.sampler.steps), ("taq.groups", getattr(s.taq, "groups", 0))):
        if value > steps:
            raise UserError(f"{name}={value} is not allowed: at most {steps}, which is diffusion.num_train_timesteps")
    own = getattr(s.taq, "num_train_timesteps", steps)
    if own != steps:
        raise UserError(
            f"taq.num_train_timesteps={own} is not allowed: it follows diffusion.num_train_timesteps={steps}, leave it out"
        )
    check_scope(taq_scope(s.taq))
    if s.quant.mode == "ptq" and s.nem.on_policy_fraction:
        raise UserError(
            "quant.mode=ptq takes no training steps, nem=on_policy is about them: type nem=replace or quant.mode=qat"
        )
    if s.teacher.source == "checkpoint" and not Path(str(s.teacher.path)).expanduser().exists():
        raise FileNotFoundError(
            f"teacher.path={s.teacher.path}: nothing there; give the folder of a quant=fp32 run, or a checkpoint"
        )
    if s.quant.is_float:
        _check_float(s)
    devices = s.trainer.devices
    if isinstance(devices, int):
        batch, processes = getattr(s.data, "batch_size", 0), devices * s.trainer.num_nodes
        if batch % processes:
            raise UserError(
                f"data.batch_size={batch} cannot be shared among {processes} processes: type a multiple of {processes}"
            )


def _check_classes(s: TrainConfig) -> None:
    """Labels of data and network must agree, as far as the settings tell, and guidance needs labels that were dropped."""
    check_guidance(s.sampler.guidance, s.diffusion.label_dropout)
    network = network_settings(s.model)
    if network and not isinstance(s.data, dict) and s.teacher.source != "checkpoint":
        check_classes(network.get("num_class_embeds"), s.data.classes, s.diffusion.label_dropout)


def _check_variance(s: TrainConfig) -> None:
    """Sampler and network must agree whether the variance is learned; a teacher with such a loss is not trained here."""
    if s.teacher.source == "auto" and s.diffusion.variance_type == LEARNED:
        raise UserError(
            f"diffusion.variance_type={LEARNED} needs a trained teacher, L_vlb is not trained here: type teacher=pretrained "
            "teacher.path=<diffusers folder>"
        )
    check_variance(s.sampler.kind, s.sampler.variance, s.diffusion.variance_type)
    network = network_settings(s.model)
    channels, estimated = (network.get(name) for name in ("in_channels", "out_channels"))
    if channels is not None and estimated is not None and s.teacher.source != "checkpoint":
        check_variance_channels(channels, estimated, s.diffusion.variance_type)


def _check_shape(s: TrainConfig) -> None:
    """Images and network must agree, as far as the settings tell (a folder's own sizes are known once it is read)."""
    network = _network_shape(s.model)
    if network is None or isinstance(s.data, dict):
        return
    digits, fixed = isinstance(s.data, DigitsConfig), isinstance(s.model, PretrainedConfig)
    size, channels = (8, 1) if digits else (s.data.image_size, getattr(s.data, "channels", 3))
    if None not in (size, network[0]) and size != network[0]:
        ways = [] if digits else [f"data.image_size={network[0]}"]
        ways += ["other data="] if fixed else [f"model.sample_size={size}", "another model="]
        raise UserError(f"the images are {size} pixels wide, the network takes {network[0]}: type {' or '.join(ways)}")
    if channels != network[1]:
        ways = [f"data.channels={network[1]}"] if isinstance(s.data, PicturesConfig) and network[1] in (1, 3) else []
        ways += ["other data="] if fixed else [f"model.in_channels={channels} model.out_channels={channels}", "another model="]
        raise UserError(f"the images have {channels} channel(s), the network takes {network[1]}: type {' or '.join(ways)}")


def _network_shape(model: Any) -> tuple[int | None, int] | None:
    """(edge in pixels, channels) that a network takes; None where its settings do not say. Raises ValueError: not square."""
    found = network_settings(model)
    size, channels = found.get("sample_size"), found.get("in_channels")
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise UserError(
                f"{getattr(model, 'path', 'the network')} takes images of {size} pixels: only square ones are supported"
            )
        size = size[0]
    return None if channels is None else (size, channels)


def network_settings(model: Any) -> dict[str, Any]:
    """Settings of a `UNet2DModel`, typed or of a diffusers folder; empty where they are not known without running code.

    Raises:
        FileNotFoundError, ValueError: `model.path` is no such folder, or its config.json is damaged.
    """
    if isinstance(model, UNetConfig):
        return asdict(model)
    if not isinstance(model, PretrainedConfig):
        return {}
    path = str(model.path)
    folder = Path(path).expanduser()
    for file in (folder / "unet" / "config.json", folder / "config.json"):
        if file.is_file():
            found = read_json(file)
            for name in (
                "in_channels",
                "out_channels",
                "layers_per_block",
                "sample_size",
                "block_out_channels",
                "num_class_embeds",
            ):
                value = found.get(name)
                several = value if isinstance(value, list) else [value]
                if value is not None and not (several and all(type(one) is int and one > 0 for one in several)):
                    raise ValueError(f"{file} is damaged: {name}={value}")
            return found
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise FileNotFoundError(
            f"{path} has no config.json of a network: give a diffusers folder, or a hub id such as google/ddpm-cifar10-32"
        )
    return {}


def _check_float(s: TrainConfig) -> None:
    """A run at 32 bits is a teacher: nothing in it is quantized or distilled."""
    faults = {
        ", TaQ would have nothing to quantize: type taq=off": type(s.taq) is not TaQOff,
        f", nem.mode={s.nem.mode} would need another one: type nem=off": s.nem.mode != "off",
        ", quant.mode=ptq would have nothing to calibrate: type quant.mode=qat": s.quant.mode == "ptq",
        f" and takes none: leave out teacher={s.teacher.source}": s.teacher.source != "auto",
    }
    for fault, there in faults.items():
        if there:
            raise UserError(f"a run with quant=fp32 trains a teacher{fault}")


def taq_scope(taq: Any) -> str | list[str]:
    """Scope of TaQ's settings, which are a plain dict where they are the user's own."""
    scope = taq.get("scope", TaQOff.scope) if isinstance(taq, dict) else taq.scope
    return scope if isinstance(scope, str) else list(scope)
