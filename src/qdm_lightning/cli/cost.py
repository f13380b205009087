"""The command that counts what a student costs before it is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from qdm_lightning.base.checks import UserError, fits_memory
from qdm_lightning.base.files import write_json
from qdm_lightning.cli.app import Command
from qdm_lightning.cli.build import build_student
from qdm_lightning.cli.compose import explained
from qdm_lightning.cli.schema import TrainConfig, register_root, settings_of

if TYPE_CHECKING:
    from torch import nn

    from qdm_lightning.quantization.cost_report import CostReport


@dataclass(kw_only=True)
class CostConfig(TrainConfig):
    """Root of `conf/cost.yaml`: a run's settings, of which `model`, `quant` and `taq` matter.

    Args:
        json: file for the figures as plain data; None writes none.
        image_shape: channels, height and width of the image that is counted; None takes what the model is made for.
    """

    json: str | None = None
    image_shape: list[int] | None = None


def cost(cfg: DictConfig) -> CostReport:
    """Count what the student that `cfg` describes costs for one image and step.

    Args:
        cfg: composed from `conf/cost.yaml`, or `conf/train.yaml`.

    Raises:
        UserError: bad input.
    """
    from qdm_lightning.models.unet import example_inputs
    from qdm_lightning.quantization.cost import cost as count

    asked = cfg.get("image_shape")
    with explained():
        build_model, quant, quantizers = build_student(cfg)
        model = build_model()
        inputs = example_inputs(model, _image_shape(model, asked))
        try:
            return count(model, quant, inputs, quantizers=quantizers)
        except RuntimeError as error:
            if asked is None or type(error) is not RuntimeError:
                raise
            raise UserError(f"image_shape={asked} does not fit the network: {error}") from error


def _image_shape(model: nn.Module, asked: Sequence[int] | None) -> tuple[int, ...]:
    if asked is not None:
        return tuple(asked)
    config: Any = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise UserError(
            f"{type(model).__name__} does not tell the size of its images: type image_shape=[channels,height,width]"
        )
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


class Cost(Command):
    """`python -m qdm_lightning.cost`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__("cost", *arguments)
        self.files: set[Path] = set()  # of the jobs of a sweep

    def check(self, cfg: DictConfig) -> DictConfig:
        """Refuse what cannot be counted or written."""
        if cfg.run is not None:
            raise UserError(f"run={cfg.run}: the cost of a run stands in its metrics.json; here, type the settings of one")
        shape = cfg.image_shape
        if shape is not None and (len(shape) != 3 or min(shape) < 1):
            raise UserError(
                f"image_shape={list(shape)} is not allowed: give [channels,height,width], for example image_shape=[3,32,32]"
            )
        if shape is not None:
            fits_memory(f"image_shape={list(shape)}", 4 * math.prod(shape))
        build_student(cfg)
        if cfg.json is not None:
            file = Path(cfg.json).expanduser().resolve()
            if file.is_dir() or any(folder.is_file() for folder in file.parents):
                raise UserError(f"json={cfg.json} cannot be written: give the name of a file in a folder")
            if file in self.files:
                raise UserError(
                    f"json={cfg.json} would hold the last job alone: name what differs, json='cost_${{quant.act_bits}}.json'"
                )
            self.files.add(file)
        return cfg

    def work(self, cfg: DictConfig, folder: Path) -> None:
        """Count, show, and write the figures where they were asked for."""
        report = cost(cfg)
        self.show(report)
        if cfg.json is not None:
            file = Path(cfg.json).expanduser()
            try:
                write_json(file, report.as_dict() | settings_of(cfg, ("model", "quant", "taq", "image_shape")), checksum=False)
            except OSError as error:
                raise UserError(f"json={cfg.json} cannot be written: {error.strerror}") from error
            print(f"written: {file}")
        print(
            "next:\n  python -m qdm_lightning.train  with the same overrides, but json= and image_shape=, trains that student"
        )


register_root("cost", CostConfig)
