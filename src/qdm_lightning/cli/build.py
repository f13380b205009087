"""From a composed configuration to an experiment: the only place that instantiates. Only `build` imports torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from qdm_lightning.base.checks import UserError, fits_memory
from qdm_lightning.base.ranks import started_apart
from qdm_lightning.cli.schema import plain, run_name, settings_of
from qdm_lightning.cli.sizes import check_sizes, network_memory
from qdm_lightning.cli.validate import checked_group, network_settings, refuse_unknown, taq_scope, validate
from qdm_lightning.quantization.spec import QuantConfig, check_scope
from qdm_lightning.training.spec import TrainerConfig

if TYPE_CHECKING:
    from torch import nn

    from qdm_lightning.quantization.preparation import Quantizers
    from qdm_lightning.training.experiment import Experiment


def _located(key: str, values: Any) -> DictConfig:
    """A node of plain `values` that errors name as `key`."""
    return OmegaConf.create({key: values})[key]


def _factory(key: str, values: dict[str, Any], kind: type | None = None) -> Callable[..., Any]:
    """Plain settings with a `_target_` as a partial of that class or function.

    Raises:
        UserError: a setting that the target does not take, or a class that is no `kind`.
        hydra.errors.InstantiationException: the target cannot be imported.
    """
    deferred = instantiate(_located(key, values), _partial_=True, _convert_="all")
    if kind is not None and isinstance(deferred.func, type) and not issubclass(deferred.func, kind):
        raise UserError(f"{key}._target_={values['_target_']} is no {kind.__name__}: name one of that kind")
    try:
        taken = inspect.signature(deferred.func).parameters.values()
    except ValueError:  # of a builtin
        raise UserError(f"{key}._target_={values['_target_']} is none of what can stand here") from None
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


def new_folder(cfg: DictConfig) -> Path:
    """Absolute folder of a run that Hydra did not make one for: `run=`, else a new name under `paths.output`."""
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}_{run_name(cfg)}"
    return Path(cfg.run or Path(cfg.paths.output) / name).expanduser().absolute()


def check_one_folder(cfg: DictConfig, typed: bool) -> None:
    """Raise UserError where processes that were started apart, such as on several nodes, would each make up a folder.

    Args:
        cfg: of the run.
        typed: whether the run's folder was typed.
    """
    if not (typed or cfg.run) and (cfg.trainer.num_nodes > 1 or started_apart()):
        raise UserError("the processes of one run need one folder: type hydra.run.dir=<folder>, the same for each of them")


def build(cfg: DictConfig) -> Experiment:
    """Instantiate everything that a run needs. Imports torch; reads no data and trains nothing.

    Args:
        cfg: composed from `conf/train.yaml` (or returned by `compose.stored`).

    Returns:
        The experiment for `training.run.run`; networks, quantizers and loggers are factories.

    Raises:
        UserError, ValueError, FileNotFoundError: bad settings, see `validate`.
        hydra.errors.InstantiationException: a `_target_` that cannot be imported or refuses its arguments.
    """
    settings, values = validate(cfg), plain(cfg)  # first: bad input needs no torch to be told

    from torch.nn import Module

    from qdm_lightning.diffusion.sampling import timesteps
    from qdm_lightning.training.experiment import Experiment

    _check_device(settings.trainer)
    check_sizes(settings, network_settings(settings.model))
    if settings.sampler.scheduler:
        timesteps(settings.sampler, settings.diffusion)  # raises where its scheduler does not take what is given
    measured = values["metrics"]["_target_"] is not None
    return Experiment(
        seed=settings.seed,
        run_dir=new_folder(cfg),
        num_samples=settings.num_samples,
        execution=settings.execution,
        data=instantiate(_located("data", values["data"]), _convert_="all"),
        build_model=_factory("model", values["model"], Module),
        diffusion=settings.diffusion,
        quant=settings.quant,
        quantizers=_quantizers(values, taq_scope(settings.taq)),
        calibrator=_factory("quant.calibrator", values["quant"]["calibrator"]),
        nem=settings.nem,
        weighting=_factory("nem.weighting", values["nem"]["weighting"])(),
        sampler=settings.sampler,
        teacher=settings.teacher,
        optimizer=settings.optimizer,
        trainer=settings.trainer,
        feature_network=instantiate(_located("metrics", values["metrics"]), _convert_="all") if measured else None,
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
    refuse_unknown(cfg)
    values = settings_of(cfg, ("model", "quant", "taq"))
    model = checked_group(cfg, values, "model")
    fits_memory("this network", network_memory(network_settings(model))[0])
    scope = taq_scope(checked_group(cfg, values, "taq"))
    check_scope(scope)
    from torch.nn import Module

    quant = OmegaConf.to_object(cfg.quant)
    assert isinstance(quant, QuantConfig)
    return _factory("model", values["model"], Module), quant, _quantizers(values, scope)


def _quantizers(values: dict[str, Any], scope: str | list[str]) -> Quantizers:
    """The factories that the settings name in `quant` and `taq`.

    Raises UserError where TaQ serves every activation, so that a quantizer that was chosen for the others would serve none.
    """
    from qdm_lightning.quantization.preparation import Quantizers
    from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer

    quant, taq = values["quant"], {key: value for key, value in values["taq"].items() if key != "scope"}
    made = (
        _factory("quant.weight_quantizer", quant["weight_quantizer"], WeightQuantizer),
        _factory("quant.act_quantizer", quant["act_quantizer"], ActivationQuantizer),
        _factory("taq", taq, ActivationQuantizer) if taq.get("_target_") else None,
    )
    if made[2] is not None and scope in ("all", "all_but_probs") and quant["act_quantizer"] != QuantConfig().act_quantizer:
        raise UserError(
            f"quant.act_quantizer={quant['act_quantizer']['_target_']} would quantize nothing, as TaQ quantizes every "
            f"activation (taq.scope={scope}): type taq=off, or taq.scope=qkv"
        )
    return Quantizers.with_taq(*made, scope)
