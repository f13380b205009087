from pathlib import Path

import numpy as np
import pytest
import torch

import qdm_lightning
from qdm_lightning.metrics.digits import DigitsFeatures
from qdm_lightning.metrics.frechet import features, frechet_distance, frechet_key, halves_distance

DIGITS = Path(qdm_lightning.__file__).parent / "data" / "assets" / "digits.npz"


@pytest.fixture(scope="module")
def network():
    return DigitsFeatures()


@pytest.fixture(scope="module")
def digits():
    with np.load(DIGITS) as archive:
        held_out = np.isin(np.arange(1797), archive["held_out"])
        images, labels = torch.from_numpy(archive["images"])[:, None], torch.from_numpy(archive["labels"])
    return images[~held_out], images[held_out], labels[held_out]


def noised(images, sigma):
    noise = sigma * 127.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def test_classifies_the_held_out_digits(network, digits):
    _, images, labels = digits
    assert (network.features_and_logits(images)[1].argmax(1) == labels).float().mean() >= 0.97


def test_interface(network, digits):
    assert frechet_key(network) == "fd_digits"
    assert features(network, digits[1]).shape == (297, network.dim)
    assert not any(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match=r"uint8 images \(N, 1, 8, 8\), not torch.uint8 \(2, 3, 8, 8\)"):
        network(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_distance_grows_with_noise_and_stands_clear_of_the_floor(network, digits):
    train, _, _ = digits
    real = features(network, train)
    distances = [frechet_distance(real, features(network, noised(train, sigma))) for sigma in (0.1, 0.2, 0.3, 0.5, 1.0)]
    assert distances == sorted(distances)
    assert 2 * halves_distance(real) < distances[1]


def test_blur_and_missing_classes_are_seen(network, digits):
    train, _, _ = digits
    real = features(network, train)
    floor = halves_distance(real)
    blurred = torch.nn.functional.avg_pool2d(train.float(), 3, 1, padding=1).to(torch.uint8)
    assert frechet_distance(real, features(network, blurred)) > 10 * floor
    eight_classes = train[network.features_and_logits(train)[1].argmax(1) < 8]
    assert frechet_distance(real, features(network, eight_classes)) > 2 * floor
