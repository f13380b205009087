"""Configurations by `hydra.compose`, for the checks before a job begins; and those that earlier runs left in their folders."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qdm_lightning.base.checks import UserError, one_line
from qdm_lightning.base.trust import check_targets, targets
from qdm_lightning.cli.messages import explain, is_bad_input, quoted
from qdm_lightning.cli.outside import keep_within
from qdm_lightning.cli.schema import CONF_DIR, TrainConfig
from qdm_lightning.cli.typed import as_text
from qdm_lightning.runs.folder import CONFIG, read_config, run_folder

VERSION_BASE = "1.3"

LAUNCHERS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
"""Launchers that the extra `sweeps` brings, with their packages."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)}: --help lists what there is")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What was typed: Hydra's flags, and the overrides.

    Raises:
        UserError: a flag that there is not, or one that would take our options away.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for names in ("--help -h", "--hydra-help", "--version", "--resolve", "--run -r", "--multirun -m", "--shell-completion -sc"):
        parser.add_argument(*names.split(), action="store_true")
    for names in ("--package -p", "--config-path -cp", "--config-name -cn", "--config-dir -cd", "--experimental-rerun"):
        parser.add_argument(*names.split())
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--info", "-i", nargs="?", const="all")
    args = parser.parse_intermixed_args(words)
    if args.config_path is not None:
        raise UserError("--config-path would hide our options: name the folder of your own with --config-dir")
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir={args.config_dir} is not a folder: give the one that holds your <group>/<option>.yaml")
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun is not supported: type run=<folder of the run>")
    return args


def for_shell(name: str, value: object) -> str:
    """`name=value`, quoted for Hydra and for the shell where need be."""
    plain = re.fullmatch(r"[\w.=/+-]+", str(value))
    return f"{name}={value}" if plain else shlex.quote(f"{name}={quoted(value)}")


def given_beside_run(overrides: Sequence[str]) -> list[str]:
    """Of what was typed for a run that which `run=` takes too: the user's own `_target_`s, which need trust, and the logger."""
    return [
        word
        for word in overrides
        if word.partition("=")[0].endswith("_target_") or word.lstrip("+~").startswith(("logger=", "logger."))
    ]


@contextmanager
def explained(overrides: Sequence[str] = ()) -> Iterator[None]:
    """Within the block bad input becomes a UserError of one line; faults of ours pass.

    Args:
        overrides: as typed, to name the culprit where the error does not.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, MissingConfigException):
            _check_launcher(str(error.missing_cfg_file))
        if not is_bad_input(error):
            raise
        raise UserError(explain(error, overrides)) from error


@contextmanager
def before_it_began(progress: Any) -> Iterator[None]:
    """Within the block bad input that is found before the first stage of `progress` becomes a UserError of one line."""
    try:
        yield
    except Exception as error:
        if progress.started or isinstance(error, UserError):
            raise
        with explained():
            raise


def _check_launcher(missing: str) -> None:
    """Raise UserError where an option that Hydra does not find is a launcher that comes with a package of its own."""
    group, _, name = missing.rpartition("/")
    if group == "hydra/launcher" and name in LAUNCHERS:
        raise UserError(f"hydra/launcher needs {LAUNCHERS[name]} for {name}: pip install 'qdm-lightning[sweeps]'")


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra understands them."""
    return OverridesParser.create().parse_overrides([*map(as_text, overrides)])


def composed(config_name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """The configuration of one job, Hydra's own node in it, from our folder and the user's `config_dir`."""
    search = [] if config_dir is None else [f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).resolve()}')}]"]
    with initialize_config_dir(str(CONF_DIR), version_base=VERSION_BASE):
        return compose(config_name, [*map(as_text, overrides), *search], return_hydra_config=True)


def check_options(config_dir: str | None) -> None:
    """Raise UserError, which names the file, where an option in the user's own folder is no YAML of settings."""
    groups = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir())
    folders = [Path(config_dir, group) for group in groups] if config_dir is not None else []
    for file in (file for folder in folders for file in sorted(folder.rglob("*.yaml"))):
        try:
            OmegaConf.load(file)
        except (YAMLError, OSError, ValueError, RecursionError, OmegaConfBaseException) as error:
            raise UserError(f"{file} cannot be read as settings: {one_line(error)}") from error


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy of a composed configuration without Hydra's own node."""
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    OmegaConf.set_struct(cfg, True)
    return cfg


def trusted(overrides: Sequence[Override], config_dir: str | None) -> set[str]:
    """The `_target_`s that the user names: typed, or in the files of `config_dir`."""
    named = {str(o.value()) for o in overrides if o.get_key_element().endswith("_target_")}
    files = Path(config_dir).rglob("*.yaml") if config_dir is not None else ()
    contents = (OmegaConf.to_container(OmegaConf.load(file)) for file in files)
    return named | {str(target) for content in contents for _, target in targets(content)}


def stored(
    run: str | Path, trust: Collection[str] = (), typed: Collection[str] = (), say: Callable[[str], None] | None = None
) -> DictConfig:
    """The resolved configuration that a run left in its folder, with `run` set to that folder: `train` goes on with it.

    Args:
        run: folder of a run.
        trust: `_target_`s outside this package that it may name (see `trust.check_targets`).
        typed: dotted names of settings that the user gives beside it.
        say: told what it names outside its folder, and what of that is not taken (see `outside.keep_within`).

    Raises:
        FileNotFoundError: no such folder, or no configuration in it.
        ValueError: no configuration of ours, or it names code that is not trusted.
    """
    folder = run_folder(run)
    values = read_config(folder)
    check_targets(values, trust)
    for line in keep_within(values, typed):
        if say is not None:
            say(line)
    cfg = settings(values)
    absent = [str(name) for name in cfg if OmegaConf.is_missing(cfg, name)]
    if absent:
        raise ValueError(f"{folder / CONFIG} is damaged: it has no {absent[0]}")
    cfg.run = str(folder)
    return cfg


def settings(values: dict[str, Any]) -> DictConfig:
    """Plain data as a configuration of the schema: names and types are checked. Raises OmegaConfBaseException."""
    cfg = OmegaConf.merge(OmegaConf.structured(TrainConfig), values)
    assert isinstance(cfg, DictConfig)
    return cfg
