"""`data=celeba`: the aligned CelebA faces in torchvision's layout, central square, resized."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import CelebA  # type: ignore[import-untyped]

from qdm_lightning.data.cache import cached, in_threads, listing_key
from qdm_lightning.data.image_files import channels_first, decode, resize
from qdm_lightning.data.integrity import require, require_md5
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import CelebAConfig

ALIGNED_SIZE = (178, 218)
"""Width and height of the aligned pictures."""

PARTITION = "list_eval_partition.txt"
PICTURES = "img_align_celeba"
PAGE = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


class CelebAData(ImageDataModule):
    """162,770 faces to train on, the 19,867 of the validation split held out. Options: the fields of `CelebAConfig`."""

    def __init__(self, **options: Any) -> None:
        self.config = CelebAConfig(**options)
        config = self.config
        super().__init__(batch_size=config.batch_size, flip=config.flip, channels=3, image_size=config.image_size)

    def load(self) -> tuple[Tensor, Tensor]:
        """Find every file of the partition list and decode it, once.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged.
        """
        config = self.config
        root = Path(config.root).expanduser()
        folder = root / CelebA.base_folder
        if config.download:
            _download(root)
        splits = read_partition(folder, verify=config.verify)
        names = [name for split in splits for name in split]
        paths = [folder / PICTURES / name for name in names]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(paths)} pictures in {PARTITION} are missing: "
                f"looked for {missing[0]}; {_how_to_get(folder)}"
            )
        settings = {
            "data": "celeba",
            "size": config.image_size,
            "filter": config.filter,
            "crop": config.crop,
            "pillow": PIL.__version__,
        }
        key = listing_key(zip(names, paths, strict=True), splits=[len(split) for split in splits], **settings)
        shape = (len(paths), 3, config.image_size, config.image_size)
        images = cached(Path(config.cache) if config.cache else None, key, shape, lambda: in_threads(self._picture, paths))
        train, val = len(splits[0]), len(splits[1])
        return images[:train], images[train : train + val]

    def _picture(self, path: Path) -> np.ndarray:
        picture = decode(path, 3, str(path))
        if picture.size != ALIGNED_SIZE:
            raise ValueError(f"{path} is {picture.width}x{picture.height}: aligned CelebA pictures are 178x218")
        left, top = ((edge - self.config.crop) // 2 for edge in ALIGNED_SIZE)
        square = picture.crop((left, top, left + self.config.crop, top + self.config.crop))
        return channels_first(resize(square, self.config.image_size, self.config.filter))


def _how_to_get(folder: Path) -> str:
    return f"type data.download=true, or get {PICTURES}.zip (unpacked) and {PARTITION} from {PAGE} and put both in {folder}"


def _download(root: Path) -> None:
    """Let torchvision fetch, check and unpack the files, unless they are there. Raises FileNotFoundError if it cannot."""
    folder = root / CelebA.base_folder
    if (folder / PARTITION).is_file() and (folder / PICTURES).is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import_module("gdown")  # torchvision needs it, and says so only after the first request
        with FileLock(root / "celeba.lock"):
            CelebA(str(root), download=True)
    except (ImportError, OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"CelebA could not be downloaded to {folder} ({error}): "
            f"get {PICTURES}.zip (unpacked) and {PARTITION} from {PAGE} and put both there"
        ) from error


def read_partition(folder: Path, *, verify: bool) -> tuple[list[str], list[str], list[str]]:
    """File names of the training, validation and test split, each in the order of the partition list.

    Args:
        folder: torchvision's `celeba` folder.
        verify: compare the list with its published MD5 sum.

    Raises:
        FileNotFoundError: the list is missing.
        ValueError: it is damaged, or has no training or no validation picture.
    """
    path, how = folder / PARTITION, _how_to_get(folder)
    require(path, how)
    if verify:
        require_md5(path, next(md5 for _, md5, name in CelebA.file_list if name == PARTITION), how)
    splits: tuple[list[str], list[str], list[str]] = ([], [], [])
    for number, line in enumerate(path.read_text("ascii", errors="replace").splitlines(), 1):
        match line.split():
            case [name, ("0" | "1" | "2") as split] if Path(name).name == name:
                splits[int(split)].append(name)
            case []:
                pass
            case _:
                raise ValueError(f"{path} is damaged: line {number} is {line!r}, not '000001.jpg 0'; {how}")
    if not splits[0] or not splits[1]:
        raise ValueError(
            f"{path} is damaged: it lists {len(splits[0])} training and {len(splits[1])} validation pictures; {how}"
        )
    return splits
