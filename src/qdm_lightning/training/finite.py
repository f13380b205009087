"""Training ends at the first value that is not finite, before the step that it would spoil, and leaves what makes it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qdm_lightning.diffusion.finite import NotFiniteError, at_timesteps, watched
from qdm_lightning.quantization.quantizer import LearnedGrid
from qdm_lightning.quantization.taq import Grouped
from qdm_lightning.training.module import DiffusionModule, images_of

DIVERGED = "diverged.ckpt"
"""The state before the step that found a value that is not finite, beside `last.ckpt`."""

LARGEST_LOG_SCALE = 87.0
"""exp(87) and exp(-87) are the last float32 scales whose inverse is one too."""


class FiniteValues(Callback):
    """Looks, before each optimizer step, at loss, gradient norms, weights, scales, averaged weights and TaQ's statistics.

    The gradient's norm is the one that clips it, so that a step costs one reduction over the state and one wait for a GPU. Only
    where a value is not finite, the step's passes are made again to find its layer and its timesteps. A gradient that fp16's
    GradScaler skips is excepted, until its scale falls below 1.

    Args:
        folder: where `diverged.ckpt` goes.
        lower: the setting to lower, with its value.

    Raises (in its hooks, in every rank):
        NotFiniteError: the first value that is not finite, with step, layer and timesteps, and how to make the step again.
    """

    def __init__(self, folder: Path, lower: str) -> None:
        self.folder, self.lower = folder, lower
        self._batch: Any = None
        self._loss = torch.zeros(())
        self._buffers: list[Tensor] = []
        self._looked_at: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._statistics: list[Tensor] = []
        self._stopped = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Walk the networks once: from here on their tensors change in place."""
        assert isinstance(module, DiffusionModule)
        self._looked_at, self._statistics = _looked_at(module), list(module.student.buffers())

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(module, DiffusionModule)
        self._batch, self._buffers = batch, [buffer.clone() for buffer in self._statistics]

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        assert isinstance(module, DiffusionModule)
        gradients = torch.stack(module.gradient_norms())
        state = torch.stack([self._loss, *_extents(*self._looked_at)])
        if self._agreed(trainer, torch.cat([gradients, state])):
            return
        if _skips_steps(trainer) and self._agreed(trainer, state):
            return  # the scaler leaves the step out, and lowers its scale
        self._rewind()
        again = self._cause(trainer, module, gradients)
        self._rewind()
        cause = _first_known(trainer, next(_state_causes(module), again))
        self._stop(trainer, module, f"in step {trainer.global_step + 1} {cause}", "before this step")

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, DiffusionModule)
        if not self._agreed(trainer, torch.stack(_extents(*_looked_at(module)))):
            cause = _first_known(trainer, next(_state_causes(module), ""))
            self._stop(trainer, module, f"after step {trainer.global_step} {cause}", "then")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, DiffusionModule)
        losses = {f"{module.prefix}val/{name}" for name in ("loss", "simple", "nem")} & trainer.callback_metrics.keys()
        for name in sorted(losses):
            loss = trainer.callback_metrics[name]
            if not loss.isfinite():
                cause = f"{name} is {float(loss)}{_validation_layer(trainer, module)}"
                self._stop(trainer, module, f"after step {trainer.global_step} {cause}", "then")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Images that training itself draws, with values that are not finite, leave the state too; a rank alone cannot save."""
        if isinstance(exception, NotFiniteError) and not self._stopped and trainer.world_size == 1:
            trainer.save_checkpoint(self.folder / DIVERGED, weights_only=False)

    def _rewind(self) -> None:
        """TaQ's statistics, as they were before the step's forward pass."""
        for buffer, before in zip(self._statistics, self._buffers, strict=True):
            buffer.copy_(before)

    def _agreed(self, trainer: Trainer, values: Tensor) -> bool:
        """Whether the values are finite, in every rank."""
        bad = (~values.isfinite().all()).float()
        return not trainer.strategy.reduce(bad, reduce_op="max") if trainer.world_size > 1 else not bad

    def _cause(self, trainer: Trainer, module: DiffusionModule, gradients: Tensor) -> str:
        """What is not finite first in the running step, in words; its passes are made again."""
        what = f"{module.prefix}train/loss is {float(self._loss)}"
        if self._loss.isfinite():
            what = f"the norm of the {'quantizers' if gradients[0].isfinite() else 'network'} gradient is not finite"
        parameters = {name: p for name, p in module.student.named_parameters() if p.grad is not None}
        with watched(module, len(images_of(self._batch))) as found:
            with trainer.precision_plugin.train_step_context():
                errors, t = module.errors(self._batch)
            if found.output is None and errors.isfinite().all():
                torch.autograd.grad(errors.mean(), list(parameters.values()), allow_unused=True)
        where = "but finite when the step was made again: suspect the machine"
        overflow = [name for name, p in parameters.items() if not p.grad.isfinite().all()]  # type: ignore[union-attr]
        if found.output is not None:
            where = f"first in {found.output[0]} {at_timesteps(t, found.output[1])}"
        elif not errors.isfinite().all():
            where = f"in the error of the estimate {at_timesteps(t, ~errors.isfinite())}"
        elif not self._loss.isfinite():
            pass
        elif found.gradient is not None:
            where = f"backwards first in {found.gradient[0]} {at_timesteps(t, found.gradient[1])}"
        elif overflow:
            where = f"backwards first in student.{overflow[-1]} {at_timesteps(t)}"
        elif not gradients.isfinite().all():
            where = f"as the squares of finite gradients overflow {at_timesteps(t)}"
        else:
            return ""  # another rank's value
        return f"{what}, {where}"

    def _stop(self, trainer: Trainer, module: DiffusionModule, what: str, when: str) -> None:
        file = self.folder / DIVERGED
        trainer.save_checkpoint(file, weights_only=False)
        self._stopped = True
        raise NotFiniteError(
            f"{what}: training diverged and ends here; {file} holds the state {when}, copied over last.ckpt it lets the same "
            f"command make the step again; lower {self.lower}"
        )


def _skips_steps(trainer: Trainer) -> bool:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() >= 1


def _first_known(trainer: Trainer, cause: str) -> str:
    """What the first rank that knows a cause says, in every rank."""
    if trainer.world_size > 1:
        causes: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(causes, cause)
        cause = next(filter(None, causes), cause)
    return cause


def _state(module: DiffusionModule) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what training keeps: the student's parameters and statistics, and their averages."""
    for network, prefix in ((module.student, "student."), (module.ema_student, "ema.module.")):
        yield from network.named_parameters(prefix.rstrip("."))
        yield from ((name, b) for name, b in network.named_buffers(prefix.rstrip(".")) if b.is_floating_point())


def _looked_at(module: DiffusionModule) -> tuple[list[Tensor], list[Tensor]]:
    """The state's tensors, and those of them that are log s."""
    logs = [m.log_scale.detach() for m in module.modules() if isinstance(m, LearnedGrid)]
    return [tensor.detach() for _, tensor in _state(module)], logs


def _extents(tensors: list[Tensor], logs: list[Tensor]) -> list[Tensor]:
    """The greatest magnitude in the state, and infinity where a scale or its inverse is not finite: two scalars."""
    largest = nn.utils.get_total_norm(tensors, torch.inf)
    scales = torch.cat(logs).abs().max() if logs else torch.zeros_like(largest)
    return [largest, torch.where(scales <= LARGEST_LOG_SCALE, scales, torch.inf)]


def _state_causes(module: DiffusionModule) -> Iterator[str]:
    """Each part of the state that is not finite, in words."""
    for name, tensor in _state(module):
        scale = name.endswith(".log_scale")
        values = tensor.detach().exp() if scale else tensor.detach()
        good = values.isfinite() & (tensor.abs() <= LARGEST_LOG_SCALE) if scale else values.isfinite()
        if not good.all():
            kind = "averaged " if name.startswith("ema.") else ""
            kind += "scale" if scale else "TaQ statistic" if name.endswith((".mean", ".std")) else "weight"
            place = int((~good).flatten().nonzero()[0])
            times = _timesteps_of(module, name, values, place)
            yield f"the {kind} {name}[{place}] is {float(values.flatten()[place]):g} {times}"


def _timesteps_of(module: DiffusionModule, name: str, values: Tensor, place: int) -> str:
    owner = module.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, Grouped) or values.numel() != owner.groups:
        return "at every timestep"
    first, end = (-(-group * owner.num_train_timesteps // owner.groups) for group in (place, place + 1))
    return f"at timesteps {first} to {end - 1}"


def _validation_layer(trainer: Trainer, module: DiffusionModule) -> str:
    """Layer and timesteps of the first validation batch that is not finite, in words."""
    loader: Any = trainer.val_dataloaders
    for batch in loader:
        x0, t, eps, *labels = (values.to(module.device) for values in batch)
        with watched(module, len(x0)) as found, trainer.precision_plugin.val_step_context():
            module.estimates(x0, t, eps, *labels)
        if found.output is not None:
            return f", first in {found.output[0]} {at_timesteps(t, found.output[1])}"
    return ""
