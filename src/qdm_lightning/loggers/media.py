"""What a logger takes in addition to a training step's scalars, said once for W&B and TensorBoard.

The functions take all loggers of a run and serve those of the two kinds, Lightning's own and the user's among them; others
get scalars alone, from Lightning. Nothing here may end a run: a fault becomes a warning in the run's log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

STEP = "trainer/global_step"
TIMESTEP = "timestep"
"""Names of W&B's two axes: training steps, and t of the diffusion process."""

BINS = 64


@contextmanager
def cosmetic(what: str, where: str) -> Iterator[None]:
    """The block logs `what` to `where`; an error in it is a warning: no dashboard is worth a run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the loggers' libraries raise what they like
        first = f"{type(error).__name__}: {error}".partition("\n")[0]
        logging.getLogger(__name__).warning("%s: %s not logged: %s", where, what, first)


def _log(
    loggers: Sequence[Any],
    what: str,
    to_wandb: Callable[[Any, Any], object],
    to_tensorboard: Callable[[Any], object] | None = None,
) -> None:
    """Call `to_wandb(run, module wandb)` and `to_tensorboard(logger)`, which log `what`, for each logger of their kind."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            with cosmetic(what, "W&B"):
                to_wandb(logger.experiment, wandb)
        if isinstance(logger, TensorBoardLogger) and to_tensorboard is not None:
            with cosmetic(what, "TensorBoard"):
                to_tensorboard(logger)


def log_values(loggers: Sequence[Any], values: Mapping[str, float | Tensor], at: int, axis: str = STEP) -> None:
    """Log numbers as scalars and tensors (any shape, finite) as histograms.

    Args:
        at: position on the axis.
        axis: STEP or TIMESTEP.
    """

    def to_wandb(run: Any, wandb: Any) -> None:
        histograms = {name: wandb.Histogram(np_histogram=_histogram(x)) for name, x in values.items() if isinstance(x, Tensor)}
        run.log({**values, **histograms, axis: at})

    def to_tensorboard(logger: Any) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                logger.experiment.add_histogram(name, value, at, bins=BINS)
            else:
                logger.experiment.add_scalar(name, value, at)

    _log(loggers, next(iter(values), "nothing"), to_wandb, to_tensorboard)


def _histogram(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    counts, edges = torch.histogram(values.detach().flatten().double().cpu(), BINS)
    return counts.long().numpy(), edges.numpy()


def log_pictures(loggers: Sequence[Any], key: str, path: Path, step: int) -> None:
    """Log a picture file under `key`."""
    _log(
        loggers,
        key,
        lambda run, wandb: run.log({key: wandb.Image(str(path)), STEP: step}),
        lambda logger: logger.experiment.add_image(key, np.array(Image.open(path).convert("RGB")), step, dataformats="HWC"),
    )


def log_table(loggers: Sequence[Any], key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table; a cell is a string, a number or None."""
    lines = [columns, ["---"] * len(columns), *rows]
    _log(
        loggers,
        key,
        lambda run, wandb: run.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}),
        lambda logger: logger.experiment.add_text(key, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)),
    )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def log_summary(
    loggers: Sequence[Any], labels: Mapping[str, Any], values: Mapping[str, float], provenance: Mapping[str, Any] | None = None
) -> None:
    """Log what a run comes to: W&B's summary, plain `provenance` too; TensorBoard's hyperparameters, `labels` by `values`."""
    _log(
        loggers,
        "summary",
        lambda run, wandb: run.summary.update({**values, **(provenance or {})}),
        lambda logger: logger.log_hyperparams(dict(labels), dict(values)),
    )


def log_files(
    loggers: Sequence[Any], kind: str, paths: Sequence[Path], metadata: Mapping[str, Any], references: Sequence[Path] = ()
) -> None:
    """Log files, and whole folders, as W&B's artifact `<kind>-<run id>`; other loggers have their files in the run folder too.

    Args:
        kind: the artifact's type, such as `model`.
        paths: copied when the run is uploaded, not before; they must stay where they are until then.
        references: files that are named in the artifact, with their checksums, and not copied.
    """

    def to_wandb(run: Any, wandb: Any) -> None:
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind, metadata=dict(metadata))
        for path in paths:
            inside = (file for file in sorted(path.rglob("[!.]*")) if file.is_file())  # W&B has checksums of its own
            for file in inside if path.is_dir() else [path]:
                name = file.relative_to(path).as_posix() if path.is_dir() else file.name
                artifact.add_file(str(file), name=name, skip_cache=True, policy="immutable")
        for path in references:
            artifact.add_reference(path.resolve().as_uri(), name=path.name)
        run.log_artifact(artifact)

    _log([logger for logger in loggers if getattr(logger, "artifacts", True)], f"{kind} files", to_wandb)
