"""What the commands about an earlier run share: its stored configuration is the base, and what may be typed over it.

A run's training settings are never recomposed from defaults: they come out of its own folder, which is read once. Groups that
such a command offers (`sampler`, `metrics`) have an option `stored`: what the run used, taken when nothing is typed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.app import Command
from qdm_lightning.cli.build import build
from qdm_lightning.cli.compose import before_it_began, composed, parsed, stored, trusted, without_hydra
from qdm_lightning.cli.messages import quoted
from qdm_lightning.cli.schema import TrainConfig, plain, register_root
from qdm_lightning.cli.validate import refuse_unknown
from qdm_lightning.diffusion.spec import SamplerConfig
from qdm_lightning.runs.folder import check_there
from qdm_lightning.training.spec import PathsConfig

if TYPE_CHECKING:
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.training.experiment import Experiment

GROUPS = ("sampler", "metrics", "logger")
"""Config groups that have the option `stored`."""

LOCATIONS = ("root", "path", "cache", "synsets", "verify", "download")
"""Settings of `data` that say where it lies: it may have moved since the run. The others belong to training."""


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


class RunCommand(Command):
    """A command about an earlier run.

    Args:
        name, examples, show: see `Command`; `show` is given what `do` returned, and the settings.
        schema: root of `conf/<name>.yaml`.
        do: does the job, from the run's experiment (with `others`, a list of all runs' experiments), the settings as an
            object of `schema`, and a display of its stages.
        others: settings to the folders of further runs that are worked on beside the run; None where there are none.
        from_file: an exported file to what stands in the place of a run's configuration, where `file=` alone is enough; `do`
            is then given None for the experiment.
    """

    def __init__(
        self,
        name: str,
        schema: type[RunConfig],
        do: Callable[[Any, Any, Progress], Any],
        show: Callable[[Any, Any], None],
        examples: Sequence[tuple[str, str]],
        others: Callable[[Any], list[str]] | None = None,
        from_file: Callable[[str], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(name, examples, show)
        self.schema, self.do, self.others, self.from_file = schema, do, others, from_file
        self.base: DictConfig | None = None
        self.told: list[str] = []  # about what the stored configuration names outside its folder
        register_root(name, schema)
        self.register()

    def __call__(self, run: str | Path | None, overrides: Sequence[str] = (), progress: Progress | None = None) -> Any:
        """Do the command's work from Python.

        Args:
            run: folder of the run; None where an exported file takes its place.
            overrides: what else would be typed.
            progress: where stages are shown; None chooses by the terminal.

        Raises:
            UserError, ValueError, FileNotFoundError: bad input, found before the first stage began.
        """
        return self._done(self.check(self.compose(run, overrides)), progress)

    def compose(self, run: str | Path | None, overrides: Sequence[str] = ()) -> DictConfig:
        """The configuration that `python -m qdm_lightning.<name> run=<run> <overrides>` would run."""
        words = [*([] if run is None else [f"run={quoted(Path(run))}"]), *overrides]
        self.adopt(argparse.Namespace(overrides=words, config_dir=None, cfg=None))
        try:
            return without_hydra(composed(self.name, words))
        finally:
            self.register()  # what was typed for this call is trusted in no other

    def register(self, extra: dict[str, str] | None = None) -> None:
        """Tell Hydra's ConfigStore the root `base_<name>` and the options `stored`, from the configuration of the run.

        Args:
            extra: `_target_`s of the run's own nodes that were typed, which only says that they are trusted.
        """
        store, values = ConfigStore.instance(), {} if self.base is None else plain(self.base)
        root = OmegaConf.structured(self.schema)
        OmegaConf.set_struct(root.sampler.scheduler, False)  # any argument of the scheduler: no `+` to type
        root.data, root.paths = values.get("data", {}), PathsConfig(**values.get("paths", {}))
        for key, target in (extra or {}).items():
            OmegaConf.update(root, key, target, force_add=True)
            root.trust.append(target)
        store.store(name=f"base_{self.name}", node=root)
        for group in GROUPS:
            store.store(group=group, name="stored", node=values.get(group) or {})

    def adopt(self, args: argparse.Namespace) -> None:
        """Read the run's folder, and take what it says as the base of what is composed."""
        typed = [o for o in parsed(args.overrides) if not o.is_hydra_override()]
        runs = [o for o in typed if o.key_or_group == "run"]
        files = [o for o in typed if o.key_or_group == "file" and o.value() is not None]
        if self.from_file and files:
            if runs:
                raise UserError(f"{runs[-1].input_line}: {files[-1].input_line} needs no run, leave it out")
            self.base = OmegaConf.create(self.from_file(str(files[-1].value())))
            self.register()
            return
        if not runs or runs[-1].value() is None:
            if args.cfg:
                return
            which = "a run" if not files else f"the run that {files[-1].value()} was exported from"
            raise UserError(f"run is missing: type run=<folder of {which}>")
        if runs[-1].is_sweep_override():
            raise UserError(f"{runs[-1].input_line}: one run at a time")
        extra = _of_training(typed, {f.name for f in fields(self.schema)})
        lists = [o.value() for o in typed if o.key_or_group == "trust"]
        named = [str(target) for value in lists if isinstance(value, list) for target in value]
        self.told.clear()
        keys = [o.get_key_element() for o in typed]
        self.base = stored(str(runs[-1].value()), {*trusted(typed, args.config_dir), *named}, keys, self.told.append)
        self.register(extra)

    def check(self, cfg: DictConfig) -> tuple[Any, Any]:
        """The run's experiment (or experiments) and the settings of the command; all that can be checked is.

        Raises:
            UserError, ValueError, FileNotFoundError, OmegaConfBaseException: bad settings, or a run without a teacher.
        """
        for name in {str(key) for key in cfg} & ({f.name for f in fields(TrainConfig)} - {f.name for f in fields(self.schema)}):
            OmegaConf.set_struct(cfg, False)
            cfg.pop(name)  # a trusted `_target_` of the run's own
        refuse_unknown(cfg)
        settings, base = OmegaConf.to_object(cfg), self.base
        assert base is not None
        if "run" not in base:
            return None, settings
        experiments = [self._experiment(cfg, base)]
        for other in self.others(settings) if self.others else ():
            theirs = stored(other, cfg.trust, say=self.told.append)
            copied = cfg.copy()
            OmegaConf.set_struct(copied, False)
            copied.data = plain(theirs)["data"]
            copied.paths.update(plain(theirs)["paths"])
            experiments.append(self._experiment(copied, theirs))
        return experiments if self.others else experiments[0], settings

    def _experiment(self, cfg: DictConfig, base: DictConfig) -> Experiment:
        """The run's stored configuration with what may be typed over it; the network comes from the run's own folder."""
        teacher = Path(base.run) / "teacher"
        if not (teacher / "unet" / "config.json").is_file():
            raise UserError(f"run={base.run} has no teacher yet: python -m qdm_lightning.train run={base.run} goes on with it")
        values, base = plain(cfg), base.copy()
        base.data, base.callbacks, base.logger = values["data"], {}, values.get("logger") or {}
        base.metrics = values.get("metrics") or {"_target_": None}  # a command that scores nothing loads no feature network
        for group in ("sampler", "paths"):
            base[group].update(values[group])
        base.model = {"_target_": "qdm_lightning.models.diffusers_io.load_unet", "path": str(teacher)}
        if base.teacher.source != "auto":
            base.teacher.path = str(teacher)
        base.trainer.accelerator, base.trainer.devices = values["accelerator"], 1
        for name in ("threads", "compile"):
            if values[name] is not None:
                base.trainer[name] = values[name]
        return build(base)

    def _done(self, checked: tuple[Any, Any], progress: Progress | None = None) -> Any:
        from qdm_lightning.display.progress import Progress

        progress = progress or Progress()
        assert self.base is not None
        for line in self.told:
            progress.say(line)
        with before_it_began(progress):
            result = self.do(*checked, progress)
        if "run" in self.base:  # not of an exported file
            check_there(Path(self.base.run))
        return result

    def work(self, checked: tuple[Any, Any], folder: Path) -> None:
        """Do the job and show what it came to. What an interrupted one has done is kept."""
        self.show(self._done(checked), checked[1])


def _of_training(typed: Iterable[Override], own: set[str]) -> dict[str, str]:
    """The `_target_`s of the run's own nodes that were typed. Raises UserError at any other setting of training."""
    extra = {}
    for override in typed:
        group, _, rest = override.get_key_element().lstrip("+~").partition(".")
        if rest.rpartition(".")[2] == "_target_":
            if group not in own:
                extra[f"{group}.{rest}"] = str(override.value())
        elif group == "data" and rest not in LOCATIONS:
            raise UserError(
                f"{override.input_line} belongs to the run, whose own configuration says it: here data may only be looked for "
                f"elsewhere, by {', '.join(f'data.{name}=' for name in LOCATIONS)}"
            )
        elif group not in own and group in {f.name for f in fields(TrainConfig)}:
            raise UserError(
                f"{override.input_line} belongs to training, the run's own configuration says it: train another run with it"
            )
    return extra
