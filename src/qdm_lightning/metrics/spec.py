"""Settings of the feature networks behind the distances (config group `metrics`). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


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
