"""A student's two files as such: config.json with its quantization, and weights at their bits that say whose they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.files import reading, write_json, write_whole
from qdm_lightning.quantization.packing import packed_state
from qdm_lightning.quantization.spec import EXECUTIONS
from qdm_lightning.training.network_settings import KEY, METHOD, quantization_config, unet_config

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
"""Names of the files in the U-Net's folder, as diffusers has them."""


def student_config(student: nn.Module, settings: Mapping[str, Any], execution: str = EXECUTIONS[0]) -> dict[str, Any]:
    """config.json of a student: that of the `UNet2DModel`, and its `quantization_config`.

    Args:
        student: the prepared U-Net.
        settings: of the network, from `network_settings`.
        execution: how it is to run where it is loaded, one of `EXECUTIONS`; what is usual is not written.
    """
    own = {k: v for k, v in unet_config(student).items() if k not in ("_name_or_path", "quantization_config")}
    described = {"quant_method": METHOD, **quantization_config(settings)}
    described |= {"execution": execution} if execution != EXECUTIONS[0] else {}
    return {**own, "dropout": 0.0, "quantization_config": described}


def write_student_files(student: nn.Module, settings: Mapping[str, Any], folder: Path) -> None:
    """Write both files.

    Args:
        student: the prepared U-Net, any device and memory layout.
        settings: of the network, from `network_settings`.
        folder: of the U-Net.
    """
    write_json(folder / CONFIG, student_config(student, settings))
    metadata = {"format": "pt", KEY: json.dumps(settings)}
    write_whole(folder / WEIGHTS, in_order(save(packed_state(student), metadata)))


def in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them in another one each time."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[begin:]


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, on the CPU. Raises ValueError where the file is damaged."""
    with reading(path) as stream:
        return load(stream.read())


def weights_settings(path: Path) -> dict[str, Any] | None:
    """The network's settings in the metadata of a safetensors file (see `network_settings`); None where it has none."""
    with reading(path), safe_open(path, "pt") as weights:
        text = (weights.metadata() or {}).get(KEY)
        return None if text is None else dict(json.loads(text))


def own_settings(path: Path) -> dict[str, Any]:
    """As `weights_settings`. Raises UserError where there are none: no version whose weights are packed left them out."""
    settings = weights_settings(path)
    if settings is None:
        raise UserError(f"{path} does not say of which bits, TaQ and schedule its weights are: they were written by others")
    return settings
