"""The base of every data set: uint8 images in memory, and training batches that are a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from qdm_lightning.base.files import sha256
from qdm_lightning.base.ranks import training_rank
from qdm_lightning.data.spec import DataConfig


def epoch_permutation(length: int, seed: int, epoch: int) -> Tensor:
    """Order of the `length` images in one epoch, (length,) int64, a function of (seed, epoch) alone."""
    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return torch.randperm(length, generator=torch.Generator().manual_seed(state))


class StepBatches:
    """Endless training batches: batch k takes positions [k B, (k + 1) B) of the epochs' permutations laid end to end.

    No image is left out of an epoch, whatever B; a run that resumes at step k sees what an uninterrupted one sees.
    Under torch.distributed each rank yields its own equal slice of the batch.

    Args:
        images: (N, C, H, W) uint8, N >= 1.
        batch_size: B, over all ranks together.
        seed: seed of the permutations.
        start_step: k of the first batch that iteration yields.
        labels: (N,) int64, the images' classes; None yields images alone.
    """

    def __init__(
        self, images: Tensor, *, batch_size: int, seed: int, start_step: int = 0, labels: Tensor | None = None
    ) -> None:
        self.images, self.batch_size, self.seed, self.start_step = images, batch_size, seed, start_step
        self.labels = labels
        self._permutations: dict[int, Tensor] = {}

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = epoch_permutation(len(self.images), self.seed, epoch)
        return self._permutations[epoch]

    def indices(self, step: int) -> Tensor:
        """Indices into `images` of batch `step`, all ranks together: (batch_size,) int64."""
        length, begin, parts = len(self.images), step * self.batch_size, []
        end = begin + self.batch_size
        while begin < end:
            epoch, offset = divmod(begin, length)
            parts.append(self._permutation(epoch)[offset : offset + end - begin])
            begin += len(parts[-1])
        return torch.cat(parts)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """Yield (batch_size / ranks, C, H, W) uint8 for ever, or such images and their labels (batch_size / ranks,).

        Raises:
            ValueError: the number of ranks does not divide `batch_size`.
        """
        rank, ranks = training_rank()
        share, rest = divmod(self.batch_size, ranks)
        if rest:
            raise ValueError(
                f"data.batch_size={self.batch_size} cannot be shared among {ranks} devices: "
                f"type a multiple of {ranks}, for example data.batch_size={max(share, 1) * ranks}"
            )
        pixels = self.images.numpy()  # numpy copies rows on one thread: torch's indexing waits for all of a busy machine's
        for step in count(self.start_step):
            chosen = self.indices(step)[rank * share : (rank + 1) * share]
            images = torch.from_numpy(pixels[chosen.numpy()])
            yield images if self.labels is None else (images, self.labels[chosen])


class ImageDataModule(LightningDataModule):
    """Uint8 images, some to train on and some held out. A data set implements `load`, and `load_labels` where it has labels.

    Args:
        config: settings of the data set.
        channels, image_size: channels and edge in pixels of one image; `image_size` is None where only the files know it.

    Attributes:
        batch_size: images of one training step, over all ranks together.
        flip: whether training mirrors images at random (the training step does it, not the data module).
        channels, image_size: channels and edge in pixels of one image, as the files have them from `setup` on.
        classes: of the labels, which are 0..classes-1; None where the data set has none.
        labelled: whether the network takes labels; the runner sets it.
        seed, start_step: seed and first step of the training batches; the runner sets them before `train_dataloader`.
    """

    def __init__(self, config: DataConfig, channels: int, image_size: int | None) -> None:
        super().__init__()
        self.batch_size, self.flip = config.batch_size, config.flip
        self.channels, self.image_size = channels, image_size
        self.classes, self.labelled = config.classes, False
        self.seed, self.start_step = 0, 0
        self._images: tuple[Tensor, Tensor] | None = None
        self._labels: tuple[Tensor, Tensor] | None = None
        self._kept: int | None = None
        self._fingerprint: str | None = None

    def load(self) -> tuple[Tensor, Tensor]:
        """Return (training images, held-out images), each (N, C, H, W) uint8 with square images of one size, N >= 1.

        Raises:
            FileNotFoundError: files are missing.
            ValueError: files are damaged or are not what they should be.
        """
        raise NotImplementedError

    def load_labels(self) -> tuple[Tensor, Tensor]:
        """Return the classes, (N,) int64 in 0..`classes`-1, of the images that `load` returns, in their order.

        Raises:
            ValueError: files are damaged, or the data set has no labels.
        """
        raise ValueError(f"{type(self).__name__} has no labels: take a network without classes, model.num_class_embeds=null")

    def setup(self, stage: str | None = None) -> None:
        """Load the images, once; `stage` makes no difference. Raises what `load` raises."""
        if self._images is None:
            train, val = self.load()
            self._images = train, val
            self.channels, self.image_size = train.shape[1], train.shape[2]

    def keep_first(self, count: int) -> None:
        """From now on the first `count` training images are all there are, to train on and held out. After `setup`."""
        few = self.train_images[:count]
        self._images, self._kept = (few, few), count
        self._labels = self._fingerprint = None

    def _loaded(self) -> tuple[Tensor, Tensor]:
        if self._images is None:
            raise RuntimeError(f"{type(self).__name__} holds no images yet: call setup() first")
        return self._images

    @property
    def train_images(self) -> Tensor:
        """Training images, (N, C, H, W) uint8. Raises RuntimeError before `setup`."""
        return self._loaded()[0]

    @property
    def val_images(self) -> Tensor:
        """Held-out images, (N, C, H, W) uint8. Raises RuntimeError before `setup`."""
        return self._loaded()[1]

    def all_labels(self) -> tuple[Tensor, Tensor]:
        """Classes of the training and of the held-out images, each (N,) int64; read when they are first asked for.

        Raises:
            RuntimeError: before `setup`.
            ValueError: the data set has none, they are damaged, or they are not one for each image in 0..`classes`-1.
        """
        if self._labels is None:
            images, labels = self._loaded(), self.load_labels()
            if self._kept is not None:
                labels = (labels[0][: self._kept], labels[0][: self._kept])
            for part, classes in zip(images, labels, strict=True):
                if len(classes) != len(part) or not ((classes >= 0) & (classes < (self.classes or 0))).all():
                    raise ValueError(f"{type(self).__name__} has not one label in 0..{(self.classes or 0) - 1} for each image")
            self._labels = labels
        return self._labels

    @property
    def train_labels(self) -> Tensor | None:
        """Classes of the training images, (N,) int64; None where the network takes none. Raises what `all_labels` raises."""
        return self.all_labels()[0] if self.labelled else None

    @property
    def val_labels(self) -> Tensor | None:
        """Classes of the held-out images, (N,) int64; None where the network takes none. Raises what `all_labels` raises."""
        return self.all_labels()[1] if self.labelled else None

    def train_dataloader(self) -> StepBatches:
        """Endless batches from step `start_step` on, with labels where the network takes them, see `StepBatches`."""
        return StepBatches(
            self.train_images,
            batch_size=self.batch_size,
            seed=self.seed,
            start_step=self.start_step,
            labels=self.train_labels,
        )

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over shape and bytes of the training and the held-out images."""
        if self._fingerprint is None:
            self._fingerprint = content_hash(*self._loaded())
        return self._fingerprint

    def labels_fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over the classes of all images. Raises what `all_labels` raises."""
        return sha256(str(labels.tolist()) for labels in self.all_labels())


def content_hash(*arrays: Tensor) -> str:
    """SHA-256 (hexadecimal) over shape and bytes of uint8 tensors, read in pieces so that memory-mapped ones may be large."""
    parts = (chain([str(tuple(array.shape))], (part.contiguous().numpy() for part in array.split(4096))) for array in arrays)
    return sha256(chain.from_iterable(parts))
