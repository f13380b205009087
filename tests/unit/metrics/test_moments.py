import itertools

import numpy as np
import pytest
import torch

from qdm_lightning.metrics.moments import Moments, MomentsStream, frechet, load_moments, save_moments


def rows(count=97, dim=5, seed=0):
    return 3 + torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def streamed(chunks, order):
    stream = MomentsStream(chunks[0].shape[1])
    for index in order:
        stream.add(index, chunks[index])
    return stream.result()


def test_moments_are_numpys():
    moments, x = Moments.of(rows()), rows().double().numpy()
    np.testing.assert_allclose(moments.mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.sigma, np.cov(x, rowvar=False), rtol=1e-13)
    assert moments.count == 97
    assert moments.mu.dtype == moments.sigma.dtype == np.float64


@pytest.mark.parametrize("size", [1, 10, 96])
def test_chunks_give_the_moments_of_the_whole(size):
    chunks = rows().split(size)
    moments, whole = streamed(chunks, range(len(chunks))), Moments.of(rows())
    np.testing.assert_allclose(moments.mu, whole.mu, rtol=1e-13)
    np.testing.assert_allclose(moments.sigma, whole.sigma, rtol=1e-12, atol=1e-13)
    assert moments.count == 97


def test_every_order_gives_the_same_bits():
    chunks = rows().split(33)
    first = streamed(chunks, range(3))
    for order in itertools.permutations(range(3)):
        moments = streamed(chunks, order)
        assert np.array_equal(moments.mu, first.mu)
        assert np.array_equal(moments.sigma, first.sigma)


def test_a_large_mean_costs_no_digits():
    shifted = [chunk.double() + 1e6 for chunk in rows().split(10)]
    np.testing.assert_allclose(streamed(shifted, range(10)).sigma, Moments.of(rows()).sigma, rtol=1e-8, atol=1e-8)


def test_wrong_chunks_are_refused():
    stream = MomentsStream(5)
    with pytest.raises(ValueError, match="0 images have no covariance"):
        stream.result()
    stream.add(1, rows())
    with pytest.raises(ValueError, match="chunk 0 of the features is missing, while chunk 1 is there"):
        stream.result()
    for index in (1, 0):
        stream.add(0, rows()) if index == 0 else None
        with pytest.raises(ValueError, match=f"chunk {index} of the features came twice"):
            stream.add(index, rows())
    for bad in (rows(dim=4), rows()[:0], rows()[0], rows() / 0):
        with pytest.raises(ValueError, match="chunk 2"):
            stream.add(2, bad)


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
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


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
