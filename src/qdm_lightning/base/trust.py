"""Which `_target_`s a stored configuration may name: configurations travel with checkpoints, and a `_target_` runs code.

What the user types or keeps in their own `--config-dir` is theirs and free. What comes out of a run folder is plain data, and
may only name, in each place, what this package has for that place, plus what the user trusts by naming it again.
Nothing is imported to find out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any

PACKAGE = __name__.partition(".")[0]

_ACTIVATION = (
    "quantization.quantizer.LSQActivation",
    "quantization.taq.NormalizedActivation",
    "quantization.taq.EMANormalizedActivation",
    "quantization.taq.GroupedActivation",
)

ROLES = {
    "data": (
        "data.digits.DigitsData",
        "data.images.ImagesData",
        "data.hf.HFData",
        "data.cifar10.Cifar10Data",
        "data.celeba.CelebAData",
        "data.imagenet64.ImageNet64Data",
    ),
    "model": ("models.unet.build_unet", "models.diffusers_io.load_unet"),
    "quant.weight_quantizer": ("quantization.quantizer.LSQWeight",),
    "quant.act_quantizer": _ACTIVATION,
    "quant.calibrator": tuple(f"quantization.calibration.{name}" for name in ("MSESearch", "MinMax", "Percentile")),
    "taq": _ACTIVATION,
    "nem.weighting": tuple(f"diffusion.weighting.{name}" for name in ("Uniform", "MinSNR", "Propagation")),
    "metrics": (
        "metrics.digits.DigitsFeatures",
        "metrics.inception.InceptionFeatures",
        "metrics.resnet20.ResNet20Features",
        "metrics.vision_transformers.DINOv2Features",
        "metrics.vision_transformers.CLIPFeatures",
    ),
    "callbacks.profile": ("training.profile.Profile",),
    "logger": tuple(f"loggers.{name}_logger" for name in ("wandb", "tensorboard", "trackio", "mlflow")),
}
"""What a stored configuration may name in each of its nodes, below the package."""

SCHEDULERS = tuple(
    f"diffusers.{name}Scheduler"
    for name in (
        *("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver", "PNDM"),
        *("HeunDiscrete", "EulerDiscrete", "EulerAncestralDiscrete"),
    )
)
"""What it may name as `sampler.scheduler`."""


def targets(plain: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each (`key` of the node, its `_target_`) in a plain configuration of dicts and lists, to any depth."""
    if isinstance(plain, dict):
        if "_target_" in plain:
            yield key, plain["_target_"]
        for name, value in plain.items():
            yield from targets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(plain, list):
        for index, value in enumerate(plain):
            yield from targets(value, f"{key}[{index}]")


def _special(plain: Any, trusted: Collection[str], key: str = "") -> Iterator[str]:
    """Dotted names of Hydra's own settings beside a `_target_`, such as `_args_`; those of a trusted target are left out."""
    if isinstance(plain, dict):
        own = str(plain.get("_target_")) in trusted
        for name, value in plain.items():
            full = f"{key}.{name}" if key else str(name)
            if re.fullmatch(r"_\w*_", str(name)) and name != "_target_" and not own:
                yield full
            yield from _special(value, trusted, full)
    elif isinstance(plain, list):
        for index, value in enumerate(plain):
            yield from _special(value, trusted, f"{key}[{index}]")


def check_targets(
    plain: Any,
    trusted: Collection[str] = (),
    *,
    source: object = "the stored configuration",
    way: str = "type {key}._target_={target} as well, or --config-dir=<the folder that names it>",
) -> None:
    """Refuse a stored configuration that names code which is neither trusted nor what its place is for (`ROLES`).

    Args:
        plain: configuration as dicts and lists, as read from a run folder, a checkpoint or a student's folder.
        trusted: further targets, exactly as they must be named.
        source: where it was read, for the message.
        way: what to do if the target is trusted, for the message.

    Raises:
        ValueError: a `_target_` (None aside) is not allowed; the message says how to trust it.
    """
    for name in _special(plain, trusted):
        raise ValueError(f"the stored configuration has {name}, which no run of ours writes: it would change what is called")
    for key, target in targets(plain):
        ours = [f"{PACKAGE}.{name}" for name in ROLES.get("logger" if key.startswith("logger.") else key, ())]
        ours += SCHEDULERS if key == "sampler.scheduler" else ()
        allowed = target is None or (isinstance(target, str) and (target in trusted or target in ours))
        if not allowed:
            raise ValueError(
                f"{source} would run {target} ({key}._target_), which is not what {PACKAGE} has for {key}: "
                f"if you trust it, {way.format(key=key, target=target)}"
            )


def load_tensors(file: Any) -> Any:
    """What a file of `torch.save`, a path or a stream, holds: tensors and plain data alone, on the CPU.

    Torch's own warnings, which advise to trust the file, are not passed on. Raises what `torch.load` raises at other content.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)
