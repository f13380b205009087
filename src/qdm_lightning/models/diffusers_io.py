"""Networks in the format of diffusers: folders (and hub ids) in, folders that `DDPMPipeline.from_pretrained` reads out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError

from qdm_lightning.base.checks import one_line
from qdm_lightning.base.files import atomic_folder, read_json, verify
from qdm_lightning.diffusion.process import noise_scheduler
from qdm_lightning.diffusion.spec import LEARNED, PREDICTIONS, SCHEDULES, DiffusionConfig

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
_PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
LFS, LFS_SIZE = b"version https://git-lfs", 1024
"""How the file begins that Git LFS puts in the place of a large one, and what it is shorter than."""

_INDEX, _SCHEDULER = "model_index.json", "scheduler_config.json"
_CONFIGS = (_INDEX, "config.json", "unet/config.json", _SCHEDULER, f"scheduler/{_SCHEDULER}")

SUPPORTED = (
    "supported are UNet2DModels, class-conditional or not, that estimate the noise of pixels (with a variance or not), or v, "
    "at step t of a DDPM"
)

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
PARTS = ("unet", "scheduler")
AUTOENCODERS = ("vae", "vqvae")
SCHEDULERS = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
)
"""Schedulers of the process of `DiffusionConfig`, whose settings have DDPMScheduler's names and defaults."""

SCHEDULER_SETTINGS: dict[str, tuple[Any, ...]] = {
    "prediction_type": PREDICTIONS,
    "beta_schedule": SCHEDULES,
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "use_flow_sigmas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", LEARNED),
}
UNET_SETTINGS: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "time_embedding_type": ("positional", "learned"),
    "center_input_sample": (False,),
}
"""What a scheduler's and a U-Net's config.json may say, where they say it."""

ESTIMATES = {"fourier": ", so it estimates a score over sigma"}
"""What a network does of which a setting has this value."""


def load_unet(path: str | Path, advice: str = "") -> UNet2DModel:
    """Load a U-Net that estimates the noise, or v, in eval mode and float32.

    Args:
        path: a diffusers folder (with `unet/`, or the U-Net's own), or a hub id `owner/name`. Weights are safetensors, or a
            `.bin` that holds nothing but tensors. Files with a checksum are compared with it.
        advice: what to do about a damaged file, for the error.

    Raises:
        FileNotFoundError: nothing there, or no U-Net in it.
        ValueError: not a `UNet2DModel`, damaged or incomplete files, weights that are not
            finite, or a network of another process, by its own config.json or the pipeline and the scheduler beside it.
    """
    folder = _checked(path, advice)
    safetensors = any((folder / name).exists() for name in _WEIGHTS)
    if not safetensors and not (folder / _PICKLED_WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has a config.json but no weights: expected {_WEIGHTS[0]}{_variants(folder)}")
    for file in (
        [*folder.glob("*.safetensors"), *folder.glob(f"*{_WEIGHTS[1]}")] if safetensors else [folder / _PICKLED_WEIGHTS]
    ):
        verify(file, advice)
        if file.stat().st_size < LFS_SIZE and file.read_bytes().startswith(LFS):
            raise ValueError(f"{file} is a pointer of Git LFS, not the weights: git lfs pull fetches them")
    try:
        unet, info = UNet2DModel.from_pretrained(
            str(folder), use_safetensors=safetensors, low_cpu_mem_usage=False, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as a U-Net: {_without_advice(error)}{advice and f'; {advice}'}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := info[what]:
            names = ", ".join(map(str, keys[:3]))
            raise ValueError(f"{folder}: weights do not fit config.json: {len(keys)} {what.replace('_', ' ')}: {names}")
    for name, value in unet.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{folder}: the weight {name} is not finite: the network has diverged, or its file is damaged")
    return unet.float().eval()


def _variants(folder: Path) -> str:
    """What to do where the weights are there under the name of a variant, such as fp16 or ema."""
    found = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    if not found:
        return ""
    if len(found) == 1:
        return f"; rename {found[0].name} to {_PICKLED_WEIGHTS.partition('.')[0]}{found[0].suffix} if it is what you mean"
    return f"; there are {', '.join(file.name for file in found[:3])}: rename the one that you mean"


def _without_advice(error: Exception) -> str:
    """One line about what diffusers raised. Of a pickle torch says how it could be run: that is left out."""
    text = one_line(error)
    return "its weights are not tensors alone" if "weights_only" in text or "Weights only" in text else text[:300]


def load_diffusion(path: str | Path) -> dict[str, Any] | None:
    """The diffusion process that a pretrained network was trained on: fields of `DiffusionConfig`; None if no file says it.

    Args:
        path: as for `load_unet`; the schedule is looked for beside the U-Net, in its folder's `scheduler/` and in that of the
            pipeline around it, where the U-Net is one of diffusers' training (`unet_ema`, `checkpoint-500/unet`) too.

    Raises:
        FileNotFoundError: nothing there, or no U-Net in it.
        ValueError: a process that is not ours: another scheduler, another prediction than the noise or v, hand-made or rescaled
            betas, a network on latents.
    """
    return read_diffusion(_checked(path))


def read_diffusion(folder: Path) -> dict[str, Any] | None:
    """As `load_diffusion`, of the folder of a U-Net that is not looked at: a quantized one too."""
    found = _scheduler(folder)
    if found is None:
        return None
    file, config = found
    values = {field.name: config[field.name] for field in fields(DiffusionConfig) if field.name in config}
    values["variance_type"] = LEARNED if _estimates_variance(read_json(folder / "config.json")) else "fixed"
    try:
        DiffusionConfig(**values)
    except ValueError as error:
        what = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ValueError(f"{file} is of another process: {what}; {SUPPORTED}") from error
    return values


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
    with atomic_folder(folder) as new:
        DDPMPipeline(unet=unet, scheduler=pipeline_scheduler(diffusion)).save_pretrained(new, safe_serialization=True)
    return folder


def pipeline_scheduler(diffusion: DiffusionConfig) -> DDPMScheduler:
    """The scheduler with which a pipeline of ours samples."""
    estimated = {"prediction_type": diffusion.prediction_type}
    variance = LEARNED if diffusion.variance_type == LEARNED else "fixed_large"
    return noise_scheduler(diffusion, variance_type=variance, clip_sample=True, **estimated)


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


def _checked(path: str | Path, advice: str = "") -> Path:
    """The U-Net's folder. Raises FileNotFoundError where there is none, and ValueError where it is of another process.

    All that says what the network estimates is looked at before anything is told, so that no advice leads past a refusal.
    """
    folder = _unet_folder(path)
    _check_unet(folder / "config.json", advice)
    _check_pipeline(folder)
    found = _scheduler(folder)
    learned = _estimates_variance(read_json(folder / "config.json", advice))
    if found is not None and found[1].get("variance_type") == LEARNED and not learned:
        raise ValueError(
            f"{found[0]} is of another process: variance_type={LEARNED}, which the U-Net does not estimate; {SUPPORTED}"
        )
    return folder


def _estimates_variance(unet: Mapping[str, Any]) -> bool:
    """Whether a U-Net's config.json has the channels of a learned variance."""
    return bool(unet.get("out_channels", 3) == 2 * unet.get("in_channels", 3))


def _places(folder: Path) -> list[Path]:
    """The U-Net's folder, and those around it that belong to its pipeline."""
    if not re.fullmatch(r"unet(_ema)?", folder.name):
        return [folder]
    around = folder.absolute().parent
    return [folder, around, *([around.parent] if re.fullmatch(r"checkpoint-\d+", around.name) else [])]


def _scheduler(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """File and settings of the scheduler of a U-Net's folder; None where there is none.

    Raises:
        ValueError: it is of another process.
    """
    candidates = (place / subfolder / _SCHEDULER for place in _places(folder) for subfolder in ("", "scheduler"))
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        return None
    given = read_json(file)
    if given.get("_class_name") not in SCHEDULERS:
        raise ValueError(f"{file} is of another process: _class_name={given.get('_class_name')}; {SUPPORTED}")
    _check_settings(file, given, SCHEDULER_SETTINGS, "is of another process")
    return file, {**DDPMScheduler().config, **given}


def _check_pipeline(folder: Path) -> None:
    """Raise ValueError where the pipeline around a U-Net's folder makes its images from what the U-Net estimates otherwise."""
    for place in _places(folder):
        coders = [name for name in AUTOENCODERS if (place / name).is_dir()]
        index = read_json(place / _INDEX) if (place / _INDEX).is_file() else {}
        parts = [name for name, kind in index.items() if not name.startswith("_") and kind and kind != [None, None]]
        foreign = [name for name in parts if isinstance(index[name], list) and name not in PARTS]
        latent = [name for name in AUTOENCODERS if name in coders or name in foreign]
        if latent:
            raise ValueError(f"{place} has a {latent[0]}, so its U-Net works on latents: {SUPPORTED}")
        if index and (foreign or index.get("_class_name") not in PIPELINES):
            what = f"{index.get('_class_name')} of {', '.join(parts)}"
            raise ValueError(f"{place / _INDEX} is of another process: {what}; {SUPPORTED}")


def _check_unet(file: Path, advice: str = "") -> None:
    """Raise ValueError where a U-Net's config.json is of a network that estimates something else."""
    config = read_json(file, advice)
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{file} is of a {kind}: {SUPPORTED}")
    if "quantization_config" in config:
        raise ValueError(f"{file} is of a quantized network: give one at full precision, such as the teacher folder of its run")
    _check_settings(file, config, UNET_SETTINGS, "is of a network of another kind")
    channels, estimated = config.get("in_channels", 3), config.get("out_channels", 3)
    if estimated not in (channels, 2 * channels):
        what = f"{channels} channels in and {estimated} out"
        raise ValueError(f"{file} is of a network of another kind: {what}; {SUPPORTED}")


def _check_settings(file: Path, config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], what: str) -> None:
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            value = one_line(config[name])[:60]
            raise ValueError(f"{file} {what}: {name}={value}{ESTIMATES.get(value, '')}; {SUPPORTED}")
