"""The network of a run that a command measures, ready to draw, and what determines its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdm_lightning.base.files import data_hash
from qdm_lightning.diffusion.sampling import timesteps
from qdm_lightning.evaluation.spec import RestoreConfig, parse_labels
from qdm_lightning.integer import provenance, to_integer
from qdm_lightning.models.denoiser import Denoiser, denoiser
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.training.devices import measuring_device, set_up
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.restore import restore, restore_teacher


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A restored network of a run.

    Attributes:
        experiment: the run's own, with the sampler of this command.
        network: `student` or `teacher`.
        origin: where its weights come from: `file`, `weights`, `sha256`, `step`, and a `warning` where there is cause.
        execution: `simulated` or `integer`.
        image_sampler: draws with it.
        simulated: the network with its quantizers, whatever draws.
    """

    experiment: Experiment
    network: str
    origin: dict[str, Any]
    execution: str
    image_sampler: ImageSampler
    simulated: Denoiser

    @classmethod
    def restored(cls, experiment: Experiment, config: RestoreConfig) -> Subject:
        """The network that `config` means.

        Raises:
            FileNotFoundError, ValueError: the run has no such network, the sampler has more steps than T, or the network can't
                run on integer codes.
        """
        set_up(experiment.trainer)
        device = measuring_device(config.accelerator)
        network = config.network or ("teacher" if experiment.quant.is_float else "student")
        if config.execution == "integer":
            if network == "teacher":
                raise ValueError("execution=integer is for a quantized network, the teacher has full precision: leave it out")
            if device.type != "cpu":
                raise ValueError(f"execution=integer runs on the CPU, not on {device.type}: type accelerator=cpu")
        weights = restore(experiment, network, config.weights, config.checkpoint, device)
        drawing = (
            weights.network
            if config.execution == "simulated"
            else denoiser(to_integer(weights.network.unet)[0], experiment.diffusion)
        )
        experiment.data.labelled = weights.network.classes is not None
        class_labels = parse_labels(getattr(config, "class_labels", None))
        return cls(
            experiment=experiment,
            network=network,
            origin=weights.origin,
            execution=config.execution,
            image_sampler=_image_sampler(experiment, drawing.eval(), device, class_labels),
            simulated=weights.network,
        )

    @property
    def warnings(self) -> list[str]:
        """What the record of a measurement must say about these weights."""
        return [self.origin["warning"]] if "warning" in self.origin else []

    @property
    def name(self) -> str:
        """Of the run."""
        return self.experiment.run_dir.name

    @property
    def folder(self) -> Path:
        """Where its pictures lie, unless another place is asked for."""
        return self.experiment.run_dir / "images"

    def teacher(self) -> ImageSampler | None:
        """The teacher beside this student; None where this is a teacher."""
        if self.network == "teacher":
            return None
        device, labels = self.image_sampler.device, self.image_sampler.class_labels
        return _image_sampler(self.experiment, restore_teacher(self.experiment, device).network, device, labels)

    def identity(self) -> dict[str, Any]:
        """Everything that determines an image beside its seed and the machine."""
        names = ("quant", "taq") if self.network == "student" else ()
        labels = self.image_sampler.class_labels
        return {
            "network": self.network,
            "weights": self.origin["weights"],
            "checkpoint_sha256": self.origin["sha256"],
            **({} if self.execution == "simulated" else {"execution": self.execution, **provenance()}),
            "settings_sha256": data_hash({name: self.experiment.resolved[name] for name in names}),
            "sampler": self.experiment.sampler.settings(),
            "diffusion": self.experiment.diffusion.settings(),
            "shape": list(self.image_sampler.shape),
            **({} if labels is None else {"class_labels": list(labels)}),
        }


def _image_sampler(
    experiment: Experiment, network: Denoiser, device: torch.device, class_labels: Sequence[int] | None
) -> ImageSampler:
    timesteps(experiment.sampler, experiment.diffusion)  # raises for more steps than T
    config: Any = network.unet.config
    size = config.sample_size
    return ImageSampler(
        network=network,
        sampler=experiment.sampler,
        diffusion=experiment.diffusion,
        shape=(config.in_channels, *((size, size) if isinstance(size, int) else size)),
        device=device,
        class_labels=class_labels,
    )
