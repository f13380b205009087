import os

import numpy as np
import pytest
import torch

from qdm_lightning.data.cache import cached, in_threads, listing_key

SHAPE = (5, 1, 2, 2)
PIXELS = np.arange(20, dtype=np.uint8).reshape(SHAPE)


def blocks():
    yield PIXELS[:3]
    yield PIXELS[3:]


def never():
    raise AssertionError("decoded again")


def test_decodes_once_and_maps_afterwards(tmp_path):
    first = cached(tmp_path / "cache", "key", SHAPE, blocks)
    again = cached(tmp_path / "cache", "key", SHAPE, never)
    assert torch.equal(first, torch.from_numpy(PIXELS))
    assert torch.equal(again, first)
    again[0] = 9  # copy on write
    assert torch.equal(cached(tmp_path / "cache", "key", SHAPE, never), first)
    assert torch.equal(cached(None, "key", SHAPE, blocks), first)


def test_an_interrupted_decoding_leaves_nothing(tmp_path):
    def interrupted():
        yield PIXELS[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "key", SHAPE, interrupted)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert torch.equal(cached(tmp_path, "key", SHAPE, blocks), torch.from_numpy(PIXELS))


@pytest.mark.parametrize("wrong", [[PIXELS[:3]], [PIXELS, PIXELS[:1]]])
@pytest.mark.parametrize("folder", [True, False])
def test_another_number_of_images_is_an_error(tmp_path, wrong, folder):
    with pytest.raises(ValueError, match="announced"):
        cached(tmp_path if folder else None, "key", SHAPE, lambda: wrong)
    assert not list(tmp_path.glob("*.npy"))


def test_a_damaged_cache_says_what_to_delete(tmp_path):
    cached(tmp_path, "key", SHAPE, blocks)
    (file,) = tmp_path.glob("*.npy")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:20], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"key\.npy are damaged .* delete that file"):
            cached(tmp_path, "key", SHAPE, never)
    np.save(file, PIXELS[:2])
    with pytest.raises(ValueError, match=r"holds uint8 \(2, 1, 2, 2\)"):
        cached(tmp_path, "key", SHAPE, never)


def test_key_follows_names_sizes_times_and_settings(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12")
    os.utime(file, ns=(0, 0))
    keys = [listing_key([("a", file)], size=8), listing_key([("b", file)], size=8), listing_key([("a", file)], size=9)]
    os.utime(file, ns=(0, 1))
    keys.append(listing_key([("a", file)], size=8))
    file.write_bytes(b"123")
    os.utime(file, ns=(0, 0))
    keys.append(listing_key([("a", file)], size=8))
    assert len(set(keys)) == 5
    file.write_bytes(b"45")
    os.utime(file, ns=(0, 0))
    assert listing_key([("a", file)], size=8) == keys[0]


def test_threads_keep_the_order():
    made = list(in_threads(lambda i: np.full((1, 1, 1), i, np.uint8), list(range(50)), chunk=20))
    assert [len(block) for block in made] == [20, 20, 10]
    assert np.concatenate(made).flatten().tolist() == list(range(50))
