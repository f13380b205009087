"""`data=celeba`: the aligned CelebA faces in torchvision's layout, central square, resized."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.datasets import CelebA  # type: ignore[import-untyped]

from qdm_lightning.data.cache import cached, listing_key
from qdm_lightning.data.downloads import download, require
from qdm_lightning.data.image_files import channels_first, decode, in_threads, resize
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import CelebAConfig

ALIGNED_SIZE = (178, 218)
"""Width and height of the aligned pictures."""

PARTITION = "list_eval_partition.txt"
PICTURES = "img_align_celeba"
FILES = f"get {PICTURES}.zip (unpacked) and {PARTITION} from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


class CelebAData(ImageDataModule):
    """162,770 faces to train on, the 19,867 of the validation split held out. Options: the fields of `CelebAConfig`."""

    def __init__(self, **options: Any) -> None:
        self.config = CelebAConfig(**options)
        super().__init__(self.config, channels=3, image_size=self.config.image_size)

    def load(self) -> tuple[Tensor, Tensor]:
        """Find every file of the partition list and decode it, once.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged.
        """
        config, root = self.config, Path(self.config.root).expanduser()
        folder = root / CelebA.base_folder
        if config.download and not ((folder / PARTITION).is_file() and (folder / PICTURES).is_dir()):
            download("celeba", root, lambda: _fetch(root), f"{FILES} and put both in {folder}")
        how = f"type data.download=true, or {FILES} and put both in {folder}"
        splits = read_partition(folder / PARTITION, how, verify=config.verify)
        names = [name for split in splits for name in split]
        paths = [folder / PICTURES / name for name in names]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(paths)} pictures in {PARTITION} are missing: looked for {missing[0]}; {how}"
            )
        key = listing_key(
            zip(names, paths, strict=True),
            data="celeba",
            splits=[len(split) for split in splits],
            size=config.image_size,
            filter=config.filter,
            crop=config.crop,
        )
        shape = (len(paths), 3, config.image_size, config.image_size)
        images = cached(config.cache, key, shape, in_threads(self._picture, paths))
        train, val = len(splits[0]), len(splits[1])
        return images[:train], images[train : train + val]

    def _picture(self, path: Path) -> np.ndarray:
        picture, _ = decode(path, 3)
        if picture.size != ALIGNED_SIZE:
            raise ValueError(f"{path} is {picture.width}x{picture.height}: aligned CelebA pictures are 178x218")
        left, top = ((edge - self.config.crop) // 2 for edge in ALIGNED_SIZE)
        square = picture.crop((left, top, left + self.config.crop, top + self.config.crop))
        return channels_first(resize(square, self.config.image_size, self.config.filter))


def _fetch(root: Path) -> None:
    import_module("gdown")  # torchvision needs it, and says so only after the first request
    CelebA(str(root), download=True)


def read_partition(path: Path, how: str, *, verify: bool) -> tuple[list[str], list[str], list[str]]:
    """File names of the training, validation and test split, each in the order of the partition list.

    Args:
        path: the partition list.
        how: how to get it, for errors.
        verify: compare the list with its published MD5 sum.

    Raises:
        FileNotFoundError: the list is missing.
        ValueError: it is damaged, or has no training or no validation picture.
    """
    require(path, how, next(md5 for _, md5, name in CelebA.file_list if name == PARTITION) if verify else None)
    splits: tuple[list[str], list[str], list[str]] = ([], [], [])
    for number, line in enumerate(path.read_text("ascii", errors="replace").splitlines(), 1):
        match line.split():
            case [name, ("0" | "1" | "2") as split] if Path(name).name == name:
                splits[int(split)].append(name)
            case [_, *_]:
                raise ValueError(f"{path} is damaged: line {number} is {line!r}, not '000001.jpg 0'; {how}")
    if not splits[0] or not splits[1]:
        raise ValueError(
            f"{path} is damaged: it lists {len(splits[0])} training and {len(splits[1])} validation pictures; {how}"
        )
    return splits
