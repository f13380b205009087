"""What a run is made of, instantiated: the hand-over from `cli.build` to `training.run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig, SamplerConfig
from qdm_lightning.quantization.observer import Calibrator
from qdm_lightning.quantization.preparation import Quantizers
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.training.spec import TEACHER_OPTIMIZER, OptimizerConfig, PathsConfig, TeacherConfig, TrainerConfig


@dataclass(kw_only=True)
class Experiment:
    """Settings and factories of one run; nothing in it has read data or trained.

    Args:
        seed: seed of the student's training and of the compared images.
        run_dir: folder where the run leaves its files.
        num_samples: number of images behind each distance.
        data: the data module, not yet set up.
        build_model: makes a fresh U-Net, randomly initialized.
        quantizers: factories of the student's quantizers, TaQ's scope applied.
        calibrator: makes the search for the first scales.
        feature_network: network whose features the distance compares.
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
    feature_network: nn.Module
    loggers: list[Callable[..., Any]] = field(default_factory=list)
    callbacks: list[Callback] = field(default_factory=list)
    paths: PathsConfig = field(default_factory=PathsConfig)
    resolved: dict[str, Any] = field(default_factory=dict)
    resume: bool = False

    def __post_init__(self) -> None:
        """A full-precision run is its own teacher: what is typed for the run holds for the teacher."""
        if self.quant.is_float:
            own = {name: getattr(self.optimizer, name) for name in TEACHER_OPTIMIZER}
            self.teacher = replace(self.teacher, max_steps=self.trainer.max_steps, **own)

    @property
    def has_teacher(self) -> bool:
        """True where the run has its own copy of its teacher already, from before it was interrupted."""
        return self.resume and (self.run_dir / "teacher" / "unet").is_dir()
