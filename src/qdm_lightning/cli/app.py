"""What every command does around its work: help, checks before anything is written, one line and status 2 for bad input.

    compose -> validate -> build -> Hydra makes the folder -> run(folder)

Hydra creates a run folder before it calls the task. So each job, also every job of a sweep, is composed and built here first
(`Command.check`), and what was built is handed to the work itself once Hydra has made the folder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qdm_lightning import __version__
from qdm_lightning.base import signals
from qdm_lightning.base.checks import UserError, one_line
from qdm_lightning.base.checks import folder as check_folder
from qdm_lightning.base.pipes import while_read
from qdm_lightning.base.ranks import rank
from qdm_lightning.cli.compose import VERSION_BASE, check_options, composed, explained, parse, parsed, without_hydra
from qdm_lightning.cli.help import help_text
from qdm_lightning.cli.messages import about_a_file, is_about_a_file
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.cli.typed import as_text, refuse_what_changes_nothing
from qdm_lightning.cli.validate import refuse_unknown
from qdm_lightning.runs.folder import held

BAD_INPUT, FAILED = 2, 1
"""Exit statuses; 1 is of faults of ours, which come with a traceback, and, after one line, of files that cannot be written any
more, and of sweeps with jobs that failed."""


class Command:
    """An entry point, `python -m qdm_lightning.<name>`.

    Args:
        name: root configuration `conf/<name>.yaml`, and the module that is run.
        examples: (arguments, what they do) for `--help`.
        show: tells the user what the work came to.
    """

    processes = False
    """Whether jobs of a sweep are training runs, each a process of its own (see `sweep`)."""

    def __init__(self, name: str, examples: Sequence[tuple[str, str]], show: Callable[..., None]) -> None:
        self.name, self.examples, self.show = name, examples, show

    def adopt(self, args: argparse.Namespace) -> None:
        """Look at what was typed before anything is composed; a command about an earlier run reads its configuration here."""

    def check(self, cfg: DictConfig) -> Any:
        """Check a job's configuration before anything is written; returns what `work` takes. Raises at bad input."""
        raise NotImplementedError

    def work(self, built: Any, folder: Path) -> None:
        """Do a job, from what `check` returned and the folder that Hydra made. Raises UserError at bad input."""
        raise NotImplementedError

    def again(self, words: Sequence[str], folder: Path | None) -> str:
        """The command that goes on with an interrupted one, for a shell.

        Args:
            words: what was typed.
            folder: Hydra's; None where the job had not begun.
        """
        return shlex.join(["python", "-m", f"qdm_lightning.{self.name}", *words])

    def main(self) -> None:
        """Run the command as it was typed, `sys.argv`.

        Raises:
            SystemExit: 1 where jobs of a sweep failed, 2 after one line on stderr at bad input, 128 + its number at a signal,
                such as 130 at Ctrl-C and 143 at SIGTERM, 1 after one line where the work had begun and a file could not be
                written or read any more; any other error passes through.
        """
        job = Job(self)
        with signals.handled():
            try:
                with while_read():
                    _main(job, sys.argv[1:])
            except KeyboardInterrupt as error:
                job.interrupted(error)
            except SystemExit as end:
                if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into an exit
                    job.interrupted(end.__context__)
                raise
            except UserError as error:
                fail(error)


def fail(error: object) -> NoReturn:
    """Say what was wrong with the input in one line, and end."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(BAD_INPUT) from None


def _main(job: Job, words: Sequence[str]) -> None:
    name = job.command.name
    if "--version" in words:
        print(f"qdm_lightning {__version__}")
        return
    sys.argv[1:] = _as_hydra_reads_it(words, parse(words).overrides)  # which Hydra reads, and the ranks that Lightning starts
    args = job.args = parse(sys.argv[1:])
    if args.help:
        folders = [CONF_DIR, *([Path(args.config_dir)] if args.config_dir else [])]
        print(help_text(name, job.command.examples, folders))
        return
    if not (args.hydra_help or args.shell_completion or args.info):
        with explained(args.overrides):
            job.check_typed(args.config_name or name)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra lets errors through instead of printing them its own way
    try:
        hydra.main(version_base=VERSION_BASE, config_path=str(CONF_DIR), config_name=name)(job)()
    except Exception:
        if job.folder is not None:  # it began: what went wrong is no bad input
            raise
        with explained(args.overrides):
            raise


def _as_hydra_reads_it(words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """What was typed in Hydra's grammar, flags first: text in quotes where it would be read as a number or not at all, and the
    home folder where the shell has left a `~` (`paths.output=~/runs`)."""
    rest = list(overrides)
    flags = [word for word in words if not (rest and word == rest[0] and rest.pop(0))]
    return [*flags, *(as_text(_home(word)) for word in overrides)]


def _home(word: str) -> str:
    name, _, value = word.partition("=")
    return f"{name}={Path(value).expanduser()}" if value == "~" or value.startswith("~/") else word


class Job:
    """What Hydra calls once a job. It keeps what was built when the job was checked, so that nothing is built twice."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.args = argparse.Namespace()
        self.built: dict[int, Any] = {}  # by the job's number in its sweep; 0 of a job alone
        self.folder: Path | None = None  # of the job that runs, for the line after Ctrl-C
        self.new_folder = True
        self.__module__ = f"qdm_lightning.{command.name}"  # Hydra names the job, and its log file, by it

    def check_typed(self, config_name: str) -> None:
        """Compose and check the one job that was typed; a sweep's jobs are checked by the sweep."""
        args, command = self.args, self.command
        overrides = parsed(args.overrides)
        check_options(args.config_dir)
        refuse_what_changes_nothing(overrides, config_name)
        command.adopt(args)
        if args.multirun or any(o.key_or_group == "hydra.mode" and o.value() == "MULTIRUN" for o in overrides):
            return
        cfg = composed(config_name, args.overrides, args.config_dir)
        settings, params = without_hydra(cfg), OmegaConf.to_container(cfg.hydra.sweeper).get("params")  # type: ignore[union-attr]
        if args.cfg:
            refuse_unknown(settings)
        elif params:
            name = cfg.hydra.runtime.choices.get("experiment")
            raise UserError(f"experiment={name} is a sweep over {', '.join(params)}: add -m to run it")
        else:
            self.check(settings)
            check_folder("hydra.run.dir", cfg.hydra.run.dir)
            self.new_folder = not Path(cfg.hydra.run.dir).exists()

    def check(self, cfg: DictConfig, number: int = 0) -> None:
        """Check a job, and keep what was built. Raises whatever the command's check raises at bad input."""
        self.built[number] = self.command.check(cfg)

    def __call__(self, cfg: DictConfig) -> Any:
        """Do a job in the folder that Hydra made."""
        settings = HydraConfig.get()
        self.folder = Path(settings.runtime.output_dir)
        alone = settings.mode is None or settings.mode.name == "RUN"
        try:
            number = 0 if alone else int(settings.job.num)
            built = self.built.pop(number) if number in self.built else self.command.check(cfg)
            return self.command.work(built, self.folder)
        except UserError as error:
            if not alone:
                raise  # the launcher goes on with the other jobs, then reports it
            if self.new_folder and not rank():
                _discard(self.folder)
            fail(error)
        except OSError as error:
            if not (alone and is_about_a_file(error)):
                raise
            self.cut_short(error)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "built": {}}  # a launcher's other process builds its own

    def cut_short(self, error: OSError) -> NoReturn:
        """Say which file could not be written, and how to go on, and end."""
        print(
            f"error: {one_line(about_a_file(error))}; to go on: {self.command.again(sys.argv[1:], self.folder)}",
            file=sys.stderr,
        )
        raise SystemExit(FAILED) from None

    def interrupted(self, error: KeyboardInterrupt) -> NoReturn:
        """Say how to go on, and end."""
        number = error.number if isinstance(error, signals.Interrupted) else signal.SIGINT
        if not rank():
            print(f"interrupted; to go on: {self.command.again(sys.argv[1:], self.folder)}", file=sys.stderr)
        signals.requeue(number)
        raise SystemExit(signals.status(number)) from None


def _discard(folder: Path) -> None:
    """Remove the folder of a job that never began, which was made for it, and the one above if it is empty then.

    With checkpoints in it the folder stays as it is: that run can go on. So does one in which another process trains.
    """
    with suppress(UserError), held(folder):
        if any(folder.glob("checkpoints/*")):
            return
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # it holds something else, which stays
            folder.parent.rmdir()
