"""The LightningModule: a frozen full-precision teacher and a student that learns to mimic it, or a teacher in the making."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from qdm_lightning.base.ranks import training_rank
from qdm_lightning.diffusion.finite import NotFiniteError
from qdm_lightning.diffusion.images import to_float
from qdm_lightning.diffusion.losses import per_sample_mse, student_errors
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig
from qdm_lightning.models.denoiser import Denoiser, denoiser
from qdm_lightning.training.dropout import share_dropout
from qdm_lightning.training.network_settings import KEY, check_settings
from qdm_lightning.training.on_policy import TrajectoryBuffer
from qdm_lightning.training.optimizer import average, build_optimizer, learning_rate_factor, split_parameters
from qdm_lightning.training.spec import OptimizerConfig


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one training step, a function of (seed, step): each rank draws for all, and takes its share."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step, 0]).generate_state(1)[0]))


Batch = Tensor | Sequence[Tensor]
"""Of training: uint8 images (B, C, H, W), or such images and their classes (B,)."""


def images_of(batch: Batch) -> Tensor:
    """The images of a training batch."""
    return batch if isinstance(batch, Tensor) else batch[0]


class DiffusionModule(LightningModule):
    """Trains `network` by L_simple and L_NeM (see `diffusion.losses`) on batches of uint8 images, with their classes where the
    network takes them.

    Every random draw of a sample is a function of (seed, global step, place in the step's whole batch), so that a resumed run
    sees what an uninterrupted one sees, and several ranks what one process sees.

    Args:
        network: the U-Net to train; prepared and calibrated, where it is a student.
        teacher: the frozen full-precision U-Net, always in eval mode; None trains by L_simple alone.
        settings: what shapes `network`; checkpoints carry it, and one of another network is refused (see `network_settings`).
        diffusion, nem, optimizer: settings.
        max_steps: last step of the training and of the learning rate's schedule.
        seed: seed of the order of the images, the flips, timesteps, noise and dropout.
        flip: mirror images at random.
        prefix: prefix of the logged names, such as `teacher/`.
        teacher_bf16: run the teacher in bfloat16 in training steps; its noise estimate is float32 again before the loss.
        weights: w(t) of L_NeM, (T,), see `diffusion.weighting`; None stands for 1.

    Attributes:
        between_steps: what the trainer does before each step.
    """

    weights: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module | None,
        *,
        settings: Mapping[str, Any],
        diffusion: DiffusionConfig,
        nem: NeMConfig,
        optimizer: OptimizerConfig,
        max_steps: int,
        seed: int,
        flip: bool,
        prefix: str = "",
        teacher_bf16: bool = False,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        if teacher is None and nem.mode != "off":
            raise ValueError(f"nem.mode={nem.mode} needs a teacher: type nem=off")
        self.diffusion, self.nem, self.optimizer = diffusion, nem, optimizer
        self.settings, self.warnings = dict(settings), list[str]()
        self.max_steps, self.seed, self.flip, self.prefix = max_steps, seed, flip, prefix
        self.teacher_bf16 = teacher_bf16
        self.register_buffer("weights", weights, persistent=False)
        self.student = denoiser(network, diffusion)
        share_dropout(self.student)
        self.teacher = None if teacher is None else denoiser(teacher, diffusion).requires_grad_(False).eval()
        self.ema = AveragedModel(self.student, multi_avg_fn=partial(average, optimizer.ema_decay)).requires_grad_(False).eval()
        self.scheduler = noise_scheduler(diffusion)
        self.buffer = TrajectoryBuffer(nem, diffusion, seed) if nem.on_policy_fraction else None
        self.between_steps: Callable[[], None] | None = None
        self._norms: tuple[Tensor, Tensor] | None = None

    @property
    def ema_student(self) -> Denoiser:
        """The averaged student, which is what gets evaluated."""
        return cast(Denoiser, self.ema.module)

    def train(self, mode: bool = True) -> DiffusionModule:
        super().train(mode)
        self.ema.eval()
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call `between_steps`: of Lightning's hooks the one at which the step before is complete and counted, and the
        next one not begun."""
        if self.trainer.training and self.between_steps is not None:
            self.between_steps()
        return batch

    def on_train_start(self) -> None:
        self.train()

    def _noisy_batch(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """x_t, t, eps and labels, if any, for this rank's share of the step, drawn on the CPU for all of it and moved."""
        x0, labels = to_float(images_of(batch)), None if isinstance(batch, Tensor) else batch[1]
        rank, ranks = training_rank()
        count, total = len(x0), ranks * len(x0)

        def own(drawn: Tensor) -> Tensor:
            return drawn[rank * count : (rank + 1) * count].to(x0.device)

        if self.flip:
            mirror = own(torch.rand(total, generator=generator)) < 0.5
            x0 = torch.where(mirror[:, None, None, None], x0.flip(-1), x0)
        t = own(torch.randint(self.diffusion.num_train_timesteps, (total,), generator=generator))
        eps = own(torch.randn((total, *x0.shape[1:]), generator=generator))
        x = add_noise(self.scheduler, x0, eps, t)
        if self.buffer is not None:
            try:
                x, t, labels = self.buffer.mix(x, t, generator, self.global_step, self.ema_student, rank * count, total, labels)
            except NotFiniteError as error:
                raise NotFiniteError(f"in step {self.global_step + 1} {error}: training ends here") from error
        if labels is not None and self.student.null_label is not None:
            dropped = own(torch.rand(total, generator=generator)) < self.student.label_dropout
            labels = labels.masked_fill(dropped, self.student.null_label)
        return x.contiguous(memory_format=torch.channels_last), t, eps, [] if labels is None else [labels]

    def errors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Errors of the running training step before the mean, and timesteps, each (B,), for its batch."""
        generator = step_generator(self.seed, self.global_step)
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))  # dropout
        x, t, eps, labels = self._noisy_batch(batch, generator)
        eps_fp, eps_q = self._teacher_noise(x, t, *labels), self.student(x, t, *labels)
        return student_errors(self.nem, eps, eps_fp, eps_q, self._weights_at(t)), t

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.errors(batch)[0].mean()

    def _weights_at(self, t: Tensor) -> Tensor | None:
        return None if self.weights is None else self.weights[t]

    def _teacher_noise(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor | None:
        if self.teacher is None or self.nem.mode == "off":
            return None
        lower = torch.autocast(x.device.type, torch.bfloat16) if self.teacher_bf16 else nullcontext()
        with torch.no_grad(), lower:
            return cast(Tensor, self.teacher(x, t, *labels).to(x.dtype))

    @torch.no_grad()
    def estimates(self, x0: Tensor, t: Tensor, eps: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Noise estimates of the averaged student, and of the teacher where there is one, (B, C, H, W), of x_t."""
        x = add_noise(self.scheduler, x0, eps, t).contiguous(memory_format=torch.channels_last)
        return self.ema_student(x, t, *labels), None if self.teacher is None else self.teacher(x, t, *labels)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """`val/loss` is the training loss of the averaged student on the validation set; L_simple and L_NeM are logged too."""
        x0, t, eps, *labels = batch
        eps_q, eps_fp = self.estimates(x0, t, eps, *labels)
        values = {
            "val/loss": student_errors(self.nem, eps, eps_fp, eps_q, self._weights_at(t)),
            "val/simple": per_sample_mse(eps, eps_q),
        }
        if eps_fp is not None:
            values["val/nem"] = per_sample_mse(eps_fp, eps_q)
        means = {f"{self.prefix}{name}": value.mean() for name, value in values.items()}
        self.log_dict(means, batch_size=len(x0), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average the student; after the last step ask for the end, so that Lightning validates it, once."""
        self.trainer.should_stop |= self.global_step >= self.max_steps
        self.ema.update_parameters(self.student)
        self.log(f"{self.prefix}train/loss", outputs["loss"], batch_size=len(images_of(batch)), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.student, self.optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, self.optimizer, self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip the network's gradient alone: a scale's gradient has units of its own."""
        network, _ = split_parameters(self.student)
        nn.utils.clip_grads_with_norm_(network, self.optimizer.gradient_clip, self.gradient_norms()[0])
        self._norms = None

    def gradient_norms(self) -> tuple[Tensor, Tensor]:
        """L2 norms of the network's and of the quantizers' gradient, taken once between a backward pass and the clipping."""
        if self._norms is None:
            network, quantizers = ([p.grad for p in group if p.grad is not None] for group in split_parameters(self.student))
            total = nn.utils.get_total_norm(network)
            self._norms = total, nn.utils.get_total_norm(quantizers).to(total.device)
        return self._norms

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The teacher is a folder of its own in the run: the checkpoint leaves it out."""
        checkpoint[KEY] = self.settings
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("teacher.")}
        if self.buffer is not None:
            checkpoint["trajectory_buffer"] = self.buffer.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError where the checkpoint is of another network; `warnings` says where it could not be compared."""
        warning = check_settings(checkpoint.get(KEY), self.settings, "the run's checkpoint")
        self.warnings += [warning] if warning and warning not in self.warnings else []
        own = {k: v for k, v in self.state_dict().items() if k.startswith("teacher.")}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}
        if self.buffer is not None:
            self.buffer.load(checkpoint["trajectory_buffer"])
