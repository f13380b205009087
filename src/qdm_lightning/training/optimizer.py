"""Adam for network and quantizers, its schedule, and the EMA's warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qdm_lightning.quantization.layers import QuantizedLayer
from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer
from qdm_lightning.training.spec import OptimizerConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the network, and those of its quantizers, learned scales by channel among them."""
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]
    channels = [m.log_channel_scale for m in model.modules() if isinstance(m, QuantizedLayer)]
    of_channels = [scale for scale in channels if isinstance(scale, nn.Parameter)]
    learned = {id(p): p for p in [*(p for m in quantizers for p in m.parameters()), *of_channels]}
    return [p for p in model.parameters() if id(p) not in learned], list(learned.values())


class QuantizerAdam(torch.optim.Adam):
    """Adam that leaves the rows of a `rows_move_alone` parameter where their gradient is zero.

    A timestep group that is absent from a batch would otherwise drift on by momentum.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        # The closure holds the backward pass: run it first, the gradients tell which rows must stay.
        with torch.enable_grad():
            loss = None if closure is None else closure()
        rows = [
            (p, p.grad == 0, p.detach().clone())
            for group in self.param_groups
            for p in group["params"]
            if getattr(p, "rows_move_alone", False) and p.grad is not None
        ]
        super().step()
        with torch.no_grad():
            for parameter, still, before in rows:
                parameter.copy_(torch.where(still, before, parameter))
        return loss


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> QuantizerAdam:
    """Adam (fused) over two groups: the network's parameters, and the quantizers' with their own learning rate."""
    network, quantizers = split_parameters(model)
    rates = ((network, config.lr), (quantizers, config.quantizer_lr))
    groups = [{"params": parameters, "lr": lr} for parameters, lr in rates if parameters]
    adam = QuantizerAdam(groups, betas=(config.beta1, config.beta2), fused=True)
    adam._step_supports_amp_scaling = False  # gradients are unscaled before they are clipped, not within the fused step
    return adam


def learning_rate_factor(config: OptimizerConfig, max_steps: int, step: int) -> float:
    """Factor on the learning rate at a step: linear from 1/warmup to 1, then as `config.schedule` says.

    `constant` stays at 1 (DDPM's code); `cosine` falls along half a cosine to 0 at `max_steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def average(decay: float, averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
    """Update an EMA (`multi_avg_fn` of `AveragedModel`) by min(decay, (1 + n) / (10 + n)), which grows with its n updates."""
    n = int(updates)
    torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + n) / (10 + n)))
