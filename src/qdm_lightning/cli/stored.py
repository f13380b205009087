"""What the commands about an earlier run share: its stored configuration is the base, and what may be typed over it.

A run's training settings are never recomposed from defaults: they come out of its own folder. Groups that such a command
offers (`sampler`, `metrics`) have an option `stored`, which is what the run used; it is taken when nothing is typed.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.trust import targets
from qdm_lightning.cli import app as cli
from qdm_lightning.cli.build import build, plain, refuse_unknown, stored, validate
from qdm_lightning.cli.compose import VERSION_BASE, quoted
from qdm_lightning.cli.messages import explain, is_bad_input
from qdm_lightning.cli.schema import CONF_DIR, TrainConfig
from qdm_lightning.diffusion.spec import SamplerConfig
from qdm_lightning.training.spec import PathsConfig

if TYPE_CHECKING:
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.training.experiment import Experiment

GROUPS = ("sampler", "metrics", "logger")
"""Config groups that have the option `stored`."""

LOCATIONS = ("root", "path", "cache", "verify", "download")
"""Settings of `data` that say where it lies: it may have moved since the run. The others belong to training."""

UNUSED_METRIC = {"_target_": "qdm_lightning.metrics.digits.DigitsFeatures"}
"""Stands for the run's feature network where a command scores nothing: a large one need not be loaded."""


@dataclass(kw_only=True)
class RunConfig:
    """What every command about a run has.

    Args:
        run: folder of the run.
        trust: `_target_`s outside this package that its stored configuration may name.
    """

    run: str | None = None
    trust: list[str] = field(default_factory=list)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    data: Any = field(default_factory=dict)
    paths: PathsConfig = field(default_factory=PathsConfig)


def register(config_name: str, schema: type[RunConfig], run: DictConfig | None = None) -> None:
    """Tell Hydra's ConfigStore the root `base_<config_name>` and the options `stored`, from the configuration of a run."""
    store = ConfigStore.instance()
    values = {} if run is None else plain(run)
    root = OmegaConf.structured(schema)
    root.data = values.get("data", {})
    root.paths = PathsConfig(**values.get("paths", {}))
    store.store(name=f"base_{config_name}", node=root)
    for group in GROUPS:
        store.store(group=group, name="stored", node=values.get(group) or {})


def main(
    config_name: str,
    schema: type[RunConfig],
    task: cli.Task,
    examples: Sequence[tuple[str, str]],
    argv: Sequence[str] | None = None,
    check: cli.Task | None = None,
) -> None:
    """Run a command about a run, see `cli.run`. `check` is `check_run` where None."""

    def adopt(args: argparse.Namespace, typed: list[str]) -> list[str]:
        return _adopt(config_name, schema, args, typed)

    @functools.wraps(task)
    def kept(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except KeyboardInterrupt:
            print("what is done is kept: the same command goes on", file=sys.stderr)
            raise

    register(config_name, schema)
    cli.run(config_name, kept, check or check_run, examples, argv, adopt=adopt)


def compose(config_name: str, schema: type[RunConfig], run: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that `python -m qdm_lightning.<config_name> run=<run> <overrides>` would run.

    Raises:
        UserError, FileNotFoundError, ValueError: no run, or settings that may not be typed.
    """
    args = argparse.Namespace(overrides=[f"run={quoted(Path(run))}", *overrides], config_dir=None, cfg=None)
    typed = _adopt(config_name, schema, args, list(args.overrides))
    with initialize_config_dir(str(CONF_DIR), version_base=VERSION_BASE):
        return hydra_compose(config_name, typed)


def _adopt(config_name: str, schema: type[RunConfig], args: argparse.Namespace, typed: list[str]) -> list[str]:
    """Register what the run's folder says, and return what is left to compose of the typed arguments."""
    parsed = [o for o in OverridesParser.create().parse_overrides(args.overrides) if not o.is_hydra_override()]
    runs = [o for o in parsed if o.key_or_group == "run"]
    if not runs or runs[-1].value() is None:
        if args.cfg:
            return typed
        raise UserError("run is missing: type run=<folder of a run>")
    if runs[-1].is_sweep_override():
        raise UserError(f"{runs[-1].input_line}: one run at a time")
    trusted, dropped = _trusted(parsed, {f.name for f in fields(schema)})
    if args.config_dir is not None:
        for file in Path(args.config_dir).rglob("*.yaml"):
            trusted |= {str(target) for _, target in targets(OmegaConf.to_container(OmegaConf.load(file)))}
    register(config_name, schema, stored(str(runs[-1].value()), trusted))
    rest = [argument for argument in typed if argument not in dropped]
    return [*rest, f"trust=[{','.join(quoted(target) for target in sorted(trusted))}]"] if trusted else rest


def _trusted(parsed: Iterable[Override], own: set[str]) -> tuple[set[str], set[str]]:
    """Targets that were typed, and the arguments that did nothing but name one of the run's own.

    Raises:
        UserError: a setting of training.
    """
    trusted, dropped = set(), set()
    for override in parsed:
        group, _, rest = override.get_key_element().lstrip("+~").partition(".")
        if rest.rpartition(".")[2] == "_target_":
            trusted.add(str(override.value()))
            if group not in own:
                dropped.add(str(override.input_line))
        elif group == "data" and rest not in LOCATIONS:
            raise UserError(
                f"{override.input_line} belongs to the run, whose own configuration says it: here data may only be looked for "
                f"elsewhere, by {', '.join(f'data.{name}=' for name in LOCATIONS)}"
            )
        elif group not in own and group in {f.name for f in fields(TrainConfig)}:
            raise UserError(
                f"{override.input_line} belongs to training, the run's own configuration says it: train another run with it"
            )
    return trusted, dropped


def _merged(cfg: DictConfig) -> DictConfig:
    """The run's stored configuration with what may be typed over it; the network comes from the run's own folder."""
    base = stored(cfg.run, cfg.trust)
    values = plain(cfg)
    OmegaConf.set_struct(base, False)
    base.data, base.callbacks = values["data"], {}
    base.logger = values.get("logger") or {}
    base.metrics = values.get("metrics") or UNUSED_METRIC
    for group in ("sampler", "paths"):
        base[group].update(values[group])
    teacher = str(Path(base.run) / "teacher")
    base.model = {"_target_": "qdm_lightning.models.diffusers_io.load_unet", "path": teacher}
    if base.teacher.source != "auto":
        base.teacher.path = teacher
    base.trainer.accelerator, base.trainer.devices = values["accelerator"], 1
    for name in ("threads", "compile"):
        if values[name] is not None:
            base.trainer[name] = values[name]
    return base


def check_run(cfg: DictConfig) -> None:
    """What can be checked before anything heavy is imported: names, types, values, the run's folder.

    Raises:
        UserError, ValueError, FileNotFoundError, OmegaConfBaseException: bad settings.
    """
    refuse_unknown(cfg)
    settings_of(cfg)
    folder = Path(stored(cfg.run, cfg.trust).run)
    if not (folder / "teacher" / "unet" / "config.json").is_file():
        raise UserError(f"run={cfg.run} has no teacher yet: python -m qdm_lightning.train run={cfg.run} goes on with it")
    validate(_merged(cfg))


def another(cfg: DictConfig, run: str) -> DictConfig:
    """`cfg` about another run: its own data and places, everything else as typed."""
    other = cfg.copy()
    values = plain(stored(run, cfg.trust))
    OmegaConf.set_struct(other, False)
    other.run, other.data = run, values["data"]
    other.paths.update(values["paths"])
    OmegaConf.set_struct(other, True)
    return other


def settings_of(cfg: DictConfig) -> Any:
    """The root as an object of its schema; its own checks run."""
    return OmegaConf.to_object(cfg)


def experiment(cfg: DictConfig) -> Experiment:
    """The run as `training.restore` and the evaluation take it. Raises as `config.build`."""
    return build(_merged(cfg))


def guarded(work: Callable[[Progress], Any], progress: Progress) -> Any:
    """Call `work(progress)`; bad input that it finds before its first stage becomes a UserError.

    Raises:
        UserError: bad input.
    """
    try:
        return work(progress)
    except Exception as error:
        if progress.started or not is_bad_input(error):
            raise
        raise UserError(explain(error)) from error


@functools.cache
def _scratch() -> str:
    """A folder for what Hydra writes; it is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="qdm_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


OmegaConf.register_new_resolver("qdm.scratch", _scratch, replace=True)
