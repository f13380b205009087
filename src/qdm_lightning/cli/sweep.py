"""Sweeps: which jobs there are, all of them checked before the first one starts; which are missing, and how each ended.

The name of a training run's folder is a function of its settings: the same command with the same `hydra.sweep.dir` finds what
is done, and runs the rest. What happens for each job is in `jobs.py`. Hydra calls `sweep` by `hydra/sweeper=checked`, its
plugin `hydra_plugins.qdm_lightning_sweeper`.
"""

from __future__ import annotations

import functools
import itertools
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qdm_lightning.base import signals
from qdm_lightning.base.checks import UserError, one_line
from qdm_lightning.base.checks import folder as check_folder
from qdm_lightning.cli.app import FAILED, Job
from qdm_lightning.cli.compose import explained, for_shell, settings, without_hydra
from qdm_lightning.cli.jobs import end_jobs, launched, run_job
from qdm_lightning.cli.schema import job_name
from qdm_lightning.runs.folder import CONFIG, is_finished, read_config


@dataclass(frozen=True)
class Plan:
    """One job of a sweep: its overrides, its configuration with Hydra's node, and the folder of a training run."""

    overrides: list[str]
    cfg: DictConfig
    folder: Path


def sweep(job: Job, loader: ConfigLoader, launcher: Any, master: DictConfig, arguments: Sequence[str]) -> Any:
    """Check every job of a sweep, then run those that are missing.

    Args:
        job: of the command.
        loader: composes a job.
        launcher: makes the launcher that was chosen, from the function that it calls for each job.
        master: configuration of the whole command.
        arguments: overrides as typed, Hydra's own left out.

    Raises:
        UserError: a bad job; nothing was started.
        SystemExit: 1 if a training run is not finished at the end, 128 + its number at a signal.
    """
    check_folder("hydra.sweep.dir", master.hydra.sweep.dir)
    plans = [_checked(job, number, words, loader, master) for number, words in enumerate(_jobs(loader, master, arguments))]
    if not plans:
        raise UserError(f"{' '.join(arguments)} makes no job: an axis has no value")
    if not job.command.processes:
        results = launcher(task_function=job).launch([plan.overrides for plan in plans], initial_job_idx=0)
        return [result.return_value for result in results]
    _check_apart(plans)
    _train(job, plans, launcher, master)
    return None


def _jobs(loader: ConfigLoader, master: DictConfig, arguments: Sequence[str]) -> list[list[str]]:
    """Overrides of each job: what is typed wins over what the configuration itself sweeps over (`hydra.sweeper.params`).

    An experiment that sweeps over experiments stands for them: its own name is none of its jobs'.
    """
    params = OmegaConf.to_container(master.hydra.sweeper).get("params") or {}  # type: ignore[union-attr]
    parser = OverridesParser.create(config_loader=loader)
    typed = [
        o for o in parser.parse_overrides(list(arguments)) if not ("experiment" in params and o.key_or_group == "experiment")
    ]
    axes: dict[str, list[str]] = {}
    for override in [*parser.parse_overrides([f"{key}={value}" for key, value in params.items()]), *typed]:
        swept = override.is_sweep_override()
        values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        axes[override.get_key_element()] = [f"{override.get_key_element()}={value}" for value in values]
    return [list(words) for words in itertools.product(*axes.values())]


def _checked(job: Job, number: int, words: list[str], loader: ConfigLoader, master: DictConfig) -> Plan:
    try:
        with explained(words):
            cfg = loader.load_sweep_config(master, words)
            job.check(without_hydra(cfg), number)
    except UserError as error:
        raise UserError(f"job {number} ({' '.join(words)}): {error}") from error
    OmegaConf.set_struct(cfg, False)
    cfg.hydra.job.num = cfg.hydra.job.id = number
    root = Path(_resolved(master, "hydra.sweep.dir")).absolute()
    return Plan(words, cfg, root / _resolved(cfg, "hydra.sweep.subdir"))


def _resolved(cfg: DictConfig, key: str) -> str:
    """A value of Hydra's own node, `${hydra:...}` in it too."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        return str(OmegaConf.select(cfg, key))
    finally:
        HydraConfig.instance().cfg = before


def _check_apart(plans: Sequence[Plan]) -> None:
    """Raise UserError where two jobs would share a folder, or a job's folder holds a run with other settings."""
    taken: dict[Path, Plan] = {}
    for plan in plans:
        other = taken.setdefault(plan.folder, plan)
        if other is not plan:
            raise UserError(
                f"two jobs are the same run: ({' '.join(other.overrides)}) and ({' '.join(plan.overrides)}); leave one out"
            )
        if (plan.folder / CONFIG).is_file() and _name_of(plan.folder) != job_name(plan.cfg):
            raise UserError(f"{plan.folder / CONFIG} is of another run: give another hydra.sweep.dir, or remove that folder")


def _name_of(folder: Path) -> str | None:
    """Name of the run that lies there; None where it is no configuration of ours."""
    try:
        return job_name(settings(read_config(folder)))
    except (OmegaConfBaseException, AttributeError, KeyError, TypeError, ValueError):
        return None


def _train(job: Job, plans: Sequence[Plan], launcher: Any, master: DictConfig) -> None:
    """Run the jobs that are not finished, and tell how each ended."""
    missing = [plan for plan in plans if not is_finished(plan.folder)]
    for plan in plans:
        if plan not in missing:
            print(f"skipped, it is there: {plan.folder.name}")
    root = Path(_resolved(master, "hydra.sweep.dir")).absolute()
    words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweep.dir=")]
    same = f"python -m qdm_lightning.{job.command.name} {shlex.join(words)} {for_shell('hydra.sweep.dir', _shown(root))}"
    reasons: dict[Path, str] = {}
    if missing:
        print(_what_it_takes(missing), flush=True)
        root.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(master, root / "multirun.yaml")
        ended_by: int | None = None
        try:
            _launch(missing, [plan.folder for plan in plans], job.args.config_dir, launcher, master, reasons)
        except KeyboardInterrupt as error:
            ended_by = error.number if isinstance(error, signals.Interrupted) else signal.SIGINT
        if ended_by is not None:  # outside of the except block, or `Command.main` would speak too
            print(f"interrupted; to go on: {same}", file=sys.stderr)
            raise SystemExit(signals.status(ended_by))
    failed = [plan for plan in plans if not is_finished(plan.folder)]
    print(f"{len(plans) - len(failed)} of {len(plans)} jobs are done: {root}", flush=True)
    for plan in failed:
        print(f"failed: {plan.folder.name}: {reasons.get(plan.folder) or 'its process was lost'}", file=sys.stderr)
    if failed:
        print(f"to run what is missing: {same}", file=sys.stderr)
        raise SystemExit(FAILED)
    print(f"next: python -m qdm_lightning.report {shlex.quote(_shown(root))}")


def _what_it_takes(missing: Sequence[Plan]) -> str:
    """The work of the jobs, as they say it; how long it takes is known once one of them is done."""
    steps = sum(plan.cfg.trainer.max_steps for plan in missing if plan.cfg.quant.mode == "qat")
    images = sum(plan.cfg.num_samples for plan in missing)
    return f"plan: {len(missing)} jobs, together {steps:,} training steps and {images:,} images"


def _launch(
    missing: Sequence[Plan],
    folders: Sequence[Path],
    config_dir: str | None,
    launcher: Any,
    master: DictConfig,
    reasons: dict[Path, str],
) -> None:
    """Run the jobs, one after another or by the launcher that was chosen; why jobs failed goes into `reasons`, by folder."""
    options: dict[str, Any] = {"config_dir": config_dir, "folders": folders}
    if str(master.hydra.launcher._target_).endswith(".BasicLauncher"):
        for plan in missing:
            reasons[plan.folder] = run_job(plan.folder, without_hydra(plan.cfg), plan.cfg.hydra, **options)
        return
    chosen: Launcher = launcher(task_function=functools.partial(launched, **options))
    size = master.hydra.sweeper.max_batch_size or len(missing)
    for first in range(0, len(missing), size):
        batch = missing[first : first + size]
        try:
            with signals.before_the_end(end_jobs):
                ended = chosen.launch([plan.overrides for plan in batch], initial_job_idx=first)
        except Exception as error:  # noqa: BLE001 each launcher has its own, for a process that it lost
            print(f"{type(error).__name__}: {one_line(error)}", file=sys.stderr)
            continue
        reasons |= {plan.folder: _reason(result) for plan, result in zip(batch, ended, strict=True)}


def _reason(result: JobReturn) -> str:
    """Why a job failed, empty where it did not."""
    if result.status == JobStatus.COMPLETED:
        return str(result.return_value)
    return f"{type(result._return_value).__name__}: {one_line(result._return_value)}"


def _shown(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
