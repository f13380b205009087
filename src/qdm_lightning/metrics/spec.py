"""Settings of the feature networks behind the distances (config group `metrics`). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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


def _require_file(weights: str, what: str) -> None:
    if not Path(weights).expanduser().is_file():
        raise FileNotFoundError(f"metrics.weights={weights}: no such file; it must be {what}")
