"""What a run is made of, instantiated: the hand-over from `cli.build` to `training.run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from qdm_lightning.base.files import read_json, write_json
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig, SamplerConfig
from qdm_lightning.diffusion.weighting import Uniform, Weighting
from qdm_lightning.metrics.frechet import check_network
from qdm_lightning.quantization.observer import Calibrator
from qdm_lightning.quantization.preparation import Quantizers
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.training.spec import TEACHER_OPTIMIZER, OptimizerConfig, PathsConfig, TeacherConfig, TrainerConfig

DATA = "data.json"
"""File of a run's folder: the SHA-256 of the images that it is made with, and their numbers."""


@dataclass(kw_only=True)
class Experiment:
    """Settings and factories of one run; nothing in it has read data or trained.

    Args:
        seed: seed of the student's training and of the compared images.
        run_dir: folder where the run leaves its files.
        num_samples: number of images behind each distance.
        execution: `simulated` or `integer`: how the student draws them.
        data: the data module, not yet set up.
        build_model: makes a fresh U-Net, randomly initialized.
        quantizers: factories of the student's quantizers, TaQ's scope applied.
        calibrator: makes the search for the first scales.
        feature_network: network whose features the distance compares; None measures none.
        weighting: weights of L_NeM over t.
        loggers: factories `logger(run_dir=..., run_tags=..., config=...)` of the loggers other than metrics.csv.
        resolved: the resolved configuration as plain data.
        resume: go on from the run folder's last checkpoint.
    """

    seed: int
    run_dir: Path
    num_samples: int
    data: ImageDataModule
    build_model: Callable[[], nn.Module]
    diffusion: DiffusionConfig
    quant: QuantConfig
    quantizers: Quantizers
    calibrator: Callable[[], Calibrator]
    nem: NeMConfig
    sampler: SamplerConfig
    teacher: TeacherConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    feature_network: nn.Module | None
    weighting: Weighting = field(default_factory=Uniform)
    loggers: list[Callable[..., Any]] = field(default_factory=list)
    callbacks: list[Callback] = field(default_factory=list)
    paths: PathsConfig = field(default_factory=PathsConfig)
    resolved: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    execution: str = "simulated"

    def __post_init__(self) -> None:
        """A full-precision run is its own teacher: what is typed for the run holds for the teacher.

        Raises:
            ValueError: something that was named by its `_target_` is not what its place is for.
        """
        named = {
            "data": (self.data, ImageDataModule),
            **({} if self.feature_network is None else {"metrics": (self.feature_network, nn.Module)}),
            **{f"callbacks[{index}]": (callback, Callback) for index, callback in enumerate(self.callbacks)},
        }
        for place, (thing, kind) in named.items():
            if not isinstance(thing, kind):
                target = self.resolved.get(place, {}).get("_target_", type(thing).__name__)
                raise ValueError(f"{place}._target_={target} is no {kind.__name__}: name one of that kind")
        if self.feature_network is not None:
            check_network(self.feature_network)
        made_by = getattr(self.calibrator, "func", self.calibrator)
        if isinstance(made_by, type) and not hasattr(made_by, "search"):
            raise ValueError(
                f"quant.calibrator._target_={made_by.__name__} has no method search: see quantization.observer.Calibrator"
            )
        if self.quant.is_float:
            own = {name: getattr(self.optimizer, name) for name in TEACHER_OPTIMIZER}
            self.teacher = replace(self.teacher, max_steps=self.trainer.max_steps, **own)

    def load_data(self) -> None:
        """Load the images, and compare them with those that the run was made with, where it was.

        Raises:
            FileNotFoundError, ValueError: they cannot be loaded, or are others.
        """
        self.data.setup()
        if self.trainer.overfit_images:
            self.data.keep_first(self.trainer.overfit_images)
        file = self.run_dir / DATA
        stored = read_json(file) if file.is_file() else {}
        others = stored and stored.get("fingerprint") != self.data.fingerprint()
        if others or ("labels" in stored and stored["labels"] != self.data.labels_fingerprint()):
            place = next((f"data.{name}={value}" for name, value in self._places if value), "the package")
            raise ValueError(
                f"the images{' or labels' if 'labels' in stored else ''} of {place} are not those that {self.run_dir} was made "
                "with: put those there (evaluate, sample and diagnose take data.path= and data.root=), or begin another run"
            )

    def keep_data(self) -> None:
        """Leave in the run's folder which images it is made with. Raises OSError where it cannot be written."""
        train, val = self.data.train_images, self.data.val_images
        counts = {"train": len(train), "val": len(val), "shape": list(train.shape[1:])}
        labels = {"labels": self.data.labels_fingerprint()} if self.data.labelled else {}
        write_json(self.run_dir / DATA, {"fingerprint": self.data.fingerprint(), **labels, **counts})

    @property
    def _places(self) -> list[tuple[str, Any]]:
        data = self.resolved.get("data", {})
        return [(name, data.get(name)) for name in ("path", "root")]

    @property
    def has_teacher(self) -> bool:
        """True where the run has its own copy of its teacher already, from before it was interrupted."""
        return self.resume and (self.run_dir / "teacher" / "unet").is_dir()
