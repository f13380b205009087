"""`metrics=inception`: torch-fidelity's port of the Inception v3 that FID is defined by. Its resizing is TensorFlow 1's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from qdm_lightning.base.checks import first_line
from qdm_lightning.base.files import file_hash, reading
from qdm_lightning.base.trust import load_tensors
from qdm_lightning.metrics.frechet import PUBLISHED
from qdm_lightning.metrics.spec import InceptionMetric
from qdm_lightning.metrics.weights import color

WEIGHTS = URL_INCEPTION_V3.rpartition("/")[2]


class InceptionFeatures(nn.Module):
    """The feature network `inception`: uint8 images (N, 1 | 3, H, W) to the 2,048 pooled features and 1,008 logits, frozen.

    Attributes:
        name: `inception` over the published weights, whose distance is FID; over others `inception_<8 digits of their hash>`.
        weights_sha256: SHA-256 (hexadecimal) of the weights file.

    Args:
        weights: see `InceptionMetric`.

    Raises:
        FileNotFoundError: no file at `weights`, or none given and none to be had from the network.
        ValueError: the file is damaged or holds other weights.
    """

    dim = 2048
    resize = "299x299, TensorFlow 1's bilinear"
    batch_size = 32  # 299x299 pixels inside, whatever the size outside

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        given = InceptionMetric(weights=weights).weights
        path = Path(given).expanduser() if given else _published()
        _check(path)
        try:
            self.extractor = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            raise ValueError(
                f"metrics.weights={path} does not hold Inception v3 as torch-fidelity has it: {first_line(error)}"
            ) from error
        self.weights_sha256 = file_hash(path)
        self.name = "inception" if self.weights_sha256.startswith(PUBLISHED) else f"inception_{self.weights_sha256[:8]}"
        self.requires_grad_(False).eval()

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (N, 2048) and logits without bias (N, 1008), float32, of uint8 `images` (N, 1 | 3, H, W)."""
        features, logits = self.extractor(color(images, "metrics=inception"))
        return features, logits

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (N, 2048) float32 of uint8 `images` (N, 1 | 3, H, W). Raises ValueError for other ones."""
        return self.features_and_logits(images)[0]


def _published() -> Path:
    """The file that torch-fidelity itself would use, fetched and checked if it is not there. Raises FileNotFoundError."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=PUBLISHED, progress=False)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"metrics=inception needs {WEIGHTS}, which is not in {path.parent} and could not be fetched ({first_line(error)}): "
            f"get {URL_INCEPTION_V3} and type metrics.weights=<that file>"
        ) from error
    return path


def _check(path: Path) -> None:
    """Raise ValueError unless the file is a plain state dict: torch-fidelity itself would run code that a file brings along."""
    with reading(path, f"fetch {URL_INCEPTION_V3} and type metrics.weights=<that file>") as stream:
        state = load_tensors(stream)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds no state dict")
