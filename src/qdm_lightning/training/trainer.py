"""One training loop for teacher and student: a Lightning trainer whose checkpoints are whole and whose resume is exact."""

from __future__ import annotations

import logging
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from qdm_lightning.base import signals
from qdm_lightning.base.ranks import rank
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from qdm_lightning.training.checkpoints import BEST, Checkpoints, Stopped, best_loss
from qdm_lightning.training.devices import measuring_device, quiet
from qdm_lightning.training.finite import FiniteValues
from qdm_lightning.training.lost_ranks import watched_ranks
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.resume import mend_best, resume_point
from qdm_lightning.training.spec import TrainerConfig
from qdm_lightning.training.validation_set import ValidationSet

log = logging.getLogger(__name__)


class StageProgress(Callback):
    """Advances a stage of the terminal by every training step, and measures the steps.

    Args:
        stage: with `advance(n, **fields)`.

    Attributes:
        seconds: seconds of each step made here: forward, backward and update, without validation.
    """

    def __init__(self, stage: Any) -> None:
        self.stage, self.seconds, self._begin = stage, list[float](), 0.0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.perf_counter() - self._begin)
        show = trainer.global_step % 10 == 0
        self.stage.advance(1, **({"loss": f"{float(outputs['loss'].detach()):.4f}"} if show else {}))


def fit(
    module: DiffusionModule,
    data: ImageDataModule,
    validation_set: ValidationSet,
    config: TrainerConfig,
    *,
    folder: Path,
    stage: Any,
    loggers: list[Any],
    callbacks: list[Callback],
    between_steps: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train to `module.max_steps`, from the `resume_point` in `folder` if there is one, and load the best checkpoint.

    A signal ends it after the step under way, which `last.ckpt` then has.

    Args:
        folder: where each validation leaves `last.ckpt`, and `best.ckpt` where `val/loss` is the least so far.
        stage: stage of the terminal, see `StageProgress`; `skip(n)` tells it of steps that were made before.
        between_steps: called by the first rank with the number of steps made, once each step is complete, and again where
            training goes on from there. A signal ends it at once.

    Returns:
        {"steps": number of steps in all, "best_step": step of the checkpoint that is loaded, "val_loss": its loss,
        "resumed_from": step or None, "step_seconds": median of the steps made here, or None, and where a checkpoint was damaged
        "warnings": what was done about it}.

    Raises:
        signals.Interrupted: a signal ended it.
        ValueError: damaged checkpoints, before the first step.
    """
    point = resume_point(folder)
    done = point.step if point else None
    data.seed, data.start_step = module.seed, done or 0
    stage.skip(data.start_step)
    mended = [] if point is None or rank() else [line for line in (point.warning, mend_best(folder, point)) if line]
    for line in mended:
        log.warning(line)
    checkpoints = Checkpoints(folder, f"{module.prefix}val/loss", loggers)
    steps = StageProgress(stage)
    finite = FiniteValues(folder, f"{'teacher' if module.prefix else 'optimizer'}.lr={module.optimizer.lr:g}")
    with _quiet_lightning():
        trainer = _trainer(config, module.max_steps, folder, [checkpoints, finite, steps, *callbacks], loggers)
        if data.start_step < module.max_steps:
            batches = validation_set.batches(max(data.batch_size, 256))
            loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
            resume = None if point is None else point.file
            with watched_ranks(trainer), _between_steps(trainer, module, checkpoints, between_steps):
                trainer.fit(module, data.train_dataloader(), loader, ckpt_path=resume, weights_only=True)
    signals.check()
    state = load_checkpoint(folder / BEST)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"])
    trainer.strategy.barrier()  # the first rank may move the folder once all have read it
    return {
        "steps": module.max_steps,
        "best_step": int(state["global_step"]),
        "val_loss": best_loss(state),
        "resumed_from": done,
        "step_seconds": round(statistics.median(steps.seconds), 5) if steps.seconds else None,
        **({"warnings": mended} if mended else {}),
    }


def _precision(config: TrainerConfig) -> dict[str, Any]:
    """Lightning takes bfloat16 for float16 on a CPU, with a warning; torch has float16 there."""
    cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and measuring_device("auto").type == "cpu")
    plugins: list[Any] = [AtomicCheckpointIO()]
    if cpu and config.precision == "16-mixed":
        return {"plugins": [*plugins, MixedPrecision("16-mixed", "cpu")]}
    return {"plugins": plugins, "precision": config.precision}


@contextmanager
def _between_steps(
    trainer: Trainer, module: DiffusionModule, checkpoints: Checkpoints, work: Callable[[int], None] | None
) -> Iterator[None]:
    """While the block trains: signals wait for the end of a step, and `work` is done there.

    Lightning's own handlers are left out: that of SIGTERM begins a collective operation in the midst of others.
    """
    with ExitStack() as stack:
        first = True

        def pause() -> None:
            nonlocal first
            if first:  # before the first step other ranks may be waited for
                stack.enter_context(signals.deferred())
                first = False
            if work is not None and trainer.is_global_zero:
                with suppress(signals.Interrupted), signals.deferred(False):
                    work(trainer.global_step)
            checkpoints.end_if_asked(trainer)

        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        module.between_steps = pause
        try:
            yield
        except Stopped:
            raise signals.Interrupted(signals.received() or signal.SIGTERM) from None


def _trainer(config: TrainerConfig, max_steps: int, folder: Path, callbacks: list[Callback], loggers: list[Any]) -> Trainer:
    return Trainer(
        default_root_dir=folder,  # Lightning takes checkpoints that SLURM's jobs left there for its own
        max_steps=max_steps,
        accelerator=config.accelerator,
        devices=1 if config.devices == "auto" and not torch.cuda.is_available() else config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        logger=loggers,
        callbacks=callbacks,
        **_precision(config),
        deterministic=config.deterministic,
        val_check_interval=min(config.val_every, max_steps),
        check_val_every_n_epoch=None,
        log_every_n_steps=min(config.log_every, max_steps),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,  # tensors that a network first makes in validation stay fit for training
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's advice is not for us: batches come out of memory without end, and the teacher is in eval mode on purpose."""
    with (
        quiet("lightning.pytorch.utilities.rank_zero"),
        quiet("lightning.pytorch.accelerators.cuda"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore",
            message=".*(does not have many workers|`IterableDataset` has `__len__`|directory.*exists and is not empty"
            "|in eval mode at the start of training|before `optimizer.step|LeafSpec.*is deprecated"
            "|callbacks used to create the checkpoint)",
        )
        yield
