"""One training loop for teacher and student: a Lightning trainer whose checkpoints are whole and whose resume is exact."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.training.callbacks import StepTimer
from qdm_lightning.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.spec import TrainerConfig
from qdm_lightning.training.validation_set import ValidationSet


def last_checkpoint(folder: Path) -> Path | None:
    """`last.ckpt` of a folder of checkpoints, if it is there."""
    path = folder / "last.ckpt"
    return path if path.is_file() else None


def fit(
    module: DiffusionModule,
    data: ImageDataModule,
    validation_set: ValidationSet,
    config: TrainerConfig,
    *,
    folder: Path,
    max_steps: int,
    seed: int,
    loggers: list[Any],
    callbacks: list[Callback],
) -> dict[str, Any]:
    """Train to `max_steps`, from `<folder>/last.ckpt` where there is one, and load the best checkpoint into the module.

    Args:
        folder: of the checkpoints: `last.ckpt` and `best.ckpt`, the least `val/loss`.
        seed: of the order of the images.

    Returns:
        {"steps": done in all, "best_step": of the checkpoint that is loaded, "val_loss": its loss,
        "resumed_from": step or None, "step_seconds": median of the steps made here, or None}.
    """
    monitor = f"{module.prefix}val/loss"
    resume = last_checkpoint(folder)
    start = int(load_checkpoint(resume)["global_step"]) if resume else 0
    data.seed, data.start_step = seed, start
    best = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor=monitor,
        mode="min",
        save_last=True,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    timer = StepTimer()
    with _quiet_lightning():
        trainer = _trainer(config, max_steps, [best, timer, *callbacks], loggers)
        if start < max_steps:
            batches = validation_set.batches(max(data.batch_size, 256))
            loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
            trainer.fit(module, data.train_dataloader(), loader, ckpt_path=str(resume) if resume else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    kept = folder / "best.ckpt"
    state = load_checkpoint(kept)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first rank may move the folder once all have read it
    score = next(c["best_model_score"] for k, c in state["callbacks"].items() if k.startswith("ModelCheckpoint"))
    return {
        "steps": max_steps,
        "best_step": int(state["global_step"]),
        "val_loss": float(score),
        "resumed_from": start if resume else None,
        "step_seconds": timer.median(),
    }


def _trainer(config: TrainerConfig, max_steps: int, callbacks: list[Callback], loggers: list[Any]) -> Trainer:
    return Trainer(
        max_steps=max_steps,
        accelerator=config.accelerator,
        devices=1 if config.devices == "auto" and not torch.cuda.is_available() else config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision=config.precision,  # type: ignore[arg-type]
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        val_check_interval=min(config.val_every, max_steps),
        check_val_every_n_epoch=None,
        log_every_n_steps=min(config.log_every, max_steps),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,  # the cache of quantized weights lives by version counters
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's advice is not for us: batches come out of memory without end, and the teacher is in eval mode on purpose."""
    loggers = [logging.getLogger(f"lightning.pytorch.{name}") for name in ("utilities.rank_zero", "accelerators.cuda")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*`IterableDataset` has `__len__`.*",
            ".*directory.*exists and is not empty.*",
            ".*in eval mode at the start of training.*",
            ".*LeafSpec.*is deprecated.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
