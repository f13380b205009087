"""`data=hf`: a data set as the library `datasets` reads it. It finds the files; the pictures are decoded as `data=images` does.

No code of a data set is run: `datasets` reads files of known formats alone (from its version 4 on).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from qdm_lightning.base.checks import one_line
from qdm_lightning.data.cache import content_key
from qdm_lightning.data.image_files import decode
from qdm_lightning.data.images import load_pictures
from qdm_lightning.data.module import ImageDataModule
from qdm_lightning.data.spec import HFConfig

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files by which `save_to_disk` marks the folder of a data set, or of several splits."""


class HFData(ImageDataModule):
    """Pictures of a data set, split by a fixed permutation. Options: the fields of `HFConfig`."""

    def __init__(self, **options: Any) -> None:
        self.config = HFConfig(**options)
        super().__init__(self.config, channels=self.config.channels, image_size=self.config.image_size)

    def load(self) -> tuple[Tensor, Tensor]:
        """Decode everything.

        Raises:
            FileNotFoundError: there is no such data set, or it cannot be fetched.
            ValueError: no such split or column, several columns to choose from, or a damaged or unfit picture.
        """
        config = self.config
        pictures = Pictures(config)

        def read(index: int) -> tuple[Image.Image, int]:
            return decode(pictures.name(index), config.channels, pictures.content(index))

        def key(order: list[int], **settings: object) -> str:
            return content_key(map(pictures.content, order), data="hf", **settings)

        return load_pictures(config, len(pictures), read, pictures.name, key)


class Pictures:
    """The column of pictures of a data set, as files that are not decoded. Raises what `HFData.load` raises."""

    def __init__(self, config: HFConfig) -> None:
        import datasets

        self.path = str(config.path)
        table = _table(config)
        self.column = _column(table.features, config.column, self.path)
        self.rows = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """What an error calls a picture."""
        return f"{self.path}[{index}].{self.column}"

    def content(self, index: int) -> bytes:
        """Bytes of a picture's file. Raises ValueError where there is none, or it lies outside the data set."""
        value = self.rows[index][self.column] or {}
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        if value.get("path") is None:
            raise ValueError(f"{self.name(index)} is empty: take that row out")
        file = Path(value["path"])
        if not any(file.resolve().is_relative_to(root) for root in self._roots()):
            raise ValueError(f"{self.name(index)} names {file}, which is no file of this data set")
        return file.read_bytes()

    def _roots(self) -> list[Path]:
        """Folders that may hold files of the data set: its own, or where the libraries keep what they fetch."""
        own = Path(self.path).expanduser()
        if own.exists():
            return [own.resolve() if own.is_dir() else own.resolve().parent]
        from datasets.config import HF_DATASETS_CACHE
        from huggingface_hub.constants import HF_HUB_CACHE

        return [Path(HF_DATASETS_CACHE).resolve(), Path(HF_HUB_CACHE).resolve()]


def _table(config: HFConfig) -> Any:
    """The split that the settings name. Raises FileNotFoundError, ValueError as `HFData.load`."""
    import datasets

    given = f"data.path={config.path}"
    path = Path(str(config.path)).expanduser()
    datasets.disable_progress_bars()
    try:
        if (path / SAVED).is_file():
            return datasets.load_from_disk(str(path))
        if (path / SAVED_SPLITS).is_file():
            splits = datasets.load_from_disk(str(path))
            if config.split not in splits:
                raise ValueError(f"there is no split {config.split}: type data.split={' or '.join(splits)}")
            return splits[config.split]
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={config.split: str(path)}, split=config.split)
        return datasets.load_dataset(str(path) if path.is_dir() else config.path, config.name, split=config.split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{given} cannot be had: {one_line(error)[:300]}") from error
    except Exception as error:  # of a library with many formats
        raise ValueError(f"{given} cannot be read: {one_line(error)[:300]}") from error


def _column(features: Any, asked: str | None, path: str) -> str:
    """Name of the column of pictures. Raises ValueError where it is not there, or none or several are."""
    import datasets

    def holds_pictures(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {*feature} == {"bytes", "path"})

    found = [name for name, feature in features.items() if holds_pictures(feature)]
    may_hold = [name for name, feature in features.items() if getattr(feature, "dtype", None) in ("binary", "large_binary")]
    if asked is not None:
        if asked not in [*found, *may_hold]:
            what = f"holds {features[asked]}, no pictures" if asked in features else "is not there"
            raise ValueError(f"data.column={asked} {what}: data.path={path} has pictures in {', '.join(found) or 'no column'}")
        return asked
    if len(found) != 1:
        names = ", ".join(found or features)
        raise ValueError(
            f"data.path={path} has {len(found) or 'no'} columns of pictures ({names}): type data.column=<the one to train on>"
        )
    return found[0]
