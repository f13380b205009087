"""Images by their seeds, drawn with one network: what a run, an evaluation and a diagnosis all do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdm_lightning.diffusion.sampling import batch_labels, sample, timesteps
from qdm_lightning.diffusion.spec import LEARNED, DiffusionConfig, SamplerConfig, check_guidance, check_variance
from qdm_lightning.models.denoiser import Guided, WithVariance, denoiser
from qdm_lightning.models.unet import label_rows
from qdm_lightning.quantization.layers import cached_weights


@dataclass(kw_only=True)
class ImageSampler:
    """Draws images by their seeds.

    Args:
        network: noise estimator in eval mode, on `device`: a `Denoiser`, or a module with the same call.
        sampler, diffusion: settings of the sampler and of the process.
        shape: (C, H, W) of an image.
        device: where the network runs.
        class_labels: the image of seed s is of class `class_labels[s % len(class_labels)]`; None stands for all classes in
            their order, so that images of consecutive seeds have them in equal parts. Without use where the network takes none.

    Raises:
        ValueError: labels that the network does not take, or guidance where it was not trained with dropped labels.
    """

    network: Any
    sampler: SamplerConfig
    diffusion: DiffusionConfig
    shape: tuple[int, int, int]
    device: torch.device
    class_labels: Sequence[int] | None = None

    def __post_init__(self) -> None:
        classes: int | None = getattr(self.network, "classes", None)
        if self.class_labels is not None:
            check_labels(self.class_labels, classes)
        check_variance(self.sampler.kind, self.sampler.variance, self.diffusion.variance_type)
        check_guidance(self.sampler.guidance, 0.0 if classes is None else self.diffusion.label_dropout)

    @property
    def estimator(self) -> Any:
        """What the sampler is given: the network, with its variance and guided where the sampler says so."""
        network = WithVariance(self.network) if self.sampler.variance == LEARNED else self.network
        guidance = self.sampler.guidance
        return network if guidance == 1 else Guided(network, self.network.null_label, guidance)

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """Class of the image of each seed; None where the network takes no labels."""
        classes: int | None = getattr(self.network, "classes", None)
        if classes is None:
            return None
        cycle = range(classes) if self.class_labels is None else self.class_labels
        return [cycle[seed % len(cycle)] for seed in seeds]

    def steps(self, count: int) -> int:
        """Calls of the network for `count` images that are drawn together."""
        return -(-count // self.sampler.batch_size) * len(timesteps(self.sampler, self.diffusion))

    def call_seconds(self) -> float:
        """Seconds of one of those calls at the batch size (of two where it is guided): the second, as the first may compile."""
        x = torch.zeros(self.sampler.batch_size, *self.shape, device=self.device)
        t = torch.zeros(len(x), dtype=torch.int64, device=self.device)
        labels = batch_labels(self.labels(range(len(x))), 0, len(x), self.device)
        seconds = 0.0
        with torch.no_grad(), cached_weights(self.network):
            for _ in range(2):
                begin = time.perf_counter()
                self.estimator(x, t, *labels).sum().item()  # waits for the device
                seconds = time.perf_counter() - begin
        return seconds

    def draw(
        self,
        seeds: Sequence[int],
        on_step: Callable[[], None] | None = None,
        on_state: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Images (len(seeds), C, H, W) float32 in [-1, 1] on the CPU; arguments as in `diffusion.sampling.sample`."""
        with cached_weights(self.network):
            return sample(
                self.estimator,
                self.sampler,
                self.diffusion,
                shape=self.shape,
                seeds=seeds,
                labels=self.labels(seeds),
                device=self.device,
                on_step=on_step,
                on_state=on_state,
            )


def check_labels(class_labels: Sequence[int], classes: int | None) -> None:
    """Raise ValueError unless a network of so many classes takes these labels."""
    if classes is None:
        raise ValueError(f"class_labels={list(class_labels)}: the network takes no class labels, leave them out")
    wrong = [label for label in class_labels if not 0 <= label < classes]
    if wrong or not class_labels:
        raise ValueError(f"class_labels={list(class_labels)} is not allowed: give one or several of 0..{classes - 1}")


def draw_images(
    unet: Any,
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    diffusion: DiffusionConfig | None = None,
    *,
    class_labels: int | Sequence[int] | None = None,
) -> Tensor:
    """Images of a U-Net in memory, (len(seeds), C, H, W) float32 in [-1, 1] on the CPU; image i depends on its seed alone.

    Args:
        unet: a `UNet2DModel` in eval mode, prepared or not, on any device.
        seeds: one for each image, 0..2^32-1.
        sampler: how; DDIM with 50 steps, 16 images together, where None.
        diffusion: the process that the network was trained on. None: what a student's files say, else DDPM's linear one.
        class_labels: one class for all images, or several in turn by seed, as of `ImageSampler`; None takes all in turn.

    Raises:
        ValueError: settings that the sampler refuses, labels that the network does not take, none where neither its files nor
            `diffusion` say which of them stands for no class, or a network in training mode, whose dropout would draw other
            images.
    """
    if unet.training:
        raise ValueError("the network is in training mode: call eval() before it draws")
    said = getattr(getattr(unet, "hf_quantizer", None), "settings", {}).get("diffusion")
    if label_rows(unet) is not None and (said, diffusion, class_labels) == (None, None, None):
        raise ValueError("the network is class-conditional, and nothing says which classes it has: give class_labels=")
    size = unet.config.sample_size
    diffusion = diffusion or DiffusionConfig(**(said or {}))
    return ImageSampler(
        network=denoiser(unet, diffusion),
        sampler=sampler or SamplerConfig(batch_size=16),
        diffusion=diffusion,
        shape=(unet.config.in_channels, *((size, size) if isinstance(size, int) else size)),
        device=next(iter(unet.state_dict().values())).device,
        class_labels=[class_labels] if isinstance(class_labels, int) else class_labels,
    ).draw(list(seeds))
