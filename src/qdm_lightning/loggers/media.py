"""What a logger takes beside a training step's scalars, said once for W&B and TensorBoard.

The functions take all loggers of a run and serve those of the two kinds, Lightning's own and the user's among them; others
get scalars alone, from Lightning. Nothing here may end a run: a fault becomes a warning in the run's log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
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

BY_TIMESTEP = ("activations/*", "nem_error/*")
"""Names over the second."""

BINS = 64


@contextmanager
def cosmetic(what: str, where: str) -> Iterator[None]:
    """The block logs `what` to `where`; an error in it is a warning: no dashboard is worth a run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the loggers' libraries raise what they like
        first = f"{type(error).__name__}: {error}".partition("\n")[0]
        logging.getLogger(__name__).warning("%s: %s not logged: %s", where, what, first)


def log_values(loggers: Sequence[Any], values: Mapping[str, float | Tensor], at: int, axis: str = STEP) -> None:
    """Log numbers as scalars and tensors (any shape, finite) as histograms.

    Args:
        at: position on the axis.
        axis: STEP or TIMESTEP.
    """
    what = next(iter(values), "nothing")
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            with cosmetic(what, "W&B"):
                logged = {name: _histogram(v) if isinstance(v, Tensor) else v for name, v in values.items()}
                logger.experiment.log({**logged, axis: at})
        elif isinstance(logger, TensorBoardLogger):
            with cosmetic(what, "TensorBoard"):
                for name, value in values.items():
                    if isinstance(value, Tensor):
                        logger.experiment.add_histogram(name, value, at, bins=BINS)
                    else:
                        logger.experiment.add_scalar(name, value, at)


def _histogram(values: Tensor) -> Any:
    import wandb

    counts, edges = torch.histogram(values.detach().flatten().double().cpu(), BINS)
    return wandb.Histogram(np_histogram=(counts.long().numpy(), edges.numpy()))


def log_pictures(loggers: Sequence[Any], key: str, path: Path, step: int) -> None:
    """Log a picture file under `key`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            with cosmetic(key, "W&B"):
                logger.experiment.log({key: wandb.Image(str(path)), STEP: step})
        elif isinstance(logger, TensorBoardLogger):
            with cosmetic(key, "TensorBoard"), Image.open(path) as picture:
                logger.experiment.add_image(key, np.array(picture.convert("RGB")), step, dataformats="HWC")


def log_table(loggers: Sequence[Any], key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table; a cell is a string, a number or None."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            with cosmetic(key, "W&B"):
                logger.experiment.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
        elif isinstance(logger, TensorBoardLogger):
            with cosmetic(key, "TensorBoard"):
                lines = [columns, ["---"] * len(columns), *rows]
                logger.experiment.add_text(key, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def log_summary(
    loggers: Sequence[Any], labels: Mapping[str, Any], values: Mapping[str, float], records: Mapping[str, Any] | None = None
) -> None:
    """Log what a run comes to: W&B's summary, with plain `records`; TensorBoard's hyperparameters, `labels` beside `values`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            with cosmetic("summary", "W&B"):
                logger.experiment.summary.update({**values, **(records or {})})
        elif isinstance(logger, TensorBoardLogger):
            with cosmetic("summary", "TensorBoard"):
                logger.log_hyperparams(dict(labels), dict(values))


def log_files(
    loggers: Sequence[Any], kind: str, paths: Sequence[Path], metadata: Mapping[str, Any], references: Sequence[Path] = ()
) -> None:
    """Log files, and whole folders, as W&B's artifact `<kind>-<run id>`; other loggers lie beside the files anyway.

    Args:
        kind: the artifact's type, such as `model`.
        paths: copied when the run is uploaded, not before; they must stay where they are until then.
        references: files that are named in the artifact, with their checksums, and not copied.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and getattr(logger, "artifacts", True):
            import wandb

            with cosmetic(f"{kind} files", "W&B"):
                artifact = wandb.Artifact(f"{kind}-{logger.experiment.id}", type=kind, metadata=dict(metadata))
                for path in paths:
                    inside = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
                    for file in inside:
                        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
                        artifact.add_file(str(file), name=name, skip_cache=True, policy="immutable")
                for path in references:
                    artifact.add_reference(path.resolve().as_uri(), name=path.name)
                logger.experiment.log_artifact(artifact)
