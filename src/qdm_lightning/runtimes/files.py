"""Exported files: what they say about themselves, checked before any of it is used. They are data: reading one runs no code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdm_lightning.base.checks import first_line
from qdm_lightning.base.files import file_hash, sha256
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.runtimes.spec import SUFFIXES, installed

FORMAT = 1
"""Raised when a file of an older version could no longer be read as it was meant."""

FIELD = "qdm_lightning"
"""Under this name the metadata stands as JSON: `metadata_props` of ONNX, `rt_info` of OpenVINO."""


@dataclass(frozen=True)
class ExportedFile:
    """A checked file.

    Attributes:
        path: of the .onnx or .xml.
        sha256: of its content, for OpenVINO of the .xml and the .bin.
        metadata: what `exporting.export` wrote.
        model: the graph, an `onnx.ModelProto` or an `openvino.Model`.
    """

    path: Path
    sha256: str
    metadata: dict[str, Any]
    model: Any

    @property
    def diffusion(self) -> DiffusionConfig:
        """The process that the network was trained on."""
        return DiffusionConfig(**self.metadata["diffusion"])

    @property
    def sampler(self) -> SamplerConfig:
        """The run's own sampler."""
        return SamplerConfig(**self.metadata["sampler"])


def read_exported(path: str | Path) -> ExportedFile:
    """Read and check a file that `python -m qdm_lightning.export` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, damaged, of another format, or one that would read other files; the package that
            reads it is not installed.
    """
    file = Path(path).expanduser().resolve()
    kind = next((kind for kind, suffix in SUFFIXES.items() if file.suffix == suffix), None)
    if kind is None:
        raise ValueError(f"file={path} is no exported file: give one that ends in {' or '.join(SUFFIXES.values())}")
    if not file.is_file():
        raise FileNotFoundError(
            f"file={path}: no such file; python -m qdm_lightning.export run=DIR format={kind} makes one of a run"
        )
    installed(kind)
    try:
        model, text = _read_onnx(file) if kind == "onnx" else _read_openvino(file)
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no JSON object")
    except Exception as error:  # protobuf, OpenVINO and json each raise their own
        raise ValueError(f"file={path} cannot be read as an exported student: {first_line(error)}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"file={path} has format {metadata.get('format')}, this version reads {FORMAT}: export the run again")
    digest = file_hash(file)
    if kind == "openvino":
        weights = file_hash(file.with_suffix(".bin"))
        if weights != metadata.get("weights_sha256"):
            raise ValueError(f"file={path}: {file.stem}.bin beside it is not the one that it was written with: export it again")
        digest = sha256([digest, weights])
    try:
        found = ExportedFile(file, digest, metadata, model)
        if len(metadata["shape"]) != 3 or not all(type(size) is int and size > 0 for size in metadata["shape"]):
            raise ValueError(f"shape={metadata['shape']} is not [C, H, W]")
        _ = (found.diffusion, found.sampler, metadata["network"], metadata["origin"]["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"file={path}: its metadata is damaged: {first_line(error)}") from error
    return found


def _read_onnx(file: Path) -> tuple[Any, str]:
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data):
            raise ValueError(f"the tensor {tensor.name} lies in another file, which is never read")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if FIELD not in properties:
        raise ValueError("python -m qdm_lightning.export did not write it")
    return model, properties[FIELD]


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor below a protobuf message: initializers, attributes, subgraphs, functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                yield from _tensors(part)


def _read_openvino(file: Path) -> tuple[Any, str]:
    import openvino

    if not file.with_suffix(".bin").is_file():
        raise ValueError(f"{file.stem}.bin is not beside it")
    model = openvino.Core().read_model(str(file))
    if not model.has_rt_info(FIELD):
        raise ValueError("python -m qdm_lightning.export did not write it")
    return model, str(model.get_rt_info(FIELD).value)
