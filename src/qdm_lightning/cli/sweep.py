"""Sweeps of training runs: which jobs there are, which of them are missing, and how each ended.

The name of a job's folder is a function of its settings: the same command with the same `hydra.sweep.dir` finds what is
done, and runs the rest. What a launcher calls for each job is in `jobs.py`.
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qdm_lightning.base.checks import UserError, one_line
from qdm_lightning.cli.build import CONFIG_FILE
from qdm_lightning.cli.compose import compose_master, hydra_over, quoted
from qdm_lightning.cli.jobs import finished, run_job
from qdm_lightning.cli.schema import job_name

FAILED, INTERRUPTED = 1, 130
"""Exit statuses."""


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its overrides, and its folder."""

    overrides: list[str]
    folder: Path

    @property
    def finished(self) -> bool:
        return finished(self.folder)


@dataclass(frozen=True)
class Sweep:
    """All jobs of a sweep, in order, and the folder that holds theirs."""

    folder: Path
    jobs: list[Job]


def plan(master: DictConfig, composed: Sequence[tuple[list[str], DictConfig]]) -> Sweep:
    """The sweep that a command describes.

    Args:
        master: configuration of the whole command.
        composed: overrides and configuration of each job, Hydra's node included.

    Raises:
        UserError: two jobs would share a folder, or a job's folder holds a run with other settings.
    """
    root = Path(_resolved(master, "hydra.sweep.dir")).absolute()
    jobs: list[Job] = []
    for number, (overrides, cfg) in enumerate(composed):
        OmegaConf.set_struct(cfg, False)
        cfg.hydra.job.num = cfg.hydra.job.id = number
        job = Job(overrides, root / _resolved(cfg, "hydra.sweep.subdir"))
        for other in jobs:
            if other.folder == job.folder:
                raise UserError(f"two jobs are the same run: {_words(other.overrides)} and {_words(overrides)}; leave one out")
        _check_folder(job.folder, cfg)
        jobs.append(job)
    return Sweep(root, jobs)


def _words(overrides: Sequence[str]) -> str:
    return f"({' '.join(overrides)})"


def _resolved(cfg: DictConfig, key: str) -> str:
    """A value of Hydra's own node, `${hydra:...}` in it too."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        return str(OmegaConf.select(cfg, key))
    finally:
        HydraConfig.instance().cfg = before


def _check_folder(folder: Path, cfg: DictConfig) -> None:
    file = folder / CONFIG_FILE
    if file.is_file() and _name_of(file) != job_name(cfg):
        raise UserError(f"{file} is of another run: give another hydra.sweep.dir, or remove that folder")


def _name_of(file: Path) -> str | None:
    stored = OmegaConf.load(file)
    try:
        return job_name(stored) if isinstance(stored, DictConfig) else None
    except (OmegaConfBaseException, AttributeError, TypeError):
        return None  # no configuration of ours


def launch(config_name: str, args: argparse.Namespace, typed: Sequence[str], sweep: Sweep) -> None:
    """Run the jobs that are not finished, by the launcher that was chosen, and tell how each ended.

    Args:
        config_name: name of the command.
        args: Hydra's flags and the overrides.
        typed: all of the arguments, for the line that says how to go on.

    Raises:
        SystemExit: 1 if a job is not finished at the end, 130 at Ctrl-C or SIGTERM.
    """
    missing = [job for job in sweep.jobs if not job.finished]
    for job in sweep.jobs:
        if job.finished:
            print(f"skipped, it is there: {job.folder.name}")
    reasons: dict[Path, str] = {}
    words = [word for word in typed if not word.startswith("hydra.sweep.dir=")]
    where = f"hydra.sweep.dir={_shown(sweep.folder)}"
    if not re.fullmatch(r"[\w.=/+-]+", where):
        where = f"hydra.sweep.dir={quoted(_shown(sweep.folder))}"
    same = f"python -m qdm_lightning.{config_name} {shlex.join([*words, where])}"
    interrupted = False
    if missing:
        try:
            with _sigterm_interrupts():
                reasons = _launch(config_name, args, sweep, missing)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        print(f"interrupted; to go on: {same}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    _close(sweep, reasons, same)


def _launch(config_name: str, args: argparse.Namespace, sweep: Sweep, missing: Sequence[Job]) -> dict[Path, str]:
    """Hand the jobs to Hydra's launcher, and return why jobs failed, by folder."""
    task = functools.partial(run_job, config_dir=args.config_dir, count=len(sweep.jobs))
    overrides = [*args.overrides, f"hydra.sweep.dir={quoted(sweep.folder)}"]
    reasons: dict[Path, str] = {}
    with hydra_over(config_name, args.config_dir) as engine:
        master = compose_master(engine, args.config_name or config_name, overrides, multirun=True, log=True)
        callbacks = Callbacks(master)
        callbacks.on_multirun_start(config=master, config_name=config_name)
        context = HydraContext(config_loader=engine.config_loader, callbacks=callbacks)
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)
        folder = Path(master.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(master, folder / "multirun.yaml")
        size = master.hydra.sweeper.max_batch_size or len(missing)
        for first in range(0, len(missing), size):
            batch = missing[first : first + size]
            try:
                ended = launcher.launch([job.overrides for job in batch], initial_job_idx=first)
            except Exception as error:  # noqa: BLE001 each launcher has its own, for a process that it lost
                print(f"{type(error).__name__}: {one_line(error)}", file=sys.stderr)
                continue
            for job, result in zip(batch, ended, strict=True):
                reasons[job.folder] = _reason(result)
        callbacks.on_multirun_end(config=master, config_name=config_name)
    return reasons


def _reason(result: Any) -> str:
    """Why a job failed, empty where it did not."""
    if result.status == JobStatus.COMPLETED:
        return str(result.return_value)
    return f"{type(result._return_value).__name__}: {one_line(result._return_value)}"


def _close(sweep: Sweep, reasons: dict[Path, str], same: str) -> None:
    failed = [job for job in sweep.jobs if not job.finished]
    print(f"{len(sweep.jobs) - len(failed)} of {len(sweep.jobs)} jobs are done: {sweep.folder}", flush=True)
    for job in failed:
        print(f"failed: {job.folder.name}: {reasons.get(job.folder) or 'its process was lost'}", file=sys.stderr)
    if failed:
        print(f"to run what is missing: {same}", file=sys.stderr)
        raise SystemExit(FAILED)
    print(f"next: python -m qdm_lightning.report {shlex.quote(_shown(sweep.folder))}")


def _shown(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does, its jobs with it."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
