"""From a composed configuration to an experiment: the only place that instantiates.

The schema is in `schema.py`, the checks across groups are in `combinations.py`. Nothing here imports torch until `build`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from qdm_lightning.base.checks import UserError, one_of
from qdm_lightning.base.files import write_whole
from qdm_lightning.base.ranks import started_apart
from qdm_lightning.base.trust import check_targets
from qdm_lightning.cli.messages import unknown_setting
from qdm_lightning.cli.schema import SCHEMAS, TrainConfig, run_name, schema_of
from qdm_lightning.cli.validate import check_combinations, taq_scope
from qdm_lightning.quantization.spec import SCOPES, QuantConfig
from qdm_lightning.training.spec import TrainerConfig

if TYPE_CHECKING:
    from torch import nn

    from qdm_lightning.quantization.preparation import Quantizers
    from qdm_lightning.training.experiment import Experiment

CONFIG_FILE = "config.yaml"
"""Name of the resolved configuration in a run folder."""

METRICS_FILE = "metrics.json"
"""Name of a run's results, its last file."""

LOCK_FILE = ".lock"
"""Held while a process trains in a run folder."""


def plain(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as dicts and lists, every interpolation resolved. Raises MissingMandatoryValue where a value is missing."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


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


def _checked(cfg: DictConfig, values: dict[str, Any], group: str) -> Any:
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
        setattr(settings, group, _checked(cfg, values, group))
    logger = values["logger"] or {}
    settings.logger = _checked(cfg, values, "logger") if "_target_" in logger else OmegaConf.to_object(cfg.logger)
    check_combinations(settings)
    return settings


def _located(key: str, values: Any) -> DictConfig:
    """A node of plain `values` that errors name as `key`."""
    return OmegaConf.create({key: values})[key]


def _factory(key: str, values: dict[str, Any]) -> Callable[..., Any]:
    """Plain settings with a `_target_` as a partial of that class or function.

    Raises:
        UserError: a setting that the target does not take.
        hydra.errors.InstantiationException: the target cannot be imported.
    """
    deferred = instantiate(_located(key, values), _partial_=True, _convert_="all")
    taken = inspect.signature(deferred.func).parameters.values()
    names = [p.name for p in taken if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unknown = [name for name in deferred.keywords if name not in names]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in taken):
        raise UserError(f"{key}.{unknown[0]} is not an argument of {values['_target_']}, which takes {', '.join(names)}")
    return functools.partial(deferred.func, *deferred.args, **deferred.keywords)


def _factories(key: str, values: dict[str, Any] | None) -> list[Callable[..., Any]]:
    """Factories of a node that is one `_target_`, or named ones, or empty."""
    if not values:
        return []
    if "_target_" in values:
        return [_factory(key, values)]
    for name, value in values.items():
        if not isinstance(value, dict) or "_target_" not in value:
            raise UserError(f"{key}.{name} needs a _target_: type {key}.{name}._target_=<package.module.Class>")
    return [_factory(f"{key}.{name}", value) for name, value in values.items()]


def run_folder(cfg: DictConfig) -> Path:
    """Absolute folder of this run: `run=`, else Hydra's, else (outside Hydra) a new name under `paths.output`.

    Raises:
        UserError: processes that were started apart, such as on several nodes, would each make up a name of their own.
    """
    if cfg.run:
        return Path(cfg.run).expanduser().resolve()
    if HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        named = any(word.startswith("hydra.run.dir=") for word in HydraConfig.get().overrides.hydra)
        if not named and (cfg.trainer.num_nodes > 1 or started_apart()):
            raise UserError("the processes of one run need one folder: type hydra.run.dir=<folder>, the same for each of them")
        return Path(HydraConfig.get().runtime.output_dir)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}_{run_name(cfg)}"
    return Path(cfg.paths.output).expanduser().resolve() / name


def write_config(cfg: DictConfig, file: Path) -> None:
    """Write the resolved configuration, whole or not at all."""
    write_whole(file, OmegaConf.to_yaml(cfg, resolve=True).encode())


def stored_folder(run: str | Path) -> Path:
    """Absolute folder of an earlier run. Raises FileNotFoundError where there is none, or none of ours."""
    folder = Path(run).expanduser().resolve()
    if not (folder / CONFIG_FILE).is_file():
        what = f"has no {CONFIG_FILE}" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"run={run} {what}: give the folder of an earlier run, the one that holds {CONFIG_FILE}")
    return folder


def stored(run: str | Path, trusted: Collection[str] = ()) -> DictConfig:
    """The resolved configuration that a run left in its folder, with `run` set to that folder: `train` goes on with it.

    Args:
        run: folder of a run.
        trusted: `_target_`s outside this package that it may name (see `targets.check_targets`).

    Raises:
        FileNotFoundError: no such folder, or no configuration in it.
        ValueError: no configuration of ours, or it names code that is not trusted.
    """
    folder = stored_folder(run)
    loaded = OmegaConf.load(folder / CONFIG_FILE)
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{folder / CONFIG_FILE} is not the configuration of a run")
    check_targets(OmegaConf.to_container(loaded), trusted)
    cfg = OmegaConf.merge(OmegaConf.structured(TrainConfig), loaded)
    assert isinstance(cfg, DictConfig)
    cfg.run = str(folder)
    return cfg


def same_settings(cfg: DictConfig, other: DictConfig) -> bool:
    """True where two configurations describe the same run; the folder that is gone on with and the logger do not matter."""
    ignored = {"run": None, "logger": None}
    return plain(cfg) | ignored == plain(other) | ignored


def accelerators() -> set[str]:
    """Values of `trainer.accelerator`, beside `auto` and `cpu`, that this machine has."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return {name for name, there in (("gpu", cuda or mps), ("cuda", cuda), ("mps", mps)) if there}


def _check_device(trainer: TrainerConfig) -> None:
    if trainer.accelerator not in {"auto", "cpu"} | accelerators():
        raise UserError(
            f"trainer.accelerator={trainer.accelerator}: there is none on this machine; type trainer=auto or trainer=cpu"
        )


def build(cfg: DictConfig) -> Experiment:
    """Instantiate everything that a run needs. Imports torch; reads no data and trains nothing.

    Args:
        cfg: composed from `conf/train.yaml` (or returned by `stored`).

    Returns:
        The experiment for `training.runner.run`; networks, quantizers and loggers are factories.

    Raises:
        UserError, ValueError, FileNotFoundError: bad settings, see `validate`.
        hydra.errors.InstantiationException: a `_target_` that cannot be imported or refuses its arguments.
    """
    settings, values = validate(cfg), plain(cfg)  # first: bad input needs no torch to be told

    from qdm_lightning.quantization.preparation import Quantizers
    from qdm_lightning.training.experiment import Experiment

    _check_device(settings.trainer)
    quant = values["quant"]
    taq = {key: value for key, value in values["taq"].items() if key != "scope"}
    return Experiment(
        seed=settings.seed,
        run_dir=run_folder(cfg),
        num_samples=settings.num_samples,
        data=instantiate(_located("data", values["data"]), _convert_="all"),
        build_model=_factory("model", values["model"]),
        diffusion=settings.diffusion,
        quant=settings.quant,
        quantizers=Quantizers.with_taq(
            _factory("quant.weight_quantizer", quant["weight_quantizer"]),
            _factory("quant.act_quantizer", quant["act_quantizer"]),
            _factory("taq", taq) if taq.get("_target_") else None,
            taq_scope(settings.taq),
        ),
        calibrator=_factory("quant.calibrator", quant["calibrator"]),
        nem=settings.nem,
        sampler=settings.sampler,
        teacher=settings.teacher,
        optimizer=settings.optimizer,
        trainer=settings.trainer,
        feature_network=instantiate(_located("metrics", values["metrics"]), _convert_="all"),
        loggers=_factories("logger", values["logger"]),
        callbacks=[make() for make in _factories("callbacks", values["callbacks"])],
        paths=settings.paths,
        resolved=values,
        resume=bool(cfg.run),
    )


def build_student(cfg: DictConfig) -> tuple[Callable[[], nn.Module], QuantConfig, Quantizers]:
    """What of a run describes its student: the network's factory, its bits, the factories of its quantizers.

    Only `model`, `quant` and `taq` are looked at, and the names of all settings. Imports torch.

    Raises:
        UserError, ValueError, OmegaConfBaseException: bad settings.
        hydra.errors.InstantiationException: a `_target_` that cannot be imported.
    """
    from qdm_lightning.quantization.preparation import Quantizers

    refuse_unknown(cfg)
    values = {group: plain(cfg[group]) if cfg[group] else {} for group in ("model", "quant", "taq")}
    _checked(cfg, values, "model")
    scope = taq_scope(_checked(cfg, values, "taq"))
    one_of("taq.scope", scope, SCOPES)
    quant = OmegaConf.to_object(cfg.quant)
    assert isinstance(quant, QuantConfig)
    activation = _factory("quant.act_quantizer", values["quant"]["act_quantizer"])
    taq = {key: value for key, value in values["taq"].items() if key != "scope"}
    attention = _factory("taq", taq) if taq.get("_target_") else activation
    quantizers = Quantizers(
        weight=_factory("quant.weight_quantizer", values["quant"]["weight_quantizer"]),
        activation=attention if scope == "all" else activation,
        attention=attention,
    )
    return _factory("model", values["model"]), quant, quantizers
