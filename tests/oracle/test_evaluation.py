"""A whole evaluation against torch-fidelity's own command on folders of the same pictures, and against Gaussians by hand."""

import multiprocessing

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from qdm_lightning.data.digits import load_digits
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.metrics.digits import DigitsFeatures
from qdm_lightning.metrics.moments import Moments
from qdm_lightning.metrics.protocol import PROTOCOL
from qdm_lightning.sample import sample

COUNT = 1000
SETTINGS = ["sampler.batch_size=100"]


class Extractor(FeatureExtractorBase):
    """Our digits network as torch-fidelity wants one: pictures from files come with three equal channels."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.network = DigitsFeatures()

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        both = dict(zip(("features", "logits"), self.network.features_and_logits(images[:, :1]), strict=True))
        return tuple(both[name] for name in self.features_list)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("oracle")


@pytest.fixture(scope="module")
def pictures(tiny_run, root):
    """The student's pictures, as the command writes them."""
    folder = root / "pictures"
    sample(tiny_run, [*SETTINGS, f"seeds=0-{COUNT - 1}", f"out={folder}"], Progress("silent"))
    (folder / "grid.png").unlink()
    for file in list(folder.glob("*.png")):  # torch-fidelity sorts names, and its Inception Score depends on the order
        file.rename(folder / f"{int(file.stem):05d}.png")
    return folder


def test_every_score_is_torch_fidelitys(pictures, tiny_run, root, monkeypatch):
    monkeypatch.setitem(PROTOCOL, "kid_subsets", 10)
    real = root / "real"
    real.mkdir()
    for index, image in enumerate(load_digits()[0]):
        Image.fromarray(image[0].numpy()).save(real / f"{index:05d}.png")
    torch_fidelity.register_feature_extractor("digits-of-evaluation", Extractor)
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 0)  # its loader then starts no processes
    theirs = torch_fidelity.calculate_metrics(
        input1=str(pictures),
        input2=str(real),
        feature_extractor="digits-of-evaluation",
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        cuda=False,
        kid_subsets=10,
        batch_size=250,
        cache=False,
        verbose=False,
    )
    record = evaluate(tiny_run, [*SETTINGS, f"num_samples={COUNT}", f"out={root / 'ours'}"], Progress("silent")).record
    assert record["left_out"] == {}
    expected = {
        "fd_digits": theirs["frechet_inception_distance"],
        "score_digits": theirs["inception_score_mean"],
        "score_digits_std": theirs["inception_score_std"],
        "kd_digits": theirs["kernel_inception_distance_mean"],
        "kd_digits_std": theirs["kernel_inception_distance_std"],
        "precision_digits": theirs["precision"],
        "recall_digits": theirs["recall"],
    }
    assert {name: record["scores"][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert record["scores"]["fd_digits"] > 10


class Brightness(torch.nn.Module):
    """Three features whose moments can be written down: means of thirds of the image, in [0, 1]."""

    name = "brightness"
    dim = 3

    def forward(self, images):
        return torch.stack([part.float().mean((1, 2, 3)) / 255 for part in images.tensor_split(3, dim=2)], dim=1)


def test_gaussians_by_hand(pictures, tiny_run, root):
    """The reference is the images' own Gaussian, moved by d and stretched by c: the distance is |d|^2 + (c - 1)^2 tr S."""
    images = torch.stack([torch.from_numpy(np.array(Image.open(f)))[None] for f in sorted(pictures.glob("*.png"))])
    own = Moments.of(Brightness()(images))
    move = np.array([0.1, -0.2, 0.05])
    for stretch in (1.0, 2.5):
        reference = root / f"reference{stretch}.npz"
        np.savez(reference, mu=own.mu + move, sigma=stretch**2 * own.sigma)
        overrides = ["metrics=custom", f"metrics._target_={__name__}.Brightness", f"reference={reference}", "scores=fd"]
        out = f"out={root / f'gaussian{stretch}'}"
        record = evaluate(tiny_run, [*SETTINGS, *overrides, f"num_samples={COUNT}", out], Progress("silent")).record
        expected = (move**2).sum() + (stretch - 1) ** 2 * np.trace(own.sigma)
        assert record["scores"] == {"fd_brightness": pytest.approx(expected, rel=1e-9)}
