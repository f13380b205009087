import numpy as np
import pytest
import torch

from qdm_lightning.metrics import moments as moments_module
from qdm_lightning.metrics.moments import Moments, frechet, load_moments, save_moments


def rows(count=97, dim=5, seed=0):
    return 3 + torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_moments_are_numpys():
    moments, x = Moments.of(rows()), rows().double().numpy()
    np.testing.assert_allclose(moments.mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.sigma, np.cov(x, rowvar=False), rtol=1e-13)
    assert moments.count == 97
    assert moments.mu.dtype == moments.sigma.dtype == np.float64


@pytest.mark.parametrize("size", [1, 10, 96])
@pytest.mark.parametrize("block", [1, 40, 4096])
def test_batches_give_the_moments_of_the_whole(size, block, monkeypatch):
    whole = Moments.of(rows())
    monkeypatch.setattr(moments_module, "BLOCK", block)
    moments = Moments.of_batches(iter(rows().split(size)))
    np.testing.assert_allclose(moments.mu, whole.mu, rtol=1e-13)
    np.testing.assert_allclose(moments.sigma, whole.sigma, rtol=1e-12, atol=1e-13)
    assert moments.count == 97


@pytest.mark.parametrize("block", [1, 4096])
def test_features_are_left_as_they_were(block, monkeypatch):
    monkeypatch.setattr(moments_module, "BLOCK", block)
    x = rows().double()
    Moments.of(x)
    assert torch.equal(x, rows().double())


def test_a_large_mean_costs_no_digits():
    shifted = [chunk.double() + 1e6 for chunk in rows().split(10)]
    np.testing.assert_allclose(Moments.of_batches(shifted).sigma, Moments.of(rows()).sigma, rtol=1e-8, atol=1e-8)


def test_too_few_or_broken_features_are_refused():
    for few in ([], [rows()[:0]], [rows()[:0], rows()[:1]]):
        with pytest.raises(ValueError, match="have no covariance: at least 2 are needed"):
            Moments.of_batches(few)
    with pytest.raises(ValueError, match="not finite"):
        Moments.of(rows() / 0)


def test_files_round_trip_and_published_ones_are_read(tmp_path):
    moments = Moments.of(rows())
    save_moments(tmp_path / "ours.npz", moments)
    again = load_moments(tmp_path / "ours.npz", dim=5)
    assert np.array_equal(again.mu, moments.mu)
    assert np.array_equal(again.sigma, moments.sigma)
    assert again.count == 97
    np.savez(tmp_path / "published.npz", mu=moments.mu.astype(np.float32), sigma=moments.sigma, arr_0=np.zeros(3))
    published = load_moments(tmp_path / "published.npz")
    assert published.count is None
    assert abs(frechet(published, moments)) < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ours.npz.sha256", "ours.npz", "published.npz"]


def test_unfit_files_are_refused(tmp_path):
    good = Moments.of(rows())
    arrays = [{"mu": good.mu}, {"mu": good.mu, "sigma": good.sigma[:3]}, {"mu": good.mu * np.nan, "sigma": good.sigma}]
    arrays += [{"mu": good.mu, "sigma": np.triu(good.sigma)}, {"mu": np.array([{}]), "sigma": good.sigma}]
    for content in arrays:
        np.savez(tmp_path / "x.npz", **content)
        with pytest.raises(ValueError, match=r"x\.npz"):
            load_moments(tmp_path / "x.npz")
    save_moments(tmp_path / "x.npz", good)
    with pytest.raises(ValueError, match=r"not \(2048,\) and \(2048, 2048\)"):
        load_moments(tmp_path / "x.npz", dim=2048)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match="damaged"):
        load_moments(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_moments(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="width 5 and 4"):
        frechet(good, Moments.of(rows(dim=4)))
