"""Networks in the format of diffusers: folders (and hub ids) in, folders that `DDPMPipeline.from_pretrained` reads out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError

from qdm_lightning.base.checks import first_line, one_line
from qdm_lightning.base.files import atomic_folder, read_json
from qdm_lightning.diffusion.process import noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
_PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
_CONFIGS = ("model_index.json", "config.json", "unet/config.json", "scheduler_config.json", "scheduler/scheduler_config.json")


def load_unet(path: str | Path) -> UNet2DModel:
    """Load an unconditional noise-estimating U-Net, in eval mode and float32.

    Args:
        path: a diffusers folder (with `unet/`, or the U-Net's own), or a hub id `owner/name`. Weights are safetensors, or a
            `.bin` that holds nothing but tensors.

    Raises:
        FileNotFoundError: nothing there, or no U-Net in it.
        ValueError: not an unconditional `UNet2DModel`, damaged or incomplete files, a learned variance.
    """
    folder = _unet_folder(path)
    _check_config(path, read_json(folder / "config.json"))
    safetensors = any((folder / name).is_file() for name in _WEIGHTS)
    if not safetensors and not (folder / _PICKLED_WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has a config.json but no weights: expected {_WEIGHTS[0]}")
    try:
        unet, info = UNet2DModel.from_pretrained(
            str(folder), use_safetensors=safetensors, low_cpu_mem_usage=False, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as a U-Net: {first_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := info[what]:
            names = ", ".join(map(str, keys[:3]))
            raise ValueError(f"{folder}: weights do not fit config.json: {len(keys)} {what.replace('_', ' ')}: {names}")
    return unet.float().eval()


def load_diffusion(path: str | Path) -> dict[str, Any] | None:
    """The diffusion process that a pretrained network was trained on: fields of `DiffusionConfig`; None if no file says it.

    Args:
        path: as for `load_unet`; the schedule is looked for in `scheduler/`, beside the U-Net and beside its folder.

    Raises:
        FileNotFoundError: nothing there, or no U-Net in it.
        ValueError: a process that is not ours: another prediction than the noise, hand-made or rescaled betas.
    """
    folder = _unet_folder(path)
    places = [folder, folder.parent] if folder.name == "unet" else [folder]
    candidates = (place / subfolder / "scheduler_config.json" for place in places for subfolder in ("", "scheduler"))
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        return None
    config = {**DDPMScheduler().config, **read_json(file)}
    for name, ours in (("prediction_type", "epsilon"), ("trained_betas", None), ("rescale_betas_zero_snr", False)):
        if config[name] != ours:
            raise ValueError(f"{file}: {name}={config[name]} is not supported: it must be {ours}")
    return {field.name: config[field.name] for field in fields(DiffusionConfig)}


def save_pipeline(unet: UNet2DModel, diffusion: DiffusionConfig, folder: str | Path) -> Path:
    """Write a folder that `DDPMPipeline.from_pretrained` and `load_unet` read; it appears whole or not at all.

    Args:
        unet: any device, precision and memory layout; written as it is, in safetensors.
        diffusion: the process that the network was trained on, for the scheduler.
        folder: replaced if it is a pipeline already.

    Returns:
        The folder.

    Raises:
        ValueError: `folder` exists and is not a pipeline.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not (folder / "model_index.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a pipeline: give another folder, or remove it")
    scheduler = noise_scheduler(diffusion, variance_type="fixed_large", clip_sample=True)
    with atomic_folder(folder) as new:
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(new, safe_serialization=True)
    return folder


def _unet_folder(path: str | Path) -> Path:
    """The folder with the U-Net's config.json; a hub id is downloaded."""
    folder = Path(path).expanduser()
    if folder.is_file():
        raise FileNotFoundError(
            f"{path} is a file: give a diffusers folder (python -m qdm_lightning.convert makes one from a DDIM checkpoint)"
        )
    if not folder.exists():
        folder = _download(str(path))
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"{path} holds no U-Net: expected unet/config.json or config.json, as diffusers writes them")


def _download(name: str) -> Path:
    """Fetch configs and weights of a hub id; `.bin` only where there are no safetensors."""
    absent = f"{name} does not exist: give a diffusers folder"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(absent)
    from huggingface_hub import snapshot_download

    weights = [f"{place}{file}" for place in ("", "unet/") for file in ("*.safetensors", _WEIGHTS[1])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_CONFIGS, *weights]))
        if not any(folder.rglob("*.safetensors")):
            snapshot_download(name, allow_patterns=[_PICKLED_WEIGHTS, f"unet/{_PICKLED_WEIGHTS}"])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{absent}, or a hub id that can be reached ({one_line(error)})") from error
    return folder


def _check_config(path: str | Path, config: Mapping[str, Any]) -> None:
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{path} holds a {kind}: only an unconditional UNet2DModel is supported")
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise ValueError(f"{path} is conditioned on classes: only an unconditional UNet2DModel is supported")
    channels, estimated = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != estimated:
        raise ValueError(f"{path} has {channels} channels in and {estimated} out (a learned variance?): they must be equal")
