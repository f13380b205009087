"""What every command does around its task: help, checks before anything is written, one line and status 2 for bad input.

Hydra creates a run folder before it calls the task, ends its own errors with status 1, and swallows exceptions in its
callbacks. So each job, also every job of a sweep, is composed and checked here first, and only then handed to Hydra.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qdm_lightning import __version__
from qdm_lightning.base.checks import UserError, one_line
from qdm_lightning.base.checks import folder as check_folder
from qdm_lightning.base.trust import targets
from qdm_lightning.cli.build import CONFIG_FILE, LOCK_FILE, refuse_unknown, stored, stored_folder
from qdm_lightning.cli.compose import (
    VERSION_BASE,
    compose_master,
    hydra_over,
    job_overrides,
    quoted,
    sweep_params,
    typed_overrides,
    without_hydra,
)
from qdm_lightning.cli.help import help_text
from qdm_lightning.cli.messages import explain, is_bad_input
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.cli.sweep import Sweep, launch, plan

BAD_INPUT, INTERRUPTED = 2, 130
"""Exit statuses; 1 is left to faults of ours, which come with a traceback."""

Task = Callable[[DictConfig], Any]


def run(
    config_name: str,
    task: Task,
    check: Task,
    examples: Sequence[tuple[str, str]],
    argv: Sequence[str] | None = None,
    adopt: Callable[[argparse.Namespace, list[str]], list[str]] | None = None,
    sweeps: bool = False,
) -> None:
    """Run a command: parse and check what was typed, then let Hydra call `task` once a job.

    Args:
        config_name: root configuration `conf/<config_name>.yaml`, and name of the module that is run.
        task: takes the composed configuration; imports what is heavy inside itself. Raises UserError at bad input.
        check: is called with every job's configuration before anything is written, and raises at bad input.
        examples: (arguments, what they do) for `--help`.
        argv: arguments instead of `sys.argv[1:]`.
        adopt: prepares the composition from the parsed and the typed arguments and returns those to compose; `run=` is then
            a setting like others, and goes on with nothing.
        sweeps: jobs of a sweep are training runs, each a process of its own (see `sweep`); `task` is not called for them.

    Raises:
        SystemExit: 1 where jobs of a sweep failed, 2 after one line on stderr at bad input, 130 at Ctrl-C; any other error
            passes through.
    """
    typed = [_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    folder: list[Path] = []  # of the job that runs, for the line after Ctrl-C
    try:
        args = _parse(typed)
        if args.help:
            folders = [CONF_DIR, *([Path(args.config_dir)] if args.config_dir else [])]
            print(help_text(config_name, examples, folders))
            return
        if adopt is not None:
            args, typed = _adopted(adopt, args, typed)
        arguments, resume, sweep = _checked(config_name, check, args, typed, resumes=adopt is None)
        if sweeps and sweep is not None:
            launch(config_name, args, typed, sweep)
        else:
            _hand_over(config_name, task, arguments, resume, folder)
    except KeyboardInterrupt:
        _interrupted(config_name, folder)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into an exit
            _interrupted(config_name, folder)
        raise
    except UserError as error:
        _fail(one_line(error))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(BAD_INPUT) from None


def _interrupted(config_name: str, folder: list[Path]) -> NoReturn:
    resumable = folder and (folder[-1] / CONFIG_FILE).is_file()
    hint = f"; to go on: python -m qdm_lightning.{config_name} run={folder[-1]}" if resumable else ""
    print(f"interrupted{hint}", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


def _home(word: str) -> str:
    """`paths.output=~/runs` with the home folder spelt out: shells leave it, Hydra's grammar has no `~` there."""
    name, _, value = word.partition("=")
    return f"{name}={Path(value).expanduser()}" if value == "~" or value.startswith("~/") else word


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)}: --help lists what there is")


def _parse(typed: Sequence[str]) -> argparse.Namespace:
    """Hydra's own flags, with errors of one line."""
    parser = get_args_parser()
    parser.__class__ = _Parser
    if "--version" in typed:
        print(f"qdm_lightning {__version__}")
        raise SystemExit(0)
    args = parser.parse_intermixed_args(list(typed))
    if args.config_path is not None:
        raise UserError("--config-path would hide our options: name the folder of your own with --config-dir")
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir={args.config_dir} is not a folder: give the one that holds your <group>/<option>.yaml")
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun is not supported: type run=<folder of the run>")
    return args


@dataclass(frozen=True)
class _Resume:
    """What `run=` asks for: the run's folder, the foreign `_target_`s that the user trusts, and whether a logger was typed."""

    folder: Path
    trusted: frozenset[str]
    new_logger: bool

    def config(self, composed: DictConfig) -> DictConfig:
        cfg = stored(self.folder, self.trusted)
        if self.new_logger:
            cfg.logger = composed.logger
        return cfg


def _adopted(
    adopt: Callable[[argparse.Namespace, list[str]], list[str]], args: argparse.Namespace, typed: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    try:
        typed = adopt(args, typed)
    except Exception as error:
        if is_bad_input(error):
            raise UserError(explain(error, args.overrides)) from error
        raise
    return _parse(typed), typed


def _checked(
    config_name: str, check: Task, args: argparse.Namespace, typed: list[str], resumes: bool
) -> tuple[list[str], _Resume | None, Sweep | None]:
    """Compose and check every job. Returns the arguments for Hydra, what `run=` asks for if it was typed, and the sweep."""
    if args.hydra_help or args.shell_completion or args.info:
        return typed, None, None
    try:
        parsed = OverridesParser.create().parse_overrides(args.overrides)
        resuming = [str(o.value()) for o in parsed if resumes and o.key_or_group == "run" and o.value() is not None]
        with hydra_over(config_name, args.config_dir) as engine:
            sweep = _check_jobs(
                engine, args.config_name or config_name, refuse_unknown if args.cfg or resuming else check, args
            )
        arguments = [*_flags(typed, args.overrides), *args.overrides]  # in this order: Lightning appends overrides of its own
        if not resuming:
            return arguments, None, None if args.cfg else sweep
        resume = _resume(resuming[-1], parsed, args)
        check(stored(resume.folder, resume.trusted))
        folder = quoted(resume.folder)
        return [*arguments, f"run={folder}", f"hydra.run.dir={folder}", "hydra.output_subdir=null"], resume, None
    except Exception as error:
        if is_bad_input(error):
            raise UserError(explain(error, args.overrides)) from error
        raise


def _flags(typed: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """What of `typed` is not an override."""
    rest = list(overrides)
    return [word for word in typed if not (rest and word == rest[0] and rest.pop(0))]


def _check_jobs(engine: Hydra, config_name: str, check: Task, args: argparse.Namespace) -> Sweep | None:
    """Check the one job, or each job of a sweep, which is returned."""
    master = compose_master(engine, config_name, args.overrides, multirun=args.multirun)
    if not (args.multirun or master.hydra.mode == RunMode.MULTIRUN):
        params = sweep_params(master)
        if params and not args.cfg:
            name = master.hydra.runtime.choices.get("experiment")
            raise UserError(f"experiment={name} is a sweep over {', '.join(params)}: add -m to run it")
        check(without_hydra(cfg := engine.compose_config(config_name, args.overrides, RunMode.RUN)))
        check_folder("hydra.run.dir", cfg.hydra.run.dir)
        return None
    check_folder("hydra.sweep.dir", master.hydra.sweep.dir)
    jobs = job_overrides(engine, master)
    if jobs is None:
        return None
    composed = []
    for number, overrides in enumerate(jobs):
        try:
            cfg = engine.compose_config(config_name, [*typed_overrides(master)["hydra"], *overrides], RunMode.RUN)
            check(without_hydra(cfg))
        except Exception as error:
            if is_bad_input(error):
                raise UserError(f"job {number} ({' '.join(overrides)}): {explain(error, overrides)}") from error
            raise
        composed.append((overrides, cfg))
    return plan(master, composed)


def _resume(run: str, parsed: list[Override], args: argparse.Namespace) -> _Resume:
    """A run goes on with the configuration in its own folder: beside `run=` only the logger may change, and trust be given."""
    if args.multirun:
        raise UserError("run= goes on with one run: leave out -m")
    trusted, new_logger = set(), False
    for override in parsed:
        group, _, rest = override.get_key_element().lstrip("+~").partition(".")
        if rest.endswith("_target_"):
            trusted.add(str(override.value()))
        elif group == "logger":
            new_logger = True
        elif group != "run" and not override.is_hydra_override():
            raise UserError(
                f"{override.input_line} cannot be given with run=, which goes on as the run's own {CONFIG_FILE} says"
            )
    if args.config_dir is not None:
        for file in Path(args.config_dir).rglob("*.yaml"):
            trusted |= {str(target) for _, target in targets(OmegaConf.to_container(OmegaConf.load(file)))}
    return _Resume(stored_folder(run), frozenset(trusted), new_logger)


def _hand_over(config_name: str, task: Task, arguments: list[str], resume: _Resume | None, folder: list[Path]) -> None:
    """Let `hydra.main` run the job(s). Its own errors, rare after our checks, get one line too."""

    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        folder.append(Path(HydraConfig.get().runtime.output_dir))
        try:
            return task(resume.config(cfg) if resume else cfg)
        except UserError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the launcher goes on with the other jobs, then reports it
            if resume is None:
                _discard(folder[-1], Path(cfg.paths.output).expanduser())
            _fail(one_line(error))

    main = hydra.main(version_base=VERSION_BASE, config_path=str(CONF_DIR), config_name=config_name)(job)
    try:
        with _environment(arguments):
            main()
    except UserError:
        raise
    except Exception as error:
        if not folder and is_bad_input(error):
            raise UserError(explain(error, arguments)) from error
        raise


@contextmanager
def _environment(arguments: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv` (as do the processes that Lightning starts), and lets errors through only if told so."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _discard(folder: Path, output: Path) -> None:
    """Remove what Hydra and we wrote for a job that never began, and its folder, and `paths.output`, if they are empty then."""
    for file in [*(folder / ".hydra").glob("*.yaml"), *folder.glob("*.log"), folder / CONFIG_FILE, folder / LOCK_FILE]:
        file.unlink(missing_ok=True)
    for empty in (folder / ".hydra", folder, output):
        with suppress(OSError):  # it holds something else, which stays
            empty.rmdir()
