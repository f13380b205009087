"""Exported files, whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdm_lightning.base.files import file_hash, write_whole
from qdm_lightning.runtimes.files import FIELD


def write_onnx(path: Path, model: Any) -> None:
    """Write an ONNX model that carries its metadata, whole or not at all."""
    write_whole(path, model.SerializeToString())


def write_openvino(path: Path, model: Any, metadata: Mapping[str, Any]) -> None:
    """Write an ONNX model as OpenVINO's .xml and .bin, each whole; a checksum tells of a crash between the two."""
    import openvino

    converted = openvino.Core().read_model(model.SerializeToString())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        graph, weights = (Path(folder, path.with_suffix(suffix).name) for suffix in (".xml", ".bin"))
        for digest in (
            lambda: "",
            lambda: file_hash(weights),
        ):  # the second graph holds the checksum of the first one's weights
            converted.set_rt_info(json.dumps({**metadata, "weights_sha256": digest()}), FIELD)
            openvino.serialize(converted, str(graph), str(weights))
        for file in (weights, graph):
            write_whole(path.with_name(file.name), file.read_bytes())
