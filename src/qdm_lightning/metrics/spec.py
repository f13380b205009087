"""Settings of the feature networks behind the distances (config group `metrics`). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(kw_only=True)
class NoMetric:
    """`metrics=none`: no feature network, and no distance."""

    _target_: str | None = None


@dataclass(kw_only=True)
class DigitsMetric:
    """`metrics=digits`: the digits classifier that ships with the package, 1x8x8 images, 64 features; logged as `fd_digits`."""

    _target_: str = "qdm_lightning.metrics.digits.DigitsFeatures"


@dataclass(kw_only=True)
class CustomMetric:
    """`metrics=custom`: the user's own feature network, logged as `fd_<its name>`.

    Args:
        _target_: dotted path of an `nn.Module` that takes no required argument, with attributes `name` (str) and `dim` (int)
            and `forward(uint8 images (N, C, H, W)) -> float features (N, dim)`.

    Raises:
        ValueError: no `_target_`.
    """

    _target_: str | None = None

    def __post_init__(self) -> None:
        if not self._target_:
            raise ValueError("metrics=custom needs a feature network: type metrics._target_=<package.module.Class>")


@dataclass(kw_only=True)
class InceptionMetric:
    """`metrics=inception`: torch-fidelity's Inception v3, 2,048 features; the only network whose distance is logged as `fid`.

    Args:
        weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; None takes (and fetches, if need be) the copy
            in torch's hub folder that torch-fidelity itself uses.

    Raises:
        FileNotFoundError: nothing exists at `weights`.
    """

    _target_: str = "qdm_lightning.metrics.inception.InceptionFeatures"
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            _require_file(self.weights, "torch-fidelity's weights-inception-2015-12-05-6726825d.pth")


@dataclass(kw_only=True)
class ResNet20Metric:
    """`metrics=resnet20`: a CIFAR-10 ResNet-20 (He et al. 2016), 64 features; logged as `fd_resnet20`.

    Args:
        weights: .npz or .safetensors with the network's state dict.

    Raises:
        ValueError: no `weights`.
        FileNotFoundError: nothing exists at `weights`.
    """

    _target_: str = "qdm_lightning.metrics.resnet20.ResNet20Features"
    weights: str | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError(
                "metrics=resnet20 needs trained weights: type metrics.weights=<.npz or .safetensors of a CIFAR-10 ResNet-20>"
            )
        _require_file(self.weights, "an .npz or .safetensors of a CIFAR-10 ResNet-20")


@dataclass(kw_only=True)
class DINOv2Metric:
    """`metrics=dinov2`: DINOv2's class token; logged as `fd_dinov2`.

    Args:
        weights: local folder of transformers' `Dinov2Model` (config.json and model.safetensors).

    Raises:
        ValueError: no `weights`, or transformers is not installed.
        FileNotFoundError: no folder at `weights`.
    """

    _target_: str = "qdm_lightning.metrics.vision_transformers.DINOv2Features"
    weights: str | None = None

    def __post_init__(self) -> None:
        _require_folder("dinov2", self.weights, "Dinov2Model, such as facebook/dinov2-large")


@dataclass(kw_only=True)
class CLIPMetric:
    """`metrics=clip`: CLIP's image embeddings; logged as `fd_clip`, and `cmmd` beside it.

    Args:
        weights: local folder of transformers' `CLIPVisionModelWithProjection`, or of a whole CLIP model.

    Raises:
        ValueError: no `weights`, or transformers is not installed.
        FileNotFoundError: no folder at `weights`.
    """

    _target_: str = "qdm_lightning.metrics.vision_transformers.CLIPFeatures"
    weights: str | None = None

    def __post_init__(self) -> None:
        _require_folder("clip", self.weights, "CLIPVisionModelWithProjection, such as openai/clip-vit-large-patch14-336")


def _require_folder(option: str, weights: str | None, what: str) -> None:
    if not weights:
        raise ValueError(f"metrics={option} needs weights: type metrics.weights=<local folder of transformers' {what}>")
    if not Path(weights).expanduser().is_dir():
        raise FileNotFoundError(f"metrics.weights={weights}: no such folder; it must be that of transformers' {what}")
    if find_spec("transformers") is None:
        raise ValueError(f"metrics={option} needs transformers: pip install 'qdm-lightning[transformers]'")


def _require_file(weights: str, what: str) -> None:
    if not Path(weights).expanduser().is_file():
        raise FileNotFoundError(f"metrics.weights={weights}: no such file; it must be {what}")
