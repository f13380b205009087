"""The command that trains: a new run, one that goes on, a job of a sweep and a rank that Lightning starts are one path.

compose -> validate -> build -> write config.yaml -> run(folder)
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.app import Command
from qdm_lightning.cli.build import build, check_one_folder
from qdm_lightning.cli.compose import (
    before_it_began,
    composed,
    for_shell,
    given_beside_run,
    parse,
    parsed,
    stored,
    trusted,
    without_hydra,
)
from qdm_lightning.cli.schema import plain
from qdm_lightning.cli.validate import refuse_unknown
from qdm_lightning.diffusion.spec import SCHEDULES
from qdm_lightning.runs.folder import CONFIG, check_free, check_same, opened, run_folder

if TYPE_CHECKING:
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.training.experiment import Experiment
    from qdm_lightning.training.run import Result


def train(cfg: DictConfig | Sequence[str], progress: Progress | None = None) -> Result:
    """Build the experiment that `cfg` describes and run it in its folder; a folder that holds that very run is gone on with.

    Args:
        cfg: what is typed after `python -m qdm_lightning.train`, such as ["quant=w3a3", "seed=1"], or ["run=FOLDER"] to go on
            with a run; or a configuration composed from `conf/train.yaml`.
        progress: where stages are shown; None chooses by the terminal.

    Returns:
        Metrics (as in `metrics.json`), run folder and networks.

    Raises:
        UserError: bad input, found before the first stage began.
    """
    from qdm_lightning.display.progress import Progress

    progress = progress or Progress()
    with before_it_began(progress):
        if not isinstance(cfg, DictConfig):
            cfg = _as_typed(cfg)
        check_one_folder(cfg, typed=False)
        return _run(build(cfg), progress)


def _as_typed(words: Sequence[str]) -> DictConfig:
    """The configuration of one run from what would be typed. Raises UserError at what only the command can do."""
    if isinstance(words, str):
        raise UserError(f"train({words!r}): give a list of overrides, such as train([{words!r}])")
    args = parse(words)
    for override in parsed(args.overrides):
        if args.multirun or override.is_hydra_override() or override.is_sweep_override():
            raise UserError(f"{override.input_line}: one run at a time from Python, in a new folder below paths.output")
    cfg = without_hydra(composed("train", args.overrides, args.config_dir))
    if cfg.run is None:
        return cfg
    if len(args.overrides) > 1:
        raise UserError(f"run={cfg.run} goes on as the run's own {CONFIG} says: leave the rest out")
    return stored(cfg.run)


def _run(experiment: Experiment, progress: Progress) -> Result:
    from qdm_lightning.training.run import run

    with opened(experiment.run_dir, experiment.resolved) as experiment.resume:
        return run(experiment, progress)


def _check_schedule_found(experiment: Experiment) -> None:
    """Raise UserError where no file says on which noise schedule the teacher was trained: the default would be a guess."""
    from qdm_lightning.training.teacher import without_schedule

    if name := without_schedule(experiment):
        own = " ".join(f"diffusion.{k}={v}" for k, v in asdict(experiment.diffusion).items())
        raise UserError(
            f"{name} has no scheduler_config.json beside it, so the noise schedule that it was trained on is not known: "
            f"type it, such as {own} (beta_schedule is one of {', '.join(SCHEDULES)})"
        )


def _flags(args: argparse.Namespace) -> list[str]:
    """Of the command, those that another one about the same configuration needs."""
    return [f"--config-dir={args.config_dir}"] if args.config_dir else []


class Training(Command):
    """`python -m qdm_lightning.train`."""

    processes = True
    folder: str | None = None
    stored: DictConfig | None = None
    new_logger = False
    schedule_typed = False
    typed_paths: Sequence[str] = ()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.told: list[str] = []  # about what the stored configuration names outside its folder

    def adopt(self, args: argparse.Namespace) -> None:
        """With `run=`, read that run's folder: beside it only the logger and the paths may change, and trust be given."""
        typed = parsed(args.overrides)
        self.schedule_typed = any(o.key_or_group.startswith("diffusion.") for o in typed)
        self.folder = next((str(o.value()) for o in typed if o.key_or_group == "hydra.run.dir"), None)
        runs = [str(o.value()) for o in typed if o.key_or_group == "run" and o.value() is not None]
        if not runs:
            return
        if args.multirun:
            raise UserError("run= goes on with one run: leave out -m")
        folder = run_folder(runs[-1])
        for override in typed:
            group, _, rest = override.get_key_element().lstrip("+~").partition(".")
            self.new_logger |= group == "logger"
            if not (group in ("logger", "run", "paths") or rest.endswith("_target_") or override.is_hydra_override()):
                raise UserError(
                    f"{override.input_line} cannot be given with run=, which goes on as the run's own {CONFIG} says"
                )
        self.typed_paths = [name for o in typed if (name := o.get_key_element()).startswith("paths.")]
        self.stored = stored(folder, trusted(typed, args.config_dir), self.typed_paths, self.told.append)

    def check(self, cfg: DictConfig) -> Experiment:
        """The experiment that a job trains: that of `cfg`, or of the run that goes on."""
        refuse_unknown(cfg)
        if self.stored is not None:
            cfg, composed = self.stored, cfg
            if self.new_logger:
                cfg.logger = composed.logger
            for name in self.typed_paths:
                OmegaConf.update(cfg, name, OmegaConf.select(composed, name))
        check_one_folder(cfg, typed=self.folder is not None)
        experiment = build(cfg)
        if self.stored is None and not self.schedule_typed:
            _check_schedule_found(experiment)
        typed = self.folder or (cfg.run if self.stored is not None else None)
        folder = None if typed is None else Path(typed).expanduser().absolute()
        if folder is not None and (folder / CONFIG).is_file():
            check_same(folder, plain(cfg))
            check_free(folder)
        return experiment

    def again(self, words: Sequence[str], folder: Path | None) -> str:
        """`run=` where the run has begun."""
        if folder is None or not (folder / CONFIG).is_file():
            return super().again(words, folder)
        args = parse(words)
        beside = [*_flags(args), *given_beside_run(args.overrides)]
        return " ".join(["python -m qdm_lightning.train", *map(shlex.quote, beside), for_shell("run", folder)])

    def work(self, experiment: Experiment, folder: Path) -> None:
        """Train in the folder that Hydra made."""
        from qdm_lightning.display.progress import Progress

        progress = Progress()
        for line in self.told:
            progress.say(line)
        experiment.run_dir = folder
        with before_it_began(progress):
            result = _run(experiment, progress)
        args = parse(sys.argv[1:])
        self.show(result, [*_flags(args), *args.overrides] if self.stored is None else None)
