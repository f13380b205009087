"""`metrics=dinov2` and `metrics=clip`: vision transformers from a local folder of weights, as `transformers` saves it.

Nothing is fetched. Weights are safetensors; a folder that brings code is not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdm_lightning.base.checks import one_line
from qdm_lightning.base.files import file_hash, read_json, sha256
from qdm_lightning.metrics.spec import CLIPMetric, DINOv2Metric
from qdm_lightning.metrics.weights import color

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue in [0, 1], with which the networks were trained."""


class _Features(nn.Module):
    """What both have in common: uint8 images (N, 1 | 3, H, W) in, resampled and normalized; frozen.

    Attributes:
        dim: width of the features.
        resize: how images are resampled.
        weights_sha256: SHA-256 (hexadecimal) over the weights files.
    """

    name: str
    batch_size = 32  # images of 224 pixels and more inside, whatever the size outside

    def __init__(self, network: nn.Module, folder: Path, edge: int, dim: int, normalization: Any) -> None:
        super().__init__()
        self.network, self.edge, self.dim = network, edge, dim
        self.mean_std = normalization
        self.resize = f"{edge}x{edge}, bicubic, antialiased where it shrinks"
        self.weights_sha256 = sha256(file_hash(file) for file in sorted(folder.glob("*.safetensors")))
        self.requires_grad_(False).eval()

    def prepared(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, edge, edge) float32. Raises ValueError for another shape or dtype."""
        x = color(images, f"metrics={self.name}").float() / 255
        if x.shape[-2:] != (self.edge, self.edge):
            x = F.interpolate(x, (self.edge, self.edge), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        mean, std = (x.new_tensor(rgb).view(1, 3, 1, 1) for rgb in self.mean_std)
        return (x - mean) / std


class DINOv2Features(_Features):
    """The feature network `dinov2`: the class token after the last norm, at 224 pixels (Stein et al. 2023, arXiv 2306.04675).

    Args:
        weights: see `DINOv2Metric`.

    Raises:
        ValueError: no `weights`, a folder of another network, or damaged weights.
        FileNotFoundError: no folder at `weights`.
    """

    name = "dinov2"

    def __init__(self, weights: str | None = None) -> None:
        from transformers import Dinov2Model

        folder = Path(str(DINOv2Metric(weights=weights).weights)).expanduser()
        network = _loaded(Dinov2Model, folder, "dinov2")
        super().__init__(network, folder, 224, int(network.config.hidden_size), IMAGENET)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, dim) float32 of uint8 `images` (N, 1 | 3, H, W)."""
        features: Tensor = self.network(pixel_values=self.prepared(images)).pooler_output
        return features


class CLIPFeatures(_Features):
    """The feature network `clip`: projected image embeddings, at the size that the network takes.

    CMMD is defined over them with unit length (Jayasumana et al. 2024, arXiv 2401.09603, with ViT-L/14 at 336 pixels).

    Args:
        weights: see `CLIPMetric`.

    Raises:
        ValueError: no `weights`, a folder of another network, or damaged weights.
        FileNotFoundError: no folder at `weights`.
    """

    name = "clip"

    def __init__(self, weights: str | None = None) -> None:
        from transformers import CLIPVisionModelWithProjection

        folder = Path(str(CLIPMetric(weights=weights).weights)).expanduser()
        network = _loaded(CLIPVisionModelWithProjection, folder, "clip")
        super().__init__(network, folder, int(network.config.image_size), int(network.config.projection_dim), CLIP)

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, dim) float32 of uint8 `images` (N, 1 | 3, H, W)."""
        features: Tensor = self.network(pixel_values=self.prepared(images)).image_embeds
        return features


def _loaded(kind: Any, folder: Path, name: str) -> Any:
    """A network of `transformers` from its folder, float32. Raises ValueError where it is another or damaged."""
    given, config = f"metrics.weights={folder}", folder / "config.json"
    found = read_json(config).get("model_type") if config.is_file() else None
    if not str(found).startswith(name):
        raise ValueError(
            f"{given} holds {found or 'no config.json'}, not {name}: give a folder of transformers' {kind.__name__}"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{given} holds no .safetensors: other weights can run code and are not read")
    try:
        network, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # of a library with many formats
        raise ValueError(f"{given} cannot be read: {one_line(error)[:300]}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{given} has no weights for {missing[0]}: it is of another network, or damaged")
    return network
