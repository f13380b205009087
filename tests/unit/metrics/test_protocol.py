import pytest
import torch
from torch import nn

from qdm_lightning.metrics.constants import PROTOCOL
from qdm_lightning.metrics.digits import DigitsFeatures
from qdm_lightning.metrics.frechet import feature_batches
from qdm_lightning.metrics.protocol import (
    density_coverage,
    inception_score,
    kernel_distance,
    metric_keys,
    precision_recall,
)


class Named(nn.Module):
    dim = 2

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, images):
        return images.flatten(1)[:, :2].float()


def rows(count, seed=0, shift=0.0):
    return shift + torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_a_networks_name_is_in_its_keys():
    other = metric_keys(Named("mine"))
    assert other.pop("cmmd") == "cmmd"  # of CLIP alone
    assert all("_mine" in key for key in other.values())
    assert len(set(other.values())) == len(other)


def test_score_counts_the_classes_that_are_surely_and_evenly_there():
    logits = 100.0 * nn.functional.one_hot(torch.arange(4000) % 4).float()
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(4.0, rel=0.02)
    assert deviation < 0.02
    assert inception_score(torch.zeros(50, 7)) == pytest.approx((1.0, 0.0))


def test_kernel_distance_sees_a_shift(monkeypatch):
    monkeypatch.setitem(PROTOCOL, "kid_subsets", 3)
    near, _ = kernel_distance(rows(1000), rows(1000, seed=1))
    far, _ = kernel_distance(rows(1000), rows(1000, seed=1, shift=0.3))
    assert abs(near) < 0.01 < far


def test_precision_and_recall_of_known_sets():
    real = rows(200)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(rows(200, shift=100.0), real) == (0.0, 0.0)
    one_mode = 0.01 * rows(200, seed=2)
    precision, recall = precision_recall(one_mode, real)
    assert precision > 0.9
    assert recall < 0.1


def test_density_and_coverage_of_known_sets():
    """A real image lies in k balls where no two distances are equal: its own among them, its k-th neighbor outside."""
    real = rows(200)
    assert density_coverage(real, real) == (1.0, 1.0)
    assert density_coverage(rows(200, shift=100.0), real) == (0.0, 0.0)
    line = torch.arange(20.0)[:, None] ** 2  # the fifth neighbor of 0 is 25, of 1 it is 25 too, and so on
    radii = [float((line - x).abs().flatten().sort().values[5]) for x in line]
    one = torch.tensor([[30.0]])
    holding = sum(abs(float(x) - 30) < radius for x, radius in zip(line, radii, strict=True))
    assert density_coverage(one, line) == (holding / 5, holding / 20)
    assert 0 < holding < 20


def test_too_few_unlike_or_broken_features_are_refused():
    with pytest.raises(ValueError, match=r"at least 1000 generated images, not 999: type num_samples=1000"):
        kernel_distance(rows(999), rows(1000))
    with pytest.raises(ValueError, match="at least 10 generated images"):
        inception_score(rows(9))
    with pytest.raises(ValueError, match="at least 4 real images"):
        precision_recall(rows(4), rows(3))
    with pytest.raises(ValueError, match="one width"):
        precision_recall(rows(10), rows(10)[:, :5])
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(rows(10), rows(10) / 0)


def test_logits_come_beside_the_features_and_only_where_there_are_classes():
    images = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    counted = []
    batches = list(feature_batches(DigitsFeatures(), images, 4, logits=True, on_batch=counted.append))
    assert [(tuple(f.shape), tuple(c.shape)) for f, c in batches] == [((4, 64), (4, 10)), ((1, 64), (1, 10))]
    assert counted == [4, 1]
    with pytest.raises(ValueError, match="mine has no class logits"):
        next(feature_batches(Named("mine"), images, 4, logits=True))
