"""What a configuration needs of the machine's memory, estimated from its settings: absurd sizes are told at once.

The estimates are low: what they refuse cannot run here. `unet_digits` takes 1.2 MB an image of a training step and 0.2 MB an
image that is drawn; estimated are 0.5 and 0.16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qdm_lightning.base.checks import fits_memory, memory
from qdm_lightning.cli.schema import TrainConfig

FLOAT = 4
"""Bytes."""

USUAL_BATCH = 1024
"""Batches up to here are left to the machine that trains: a sweep's jobs are checked where they are submitted."""

COPIES = 6
"""Of the weights in training: teacher, student, gradient, Adam's two moments, average."""

KEPT = 3
"""Times the activations of a drawn image that a training step keeps for its backward pass at least (6 without compiling)."""


def network_memory(node: Mapping[str, Any]) -> tuple[int, int]:
    """(weights, activations of one image) in bytes of a `UNet2DModel` with these settings; 0 where they do not say."""
    widths, size, layers = (node.get(name) for name in ("block_out_channels", "sample_size", "layers_per_block"))
    if not widths or size is None or layers is None:
        return 0, 0
    down, up = 2 * 9 * layers, 3 * 9 * (layers + 1)
    area = math.prod(size) if isinstance(size, list | tuple) else size**2
    weights = sum((down + up) * width**2 for width in widths)
    activations = sum(area // 4**level * width * (4 * layers + 5 * (layers + 1)) for level, width in enumerate(widths))
    return FLOAT * weights, FLOAT * activations


def available(accelerator: str) -> int:
    """Bytes of the greatest memory that a network of this run could lie in: the machine's, or its GPUs' together."""
    if accelerator == "cpu":
        return memory()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return max(memory(), sum(torch.cuda.get_device_properties(index).total_memory for index in range(count)))


def check_sizes(s: TrainConfig, network: Mapping[str, Any]) -> None:
    """Raise ValueError at the first setting that takes more memory than there is.

    Args:
        s: settings of a run.
        network: of its U-Net, as far as they are known.
    """
    weights, activations = network_memory(network)
    have = available(s.trainer.accelerator)
    named = ", ".join(f"model.{name}={network.get(name)}" for name in ("layers_per_block", "block_out_channels"))
    fits_memory(named, COPIES * weights, have)
    channels, size = network.get("in_channels") or 1, network.get("sample_size") or 1
    image = FLOAT * channels * (math.prod(size) if isinstance(size, list | tuple) else size**2)
    batch = getattr(s.data, "batch_size", 0)
    processes = s.trainer.num_nodes * (s.trainer.devices if isinstance(s.trainer.devices, int) else 1)
    layers = len(network.get("block_out_channels") or [1]) * (network.get("layers_per_block") or 1)
    needs = {
        "data.batch_size": (batch, KEPT * activations / processes),
        "sampler.batch_size": (s.sampler.batch_size, activations),
        "num_samples": (s.num_samples, 2 * image + 32),  # of teacher and student, and the seeds
        "trainer.val_images": (s.trainer.val_images, 3 * image),
        "diffusion.num_train_timesteps": (s.diffusion.num_train_timesteps, 8 * FLOAT),
        "quant.calibration_batches": (s.quant.calibration_batches, 64 * 128 * FLOAT * layers),
        "nem.on_policy_buffer": (s.nem.on_policy_buffer if s.nem.on_policy_fraction else 0, 2 * image),
    }
    for name, (count, each) in needs.items():
        if name.endswith("batch_size") and count <= USUAL_BATCH:
            continue
        fits_memory(f"{name}={count}", count * each, have)
