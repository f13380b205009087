"""Exported files, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdm_lightning.base.files import atomic_path, file_hash, write_whole
from qdm_lightning.runtimes.files import FIELD


def write_onnx(path: Path, model: Any) -> None:
    """Write an ONNX model that carries its metadata, whole or not at all."""
    write_whole(path, model.SerializeToString())


def write_openvino(path: Path, model: Any, metadata: Mapping[str, Any]) -> None:
    """Write an ONNX model as OpenVINO's .xml and .bin; what a crash leaves between the two is known by the checksum."""
    import openvino

    converted = openvino.Core().read_model(model.SerializeToString())
    weights = path.with_suffix(".bin")
    with atomic_path(weights) as new_weights, atomic_path(path) as new_graph:
        scratch = new_graph.with_suffix(".xml"), new_weights.with_suffix(".bin")
        for digest in ("", "known"):  # the checksum of the weights stands in the graph
            text = {**metadata, "weights_sha256": file_hash(new_weights) if digest else ""}
            converted.set_rt_info(json.dumps(text), FIELD)
            openvino.serialize(converted, *map(str, scratch))
            scratch[0].replace(new_graph)
            scratch[1].replace(new_weights)
