import numpy as np
import pytest
import torch
from torch import nn

from qdm_lightning.metrics.frechet import (
    check_network,
    features,
    frechet_distance,
    frechet_key,
    halves_distance,
)


class Pixels(nn.Module):
    dim = 4

    def __init__(self, name="pixels"):
        super().__init__()
        self.name = name
        self.sizes = []

    def forward(self, images):
        assert not self.training
        self.sizes.append(len(images))
        return images.flatten(1).double()


def pictures(count):
    return torch.randint(0, 256, (count, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_features_come_in_order_from_batches_of_one_size():
    network, images = Pixels().train(), pictures(11)
    rows = features(network, images, batch_size=4)
    assert torch.equal(rows, images.flatten(1).float())
    assert rows.dtype == torch.float32
    assert network.sizes == [4, 4, 4]
    assert network.training
    assert features(network, images[:0]).shape == (0, 4)
    network.batch_size = 7
    features(network, images)
    assert network.sizes[3:] == [7, 7]


def test_key_names_the_network():
    assert frechet_key(Pixels()) == "fd_pixels"
    with pytest.raises(ValueError, match=r"named 'inception' without the published weights .* would pass for FID"):
        frechet_key(Pixels("inception"))


@pytest.mark.parametrize("name", ["", "a b", "Pixels", None])
def test_unfit_networks_are_refused(name):
    with pytest.raises(ValueError, match="no feature network"):
        check_network(Pixels(name))
    with pytest.raises(ValueError, match="no feature network"):
        check_network(nn.Identity())


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"returned \(256, 9\) for 256 images, not \(256, 4\)"):
        features(Pixels(), torch.zeros(3, 1, 3, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8 images"):
        features(Pixels(), torch.zeros(3, 1, 2, 2))


def test_too_few_or_broken_features_are_refused():
    good = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for few in (good[:1], good[:0]):
        with pytest.raises(ValueError, match="at least 2"):
            frechet_distance(good, few)
    with pytest.raises(ValueError, match="width 3 and 2 do not compare"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, good / 0)
    with pytest.raises(ValueError, match="at least 4"):
        halves_distance(good[:3])


def test_floor_is_the_distance_of_disjoint_halves():
    rows = pictures(100).flatten(1)
    floor = halves_distance(rows)
    order = np.random.RandomState(0).permutation(100)
    assert floor == frechet_distance(rows[order[:50]], rows[order[50:]]) > 0
    assert frechet_distance(rows, rows) < 1e-6 * floor
