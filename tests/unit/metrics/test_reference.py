import numpy as np
import pytest
import torch
from torch import nn

from qdm_lightning.metrics.frechet import features
from qdm_lightning.metrics.moments import Moments, load_moments, save_moments
from qdm_lightning.metrics.reference import import_reference, reference
from qdm_lightning.metrics.weights import state_hash


class Linear(nn.Module):
    name = "linear"
    dim = 3

    def __init__(self, scale=1.0):
        super().__init__()
        self.weight = nn.Parameter(scale * torch.arange(12.0).reshape(3, 4), requires_grad=False)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images.flatten(1).float() @ self.weight.T


def pictures(count=20):
    return torch.randint(0, 256, (count, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def take(network, cache, **options):
    return reference(network, pictures(), images_hash="abc", cache=cache, batch_size=8, **options)


def test_computed_once_and_kept(tmp_path):
    network, counted = Linear(), []
    first = take(network, tmp_path, on_batch=counted.append)
    assert (network.seen, sum(counted)) == (24, 20)
    again = take(network, tmp_path)
    assert network.seen == 24
    assert np.array_equal(again.moments.sigma, first.moments.sigma)
    assert again.sha256 == first.sha256 == take(network, None).sha256
    assert again.features is None
    np.testing.assert_allclose(first.moments.mu, features(Linear(), pictures()).double().mean(0), rtol=1e-12)


def test_features_are_kept_on_request(tmp_path):
    network = Linear()
    take(network, tmp_path)
    with_features = take(network, tmp_path, keep_features=True)
    assert torch.equal(with_features.features, features(Linear(), pictures()))
    seen = network.seen
    assert torch.equal(take(network, tmp_path, keep_features=True).features, with_features.features)
    assert network.seen == seen


def test_weights_images_and_batch_size_have_references_of_their_own(tmp_path):
    take(Linear(), tmp_path)
    others = [(Linear(2.0), "abc", 8), (Linear(), "abd", 8), (Linear(), "abc", 4)]
    for network, images_hash, batch_size in others:
        reference(network, pictures(), images_hash=images_hash, cache=tmp_path, batch_size=batch_size)
        assert network.seen
    assert len(list((tmp_path / "references").glob("*.npz"))) == 4
    assert state_hash(Linear()) != state_hash(Linear(2.0))


def test_a_damaged_cache_is_told_and_made_again(tmp_path):
    first = take(Linear(), tmp_path, keep_features=True)
    (file,) = (tmp_path / "references").glob("*.npz")
    whole = file.read_bytes()
    in_features = whole.index(first.features.numpy().tobytes())
    damages = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in (300, in_features)]
    for damaged in (*damages, whole[:-30]):
        said = []
        file.write_bytes(damaged)
        again = take(Linear(), tmp_path, keep_features=True, say=said.append)
        assert len(said) == 1
        assert f"{file.name} is damaged" in said[0]
        assert again.sha256 == first.sha256
        assert torch.equal(again.features, first.features)
        assert file.read_bytes() == whole


def test_features_of_another_shape_are_damaged(tmp_path):
    take(Linear(), tmp_path)
    (file,) = (tmp_path / "references").glob("*.npz")
    save_moments(file, load_moments(file), features=np.zeros((7, 3), np.float32))
    said = []
    assert take(Linear(), tmp_path, keep_features=True, say=said.append).features.shape == (20, 3)
    assert f"{file.name} is damaged: (7, 3) features, not (20, 3)" in said[0]


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(Linear(), tmp_path, on_batch=interrupt)
    assert not [file for file in (tmp_path / "references").iterdir() if file.suffix != ".lock"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    take(Linear(), tmp_path)
    (moments,) = (tmp_path / "references").glob("*.npz")
    half = moments.with_name(f".{moments.name}.123.tmp")
    half.write_bytes(b"half")
    take(Linear(), tmp_path)
    assert not half.exists()


def test_published_statistics_take_the_place_of_images(tmp_path):
    save_moments(tmp_path / "published.npz", Moments.of(features(Linear(), pictures())))
    imported = import_reference(tmp_path / "published.npz", Linear())
    assert imported.moments.mu.shape == (3,)
    assert imported.features is None
    save_moments(tmp_path / "wide.npz", Moments.of(torch.randn(9, 4, generator=torch.Generator().manual_seed(0))))
    with pytest.raises(ValueError, match="another network's"):
        import_reference(tmp_path / "wide.npz", Linear())


def test_one_image_is_no_reference():
    with pytest.raises(ValueError, match="at least 2"):
        reference(Linear(), pictures(1), images_hash="abc", cache=None)
