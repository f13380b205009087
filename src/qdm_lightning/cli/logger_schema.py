"""The typed settings of our options of the config group `logger`. Imports no Lightning, so that help stays quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import PurePath

from qdm_lightning.base.checks import one_of
from qdm_lightning.base.wandb_environment import MODES, wandb_mode


@dataclass(kw_only=True)
class WandbConfig:
    """`logger=wandb`: a W&B run beside the files of the run folder.

    Args:
        project, entity: of the W&B run; None takes WANDB_PROJECT or `qdm-lightning`, and WANDB_ENTITY or the user's own.
        tags: beside those of WANDB_TAGS and of the root, and of what the run does (`bits:w4a4`).
        name: name of the W&B run; None takes WANDB_NAME, or the run folder's.
        group: group of W&B runs; None takes WANDB_RUN_GROUP, or the multirun's folder, if there is one.
        mode: `online`, `offline`, `disabled`, or None: as WANDB_DISABLED or WANDB_MODE say, else online only if the user is
            logged in.
        artifacts: log the networks and evaluations as artifacts.

    Raises:
        ValueError: a mode, typed or in WANDB_MODE, that there is not.
    """

    _target_: str = "qdm_lightning.loggers.wandb_logger"
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str | None = None
    artifacts: bool = True

    def __post_init__(self) -> None:
        if self.mode is not None:
            one_of("logger.mode", self.mode, MODES)
        wandb_mode(self.mode)


@dataclass(kw_only=True)
class TensorBoardConfig:
    """`logger=tensorboard`: an event file in `<run>/<folder>`.

    Raises:
        ValueError: tensorboard is not installed.
    """

    _target_: str = "qdm_lightning.loggers.tensorboard_logger"
    folder: str = "tensorboard"

    def __post_init__(self) -> None:
        path = PurePath(self.folder)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"logger.folder={self.folder} is not allowed: it lies in the run's folder, logger.folder=tensorboard"
            )
        _installed("tensorboard", "tensorboard")


@dataclass(kw_only=True)
class TrackioConfig:
    """`logger=trackio`: scalars and the configuration, see `loggers.trackio_logger`.

    Args:
        project, group: of the run.
        name: of the run; None takes the run folder's.
        space_id: Space of the hub that gets the run; None keeps it on this machine.

    Raises:
        ValueError: trackio is not installed.
    """

    _target_: str = "qdm_lightning.loggers.trackio_logger"
    project: str = "qdm-lightning"
    name: str | None = None
    group: str | None = None
    space_id: str | None = None

    def __post_init__(self) -> None:
        _installed("trackio", "trackio")


@dataclass(kw_only=True)
class MLflowConfig:
    """`logger=mlflow`: scalars, and the configuration as parameters, see `loggers.mlflow_logger`.

    Args:
        experiment: MLflow's experiment.
        name: of the run; None takes the run folder's.
        tracking_uri: of the server or database; None takes MLFLOW_TRACKING_URI, or mlflow.db in the run's folder.

    Raises:
        ValueError: mlflow is not installed.
    """

    _target_: str = "qdm_lightning.loggers.mlflow_logger"
    experiment: str = "qdm-lightning"
    name: str | None = None
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        _installed("mlflow", "mlflow")


def _installed(option: str, package: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"logger={option} needs {package}: pip install 'qdm-lightning[{option}]'")
