"""Every score against torch-fidelity's own command on folders of the same pictures, and the distance against three others."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import qdm_lightning
from qdm_lightning.metrics.digits import DigitsFeatures
from qdm_lightning.metrics.frechet import feature_batches, frechet_distance
from qdm_lightning.metrics.moments import Moments, frechet
from qdm_lightning.metrics.protocol import PROTOCOL, inception_score, kernel_distance, precision_recall

DIGITS = Path(qdm_lightning.__file__).parent / "data" / "assets" / "digits.npz"


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
def sets():
    """1,100 generated (noised) and 1,200 real digits, uint8 (N, 1, 8, 8)."""
    with np.load(DIGITS) as archive:
        digits = torch.from_numpy(archive["images"])[:, None]
    noise = 30 * torch.randn(digits[:1100].shape, generator=torch.Generator().manual_seed(0))
    return (digits[:1100] + noise).round().clamp(0, 255).to(torch.uint8), digits[500:1700]


@pytest.fixture
def theirs(sets, tmp_path_factory, monkeypatch):
    folders = []
    for images in sets:
        folders.append(tmp_path_factory.mktemp("pictures"))
        for index, image in enumerate(images):
            Image.fromarray(image[0].numpy()).save(folders[-1] / f"{index:05d}.png")
    torch_fidelity.register_feature_extractor("digits-of-the-tests", Extractor)
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 0)  # its loader then starts no processes
    return torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor="digits-of-the-tests",
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        cuda=False,
        kid_subsets=10,
        batch_size=100,
        cache=False,
        verbose=False,
    )


def test_all_scores_are_torch_fidelitys(sets, theirs, monkeypatch):
    monkeypatch.setitem(PROTOCOL, "kid_subsets", 10)
    batches = [list(feature_batches(DigitsFeatures(), images, 100, logits=True)) for images in sets]
    (generated, logits), (real, _) = (tuple(map(torch.cat, zip(*pairs, strict=True))) for pairs in batches)
    close = {"rel": 1e-6}
    fid = theirs["frechet_inception_distance"]
    assert frechet(Moments.of(generated), Moments.of(real)) == pytest.approx(fid, **close)
    assert frechet_distance(generated, real) == pytest.approx(fid, **close)
    isc = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(logits) == pytest.approx(isc, **close)
    kid = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert kernel_distance(generated, real) == pytest.approx(kid, **close)
    assert precision_recall(generated, real) == pytest.approx((theirs["precision"], theirs["recall"]), **close)
    assert 0.1 < theirs["recall"] < 0.99  # a figure that could be wrong


def rows(count, dim, seed, scale=1.0, shift=0.0):
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return shift + scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ mixing


@pytest.mark.parametrize(("count", "dim"), [(300, 24), (200, 128)])
def test_distance_of_moments_equals_torchmetrics_torch_fidelity_and_scipy(count, dim):
    a, b = rows(count, dim, 0), rows(count + 50, dim, 1, scale=1.2, shift=0.1)
    ours = frechet(Moments.of(a), Moments.of(b))
    statistics = [fid_features_to_statistics(x) for x in (a, b)]
    assert ours == pytest.approx(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"], rel=1e-9)
    assert ours == pytest.approx(frechet_distance(a, b), rel=1e-9)
    (mu_a, sigma_a), (mu_b, sigma_b) = ((s["mu"], s["sigma"]) for s in statistics)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
    assert ours == pytest.approx(((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a + sigma_b - 2 * root), rel=1e-6)


def test_analytic_gaussians():
    mu, std = np.array([1.0, -2.0, 3.0]), np.array([0.5, 2.0, 3.0])
    unit = Moments(mu=np.zeros(3), sigma=np.eye(3))
    assert frechet(unit, Moments(mu=mu, sigma=np.diag(std**2))) == pytest.approx(14 + 0.25 + 1 + 4, rel=1e-12)
    rotation = np.linalg.qr(np.random.RandomState(0).randn(3, 3))[0]
    turned = Moments(mu=rotation @ mu, sigma=rotation @ np.diag(std**2) @ rotation.T)
    assert frechet(unit, turned) == pytest.approx(14 + 0.25 + 1 + 4, rel=1e-12)
    assert frechet(turned, turned) == pytest.approx(0, abs=1e-12)
