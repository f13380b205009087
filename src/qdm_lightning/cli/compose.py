"""Hydra over our folders: composing a command's configuration, and the jobs of a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.schema import CONF_DIR

VERSION_BASE = "1.3"

LAUNCHERS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
"""Launchers that the extra `sweeps` brings, with their packages."""


def quoted(value: object) -> str:
    """A path or name as a value in Hydra's grammar."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


@contextmanager
def hydra_over(task_name: str, config_dir: str | None) -> Iterator[Hydra]:
    """Hydra over our folder and the user's, as `hydra.main` would set it up."""
    setbase(VERSION_BASE)
    search_path = create_config_search_path(str(CONF_DIR))
    if config_dir is not None:
        anchor = SearchPathQuery(provider="schema")
        search_path.prepend(provider="command-line", path=f"file://{Path(config_dir).resolve()}", anchor=anchor)
    try:
        yield Hydra.create_main_hydra2(task_name=task_name, config_search_path=search_path)
    finally:
        GlobalHydra.instance().clear()


def compose_master(engine: Hydra, config_name: str, overrides: list[str], multirun: bool, log: bool = False) -> DictConfig:
    """The configuration of the whole command: of its one job, or of a sweep without what is swept."""
    try:
        return engine.compose_config(
            config_name, overrides, RunMode.MULTIRUN, validate_sweep_overrides=multirun, with_log_configuration=log
        )
    except MissingConfigException as error:
        _check_launcher(str(error.missing_cfg_file))
        raise


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy of a composed configuration without Hydra's own node."""
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    OmegaConf.set_struct(cfg, True)
    return cfg


def sweep_params(master: DictConfig) -> dict[str, str]:
    """What the configuration itself sweeps over (`hydra.sweeper.params`), by setting: what is typed wins over it."""
    params = OmegaConf.to_container(master.hydra.sweeper).get("params")  # type: ignore[union-attr]
    return {str(key): str(value) for key, value in (params or {}).items()}


def typed_overrides(master: DictConfig) -> dict[str, list[str]]:
    """What was typed, as `task` and `hydra`, without filling in its `${...}`: each job does that for itself."""
    return OmegaConf.to_container(master.hydra.overrides, resolve=False)  # type: ignore[return-value]


def job_overrides(engine: Hydra, master: DictConfig) -> list[list[str]] | None:
    """Overrides of each job of a sweep, Hydra's own left out; None where another sweeper invents its jobs as it goes.

    An experiment that sweeps over experiments stands for them: its own name is none of its jobs'.
    """
    if master.hydra.sweeper._target_ != f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}":
        return None
    params = sweep_params(master)
    parser = OverridesParser.create(config_loader=engine.config_loader)
    task = parser.parse_overrides(typed_overrides(master)["task"])
    if "experiment" in params:
        task = [o for o in task if o.key_or_group != "experiment"]
    swept = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
    return BasicSweeper.split_arguments([*swept, *task], None)[0]


def _check_launcher(missing: str) -> None:
    """Raise UserError where an option that Hydra does not find is a launcher that comes with a package of its own."""
    group, _, name = missing.rpartition("/")
    if group == "hydra/launcher" and name in LAUNCHERS:
        raise UserError(f"hydra/launcher needs {LAUNCHERS[name]} for {name}: pip install 'qdm-lightning[sweeps]'")
