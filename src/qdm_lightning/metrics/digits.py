"""`metrics=digits`: a small digits classifier whose 64 features measure how close 8x8 pictures come to real digits.

The weights ship with the package; `experiments/embedded/classifier.py` made them.
"""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FEATURES = 64
WEIGHTS = "digits.safetensors"


class DigitsClassifier(nn.Module):
    """Three convolutions, 64 features, ten classes: 47,530 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.project = nn.Linear(32 * 4 * 4, FEATURES)
        self.classify = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) in [-1, 1] to features (N, 64), before the last activation: nearer to a Gaussian."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.silu(conv(x))
        return self.project(x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) in [-1, 1] to logits (N, 10)."""
        return self.classify(F.relu(self.features(x)))


class DigitsFeatures(nn.Module):
    """The feature network `digits`: uint8 images (N, 1, 8, 8) to float32 features (N, 64), frozen."""

    name = "digits"
    dim = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.classifier = DigitsClassifier()
        with as_file(files("qdm_lightning.metrics") / "assets" / WEIGHTS) as path:
            self.classifier.load_state_dict(load_file(path))
        self.requires_grad_(False).eval()

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 64) and class logits (N, 10), float32, of uint8 `images` (N, 1, 8, 8).

        Raises:
            ValueError: another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (1, 8, 8):
            raise ValueError(
                f"metrics=digits measures uint8 images (N, 1, 8, 8), not {images.dtype} {tuple(images.shape)}: "
                "type data=digits, another network, metrics=inception, or metrics=none to measure no distance"
            )
        features = self.classifier.features(images.float() / 127.5 - 1.0)
        return features, self.classifier.classify(F.relu(features))

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, 64) float32 of uint8 `images` (N, 1, 8, 8). Errors: `features_and_logits`."""
        return self.features_and_logits(images)[0]
