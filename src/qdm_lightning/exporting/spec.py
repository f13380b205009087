"""Settings of `export`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qdm_lightning.base.checks import one_of
from qdm_lightning.evaluation.spec import RestoreConfig
from qdm_lightning.runtimes.spec import RUNTIMES, SUFFIXES, installed


@dataclass(kw_only=True)
class ExportConfig(RestoreConfig):
    """A network of a run as a file for other runtimes.

    Args:
        format: `onnx`, or `openvino` (an .xml with a .bin beside it).
        out: the file; None takes `<run>/export/<network>.onnx` or `.xml`. An export that lies there is replaced.

    Raises:
        ValueError: an unknown format, a file of another ending, a folder, or a package that is not installed.
    """

    format: str = "onnx"
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("format", self.format, tuple(SUFFIXES))
        suffix = SUFFIXES[self.format]
        if self.out is not None:
            file = Path(self.out).expanduser().absolute()
            if file.is_dir() or any(folder.is_file() for folder in file.parents):
                raise ValueError(
                    f"out={self.out} cannot be written: give the name of a file in a folder, such as out=student{suffix}"
                )
            if file.suffix != suffix:
                raise ValueError(f"out={self.out} is not allowed: with format={self.format} it must end in {suffix}")
        installed("onnx", *(runtime for runtime, kind in RUNTIMES.items() if kind == self.format))
