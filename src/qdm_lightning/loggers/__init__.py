"""Loggers: W&B, TensorBoard, Trackio, MLflow, any of Lightning's or the user's that a configuration names; metrics.csv."""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from qdm_lightning.base.files import read_text, write_whole
from qdm_lightning.base.wandb_environment import PROJECT, from_environment, tags_from_environment, wandb_mode
from qdm_lightning.loggers.mlflow_run import mlflow_logger
from qdm_lightning.loggers.tensorboard import TensorBoardRun
from qdm_lightning.loggers.trackio_run import trackio_logger
from qdm_lightning.loggers.wandb_run import AXES, WandbRun, logged_in, rows_before, start_run, sweep_name
from qdm_lightning.runs.naming import labels

__all__ = ["mlflow_logger", "opened", "tensorboard_logger", "trackio_logger", "wandb_logger"]


def wandb_logger(
    *,
    run_dir: Path,
    config: Mapping[str, Any],
    project: str | None = None,
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    mode: str | None = None,
    artifacts: bool = True,
    run_tags: Sequence[str] = (),
) -> Logger | None:
    """A W&B logger with a run of its own, also for the second job of a process. Its files lie in `run_dir`.

    Job type, some tags and the config's `cell` come from `labels(config)`. Under `wandb agent` project, entity and id are the
    sweep's. What is None is as W&B's environment variables say (see `wandb_environment`).

    Args:
        run_dir: the run folder; its name names the W&B run where nothing else does, and a resumed run takes its id up again.
        config: resolved configuration, logged as the run's.
        project, entity, name: of the W&B run.
        group: None takes WANDB_RUN_GROUP, else the multirun's folder, if there is one.
        mode: `online`, `offline`, `disabled`, or None: as WANDB_DISABLED or WANDB_MODE say, else online only where the user is
            logged in, and offline after a warning where W&B does not answer.
        artifacts: log the networks and evaluations as artifacts.
        tags, run_tags: joined, with those of WANDB_TAGS.

    Returns:
        None where W&B is disabled.

    Raises:
        ValueError: W&B refuses the run, or does not answer with `mode="online"`; or the file of the id is damaged.
    """
    asked, said_by = wandb_mode(mode)
    if asked == "disabled":
        logging.getLogger(__name__).info("nothing is logged to W&B: %s", said_by)
        return None
    identity = run_dir / "wandb_id"
    cell = labels(config)
    earlier = read_text(identity, "remove it to begin another W&B run").strip() if identity.exists() else ""
    known = earlier or secrets.token_hex(4)
    write_whole(identity, f"{known}\n".encode())  # before the run is there: it may be killed at any time
    described = {key: value for key, value in cell.items() if key != "job"}
    labelled = [*tags, *tags_from_environment(), *run_tags, *(f"{key}:{value}" for key, value in described.items())]
    run = start_run(
        asked or ("online" if logged_in() else "offline"),
        otherwise=None if asked else "offline",
        project=from_environment("WANDB_PROJECT", project, PROJECT),
        entity=entity,
        name=from_environment("WANDB_NAME", name, run_dir.name),
        group=from_environment("WANDB_RUN_GROUP", group, sweep_name(run_dir) or "") or None,
        job_type=cell.get("job"),
        id=known,
        dir=run_dir,
        tags=list(dict.fromkeys(tag[:64] for tag in labelled if tag)) or None,  # W&B refuses longer ones
        config={**config, "cell": {**cell, "name": " ".join(described.values())}},
    )
    if earlier and run.offline:
        run.log({}, step=rows_before(run_dir))
    if run.id != known:  # under `wandb agent`
        write_whole(identity, f"{run.id}\n".encode())
    for name_or_pattern, axis in AXES.items():
        run.define_metric(name_or_pattern, step_metric=axis)
    return WandbRun(run, artifacts)


def tensorboard_logger(*, run_dir: Path, folder: str = "tensorboard") -> Logger:
    """A logger that writes into `<run_dir>/<folder>`: `tensorboard --logdir outputs` shows every run below it.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    return TensorBoardRun(save_dir=run_dir, name=folder, version="", default_hp_metric=False)


@contextmanager
def opened(factories: Sequence[Callable[..., Any]], *, run_dir: Path, config: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Loggers for the block, finished after it: a W&B run ends, so that the next job of this process begins another.

    Args:
        factories: as the configuration names them; each gets what it takes of `run_dir`, `config` and `run_tags`.
        run_dir: the run folder.
        config: resolved configuration.
    """
    ours = {"run_dir": run_dir, "config": config, "run_tags": config.get("tags", ())}
    loggers: list[Any] = []
    failed = True
    try:
        for make in factories:
            logger = make(**{name: ours[name] for name in ours if name in inspect.signature(make).parameters})
            loggers += [] if logger is None else [logger]  # disabled
        yield loggers
        failed = False
    finally:
        for logger in loggers:
            logger.finalize("finished")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=int(failed))
