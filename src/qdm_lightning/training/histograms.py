"""Activations by bucket of t: the inputs of the quantizers while validation images go through the student once."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization.layers import cached_weights
from qdm_lightning.quantization.quantizer import ActivationQuantizer
from qdm_lightning.training.validation_set import BUCKETS, ValidationSet

SAMPLES = 12
"""Least number of validation samples of a bucket."""

VALUES = 2**14
"""Greatest number of values of one layer and pass, taken evenly."""


def layer_label(name: str) -> str:
    """Name of a quantizer on a dashboard: that of its module inside the U-Net."""
    return name.removeprefix("unet.").replace(".processor.", ".")


def bucket_middle(bucket: int, num_train_timesteps: int) -> int:
    """The t in the middle of one of `BUCKETS` equal ranges."""
    return (2 * bucket + 1) * num_train_timesteps // (2 * BUCKETS)


@torch.no_grad()
def activations_by_bucket(
    network: Denoiser, patterns: Sequence[str], validation_set: ValidationSet, diffusion: DiffusionConfig, batch_size: int
) -> dict[str, list[Tensor]]:
    """Inputs of the activation quantizers whose label matches a pattern, a tensor (N,) on the CPU for each bucket of t.

    Args:
        network: the student, in eval mode.
        patterns: patterns (`fnmatch`) of `layer_label`s; one that matches nothing is left out.
        batch_size: the sampler's, so that nothing is compiled anew.
    """
    quantizers = {layer_label(n): m for n, m in network.named_modules() if isinstance(m, ActivationQuantizer)}
    chosen = {name: m for name, m in quantizers.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not chosen:
        return {}
    parts: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(BUCKETS)] for name in chosen}
    bucket = torch.zeros(0, dtype=torch.int64)

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().reshape(len(args[0]), -1)
        rows = rows[:, :: max(1, rows.numel() // VALUES)].float().cpu()
        of_row = bucket.repeat_interleave(len(rows) // len(bucket))  # attention folds its heads into the batch
        for b in range(BUCKETS):
            parts[name][b].append(rows[of_row == b].flatten())

    device = next(network.parameters()).device
    scheduler = noise_scheduler(diffusion)
    order = validation_set.t.argsort()
    count = min(-(-SAMPLES * BUCKETS // batch_size) * batch_size, len(order))
    picked = order[torch.arange(count) * len(order) // count]
    hooks = [module.register_forward_pre_hook(partial(see, name)) for name, module in chosen.items()]
    try:
        with cached_weights(network):
            for part in picked.split(batch_size):
                x0, t, eps = validation_set.x0[part], validation_set.t[part], validation_set.eps[part]
                bucket = t * BUCKETS // validation_set.num_train_timesteps
                x = add_noise(scheduler, x0, eps, t).to(device, memory_format=torch.channels_last)
                network(x, t.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: [torch.cat(values) for values in buckets] for name, buckets in parts.items()}
