"""MLflow: scalars, and the configuration as parameters, on a tracking server or in a database of the run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger

from qdm_lightning.base.files import read_text, write_whole
from qdm_lightning.loggers.media import cosmetic
from qdm_lightning.runs.naming import labels

MARK = "mlflow_run_id"
"""File of a run's folder: the id of its MLflow run, which a resumed run takes up again."""

LONGEST = 500
"""Characters of a parameter, for MLflow."""


class MLflowRun(MLFlowLogger):
    """Lightning's logger. A fault of MLflow's in the middle of a job is a warning, not the job's end."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with cosmetic("metrics", "MLflow"):
            super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    def finalize(self, status: str = "success") -> None:
        with cosmetic("the end", "MLflow"):
            super().finalize(status)


def mlflow_logger(
    *,
    run_dir: Path,
    config: Mapping[str, Any],
    experiment: str = "qdm-lightning",
    name: str | None = None,
    tracking_uri: str | None = None,
) -> Logger:
    """An MLflow run.

    Args:
        run_dir: its name names the run where `name` is None.
        config: resolved configuration, logged as parameters with dotted names; what the run does becomes tags.
        experiment: MLflow's, made where it is not there.
        tracking_uri: of the server or database; None takes MLFLOW_TRACKING_URI, or else `<run_dir>/mlflow.db`.

    Raises:
        ValueError: MLflow does not answer or refuses the run, or the file of its id is damaged.
    """
    place = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir / 'mlflow.db'}"
    mark = run_dir / MARK
    earlier = read_text(mark, "remove it to begin another MLflow run").strip() if mark.exists() else None
    try:
        logger = MLflowRun(
            experiment_name=experiment,
            run_name=name or run_dir.name,
            tracking_uri=place,
            tags=dict(labels(config)),
            save_dir=str(run_dir),
            run_id=earlier,
        )
        if earlier is None:
            logger.log_hyperparams({key: str(value)[:LONGEST] for key, value in _flat(config)})
        run_id = str(logger.run_id)
    except Exception as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"MLflow refuses this run at {place}: {first}; to go without: logger=none") from error
    write_whole(mark, f"{run_id}\n".encode())
    return logger


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
