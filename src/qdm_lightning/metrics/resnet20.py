"""`metrics=resnet20`: CIFAR-10 ResNet-20 (He et al. 2016, arXiv 1512.03385, section 4.2) as a quick feature network."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.base.checks import one_line
from qdm_lightning.base.files import file_hash
from qdm_lightning.metrics.spec import ResNet20Metric
from qdm_lightning.metrics.weights import color, read_state

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of the RGB channels in [0, 1]: the weights were trained on inputs normalized by these."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A): every second pixel, new channels zero."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + shortcut)


class ResNet20(nn.Module):
    """Three stages of three blocks (16, 32, 64 channels), global mean, ten classes: 269,722 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), *(BasicBlock(32, 32, 1) for _ in range(2)))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), *(BasicBlock(64, 64, 1) for _ in range(2)))
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Normalized images (N, 3, 32, 32) to pooled features (N, 64)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (N, 3, 32, 32) to logits (N, 10)."""
        return self.linear(self.features(x))


class ResNet20Features(nn.Module):
    """The feature network `resnet20`: uint8 images (N, 1 | 3, H, W) to 64 pooled features and 10 logits, frozen.

    Images of another size are resampled to 32x32, as `resize` says; gray ones get three equal channels.

    Attributes:
        weights_sha256: SHA-256 (hexadecimal) of the weights file.

    Args:
        weights: see `ResNet20Metric`.

    Raises:
        ValueError: no `weights`, or a file that is damaged or does not fit.
        FileNotFoundError: no file at `weights`.
    """

    name = "resnet20"
    dim = 64
    resize = "32x32, bilinear, antialiased where it shrinks"

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        path = Path(str(ResNet20Metric(weights=weights).weights)).expanduser()
        self.network = ResNet20()
        self._fill(path)
        self.weights_sha256 = file_hash(path)
        self.requires_grad_(False).eval()

    def _fill(self, path: Path) -> None:
        state = read_state(path)
        counters = {name: n for name, n in self.network.state_dict().items() if name.endswith("num_batches_tracked")}
        try:
            self.network.load_state_dict({**counters, **state})  # plain arrays often leave the counters out
        except RuntimeError as error:
            raise ValueError(f"metrics.weights={path} is no CIFAR-10 ResNet-20: {one_line(error):.300}") from error

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (N, 64) and logits (N, 10), float32, of uint8 `images` (N, 1 | 3, H, W)."""
        x = color(images, "metrics=resnet20").float() / 255
        if x.shape[-2:] != (32, 32):
            x = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (x.new_tensor(rgb).view(1, 3, 1, 1) for rgb in (MEAN, STD))
        features = self.network.features((x - mean) / std)
        return features, self.network.linear(features)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (N, 64) float32 of uint8 `images` (N, 1 | 3, H, W). Raises ValueError for another shape or dtype."""
        return self.features_and_logits(images)[0]
