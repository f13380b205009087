"""An exported file that a command measures, ready to draw, in the place of a network of a run. Imports no Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdm_lightning.base.checks import first_line
from qdm_lightning.diffusion.sampling import timesteps
from qdm_lightning.diffusion.spec import SamplerConfig
from qdm_lightning.evaluation.spec import SubjectConfig
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.runtimes.files import ExportedFile, read_exported
from qdm_lightning.runtimes.network import RuntimeNetwork


@dataclass(frozen=True, kw_only=True)
class ExportedSubject:
    """As `Subject`, from a file.

    Attributes:
        file: the file, checked.
        image_sampler: draws with it, in its runtime.
    """

    file: ExportedFile
    image_sampler: ImageSampler

    @classmethod
    def opened(cls, config: SubjectConfig, sampler: SamplerConfig) -> ExportedSubject:
        """The file that `config` names, in its runtime, with as many threads as torch has.

        Raises:
            FileNotFoundError, ValueError: no such file, or one that cannot be used; more steps than T.
        """
        file = read_exported(str(config.file))
        timesteps(sampler, file.diffusion)  # raises for more steps than T
        total = file.diffusion.num_train_timesteps
        try:
            network = RuntimeNetwork(file.model, str(config.runtime), torch.get_num_threads(), total, sampler.batch_size)
        except Exception as error:  # each runtime raises its own at a graph that it does not take
            raise ValueError(f"{config.runtime} cannot read file={config.file}: {first_line(error)}") from error
        channels, height, width = file.metadata["shape"]
        return cls(
            file=file,
            image_sampler=ImageSampler(
                network=network.eval(),
                sampler=sampler,
                diffusion=file.diffusion,
                shape=(channels, height, width),
                device=torch.device("cpu"),
            ),
        )

    @property
    def network(self) -> str:
        """`student` or `teacher`."""
        return str(self.file.metadata["network"])

    @property
    def name(self) -> str:
        """Of the run that it was exported from."""
        return str(self.file.metadata["run"])

    @property
    def folder(self) -> Path:
        """Where its pictures lie, unless another place is asked for."""
        return self.file.path.parent / "images"

    @property
    def origin(self) -> dict[str, Any]:
        """The file, what executes it, and the weights that it was exported from."""
        runtime = self.image_sampler.network.runtime
        origin = {"file": str(self.file.path), "weights": runtime, "sha256": self.file.sha256}
        return {**origin, "step": self.file.metadata["origin"].get("step"), "exported_from": self.file.metadata["origin"]}

    @property
    def execution(self) -> str:
        """The runtime: an export of a student runs on integers there."""
        return str(self.image_sampler.network.runtime)

    @property
    def warnings(self) -> list[str]:
        """What the record must say about the weights that were exported."""
        origin = self.file.metadata["origin"]
        return [origin["warning"]] if "warning" in origin else []

    def teacher(self) -> None:
        """There is none in the file."""

    def identity(self) -> dict[str, Any]:
        """Everything that determines an image beside its seed, the machine and the runtime's version."""
        return {
            "network": self.network,
            "weights": self.origin["weights"],
            "checkpoint_sha256": self.file.sha256,
            "settings_sha256": self.file.metadata["settings_sha256"],
            "sampler": self.image_sampler.sampler.settings(),
            "diffusion": self.file.diffusion.settings(),
            "shape": list(self.image_sampler.shape),
        }
