"""Settings of the data sets (config group `data`). Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from qdm_lightning.base.checks import at_least, between, folder, one_of

DATASETS = "~/.cache/qdm_lightning/datasets"
"""Where data sets are looked for, and decoded ones kept; the YAML files say `${paths.cache}/datasets`."""

FILTERS = ("lanczos", "area", "bicubic", "bilinear")
"""Resampling filters of a size change; each is antialiased when it shrinks. `area` averages the pixels covered."""


@dataclass(kw_only=True)
class DataConfig:
    """What all data sets have in common.

    Args:
        batch_size: images of one training step, over all ranks together.
        flip: mirror images at random in training.

    Attributes:
        classes: of the images' labels; None where the data set has none.

    Raises:
        ValueError: `batch_size` below 1.
    """

    classes: ClassVar[int | None] = None
    batch_size: int = 64
    flip: bool = True

    def __post_init__(self) -> None:
        at_least("data.batch_size", self.batch_size, 1)


@dataclass(kw_only=True)
class DigitsConfig(DataConfig):
    """`data=digits`: the 1,797 handwritten 8x8 digits that ship with the package, 1,500 to train on and 297 held out.

    `flip` is off: a mirrored digit is no digit.
    """

    _target_: str = "qdm_lightning.data.digits.DigitsData"
    classes: ClassVar[int | None] = 10
    flip: bool = False


@dataclass(kw_only=True)
class PicturesConfig(DataConfig):
    """What the user's own pictures have in common, however they are stored.

    Args:
        path: where they are.
        image_size: edge length in pixels; pictures of another size are cropped to the central square and resized. None
            takes them as they are: squares of one size.
        channels: 3 (RGB) or 1 (gray).
        filter: resampling of the size change, one of `FILTERS`.
        val_fraction: share of the pictures that is held out, the same ones on every run.
        cache: folder for the decoded pictures, memory-mapped by later runs; None decodes anew, into memory.

    Raises:
        ValueError: a value outside its range.
    """

    path: str | None = None
    image_size: int | None = None
    channels: int = 3
    filter: str = "lanczos"
    val_fraction: float = 0.1
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            at_least("data.image_size", self.image_size, 1)
        one_of("data.channels", self.channels, (3, 1))
        one_of("data.filter", self.filter, FILTERS)
        between("data.val_fraction", self.val_fraction, 0.0, 0.5)
        if self.cache is not None:
            folder("data.cache", self.cache)


@dataclass(kw_only=True)
class ImagesConfig(PicturesConfig):
    """`data=images`: the user's own picture files.

    Args:
        path: a folder (every picture below it that Pillow reads, in sorted order) or an .npz of uint8 (N, H, W, C), array
            `images` or the sole array.
        image_size, channels, filter, val_fraction, cache: see `PicturesConfig`; an .npz is not cached.

    Raises:
        ValueError: no path, or a value outside its range.
        FileNotFoundError: nothing exists at `path`.
    """

    _target_: str = "qdm_lightning.data.images.ImagesData"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data=images needs pictures: type data.path=<folder of pictures, or .npz of uint8 (N, H, W, C)>")
        if not Path(self.path).expanduser().exists():
            raise FileNotFoundError(
                f"data.path={self.path}: nothing there; give a folder of pictures or an .npz of uint8 (N, H, W, C)"
            )
        super().__post_init__()


@dataclass(kw_only=True)
class HFConfig(PicturesConfig):
    """`data=hf`: a data set as the library `datasets` reads it.

    Args:
        path: a folder (of `save_to_disk`, of parquet files, or of pictures), a .parquet file, or the id of a data set on the
            hub such as `uoft-cs/cifar10`.
        name: configuration of the data set, where it has several.
        split: the split to train on, part of which is held out.
        column: the column of the pictures; None takes the only one that holds pictures.
        image_size, channels, filter, val_fraction, cache: see `PicturesConfig`.

    Raises:
        ValueError: no path, a value outside its range, or `datasets` is not installed.
        FileNotFoundError: `path` is neither there nor an id.
    """

    _target_: str = "qdm_lightning.data.hf.HFData"
    name: str | None = None
    split: str = "train"
    column: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data=hf needs a data set: type data.path=<folder, .parquet file, or id on the hub>")
        if not Path(self.path).expanduser().exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.path):
            raise FileNotFoundError(
                f"data.path={self.path}: nothing there; give a folder, a .parquet file, or an id on the hub (uoft-cs/cifar10)"
            )
        if not self.split:
            raise ValueError("data.split is empty: type data.split=train")
        if find_spec("datasets") is None:
            raise ValueError("data=hf needs datasets: pip install 'qdm-lightning[hf]'")
        super().__post_init__()


@dataclass(kw_only=True)
class DownloadedConfig(DataConfig):
    """What the downloaded data sets have in common.

    Args:
        root: folder that holds the files.
        download: fetch what is missing.
        verify: compare with the published MD5 sums and numbers of images; False accepts other files of the same format.
        image_size: edge length in pixels.
        filter: resampling of a size change, one of `FILTERS`.

    Raises:
        ValueError: a value outside its range.
    """

    root: str = DATASETS
    download: bool = False
    verify: bool = True
    image_size: int = 64
    filter: str = "area"
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.root:
            raise ValueError("data.root is empty: type data.root=<folder that holds the data set>")
        at_least("data.image_size", self.image_size, 1)
        one_of("data.filter", self.filter, FILTERS)


@dataclass(kw_only=True)
class Cifar10Config(DownloadedConfig):
    """`data=cifar10`: 50,000 training images, the 10,000 test images held out.

    `root` holds torchvision's `cifar-10-batches-py/`. `image_size=16` takes means of 2x2 pixels (`filter=area`).
    """

    _target_: str = "qdm_lightning.data.cifar10.Cifar10Data"
    classes: ClassVar[int | None] = 10
    image_size: int = 32


@dataclass(kw_only=True)
class CelebAConfig(DownloadedConfig):
    """`data=celeba`: 162,770 aligned faces, the validation split held out.

    `root` holds torchvision's `celeba/` with `img_align_celeba/` and `list_eval_partition.txt`. The central square of `crop`
    pixels is resized to `image_size`; the decoded images are kept in `cache` (None: in memory).
    """

    _target_: str = "qdm_lightning.data.celeba.CelebAData"
    filter: str = "bilinear"
    crop: int = 140
    cache: str | None = DATASETS

    def __post_init__(self) -> None:
        super().__post_init__()
        between("data.crop", self.crop, 1, 178)
        if self.cache is not None:
            folder("data.cache", self.cache)


@dataclass(kw_only=True)
class ImageNet64Config(DownloadedConfig):
    """`data=imagenet64`: 1,281,167 images of ImageNet at 64x64, the validation set held out.

    `root` holds `train_data_batch_1.npz` to `train_data_batch_10.npz` and `val_data.npz`; the images are kept uncompressed in
    `cache` (15.7 GB; None: in memory). ImageNet asks for a login, so `download=true` is an error.

    Its classes are numbered as in its files (0 is their class 1, the kit fox). With `synsets`, a file of lines
    `n02119789 1 kit_fox` (map_clsloc.txt of the development kit), they are in the order of their WordNet ids (0 is the tench),
    as for networks that were trained on ImageNet's folders.
    """

    _target_: str = "qdm_lightning.data.imagenet64.ImageNet64Data"
    classes: ClassVar[int | None] = 1000
    root: str = f"{DATASETS}/imagenet64"
    cache: str | None = DATASETS
    synsets: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.download:
            raise ValueError(
                "data.download=true cannot fetch ImageNet, which asks for a login: get Imagenet64_train_part1.zip, "
                "Imagenet64_train_part2.zip and Imagenet64_val.zip from https://image-net.org/download-images.php and unpack "
                f"them in data.root={self.root}"
            )
        if self.cache is not None:
            folder("data.cache", self.cache)
