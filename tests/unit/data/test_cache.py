import os
import time

import numpy as np
import pytest
import torch

from qdm_lightning.data.cache import cached, listing_key

SHAPE = (5, 1, 2, 2)
PIXELS = np.arange(20, dtype=np.uint8).reshape(SHAPE)


def blocks():
    yield PIXELS[:3]
    yield PIXELS[3:]


def never():
    raise AssertionError("decoded again")
    yield


def test_decodes_once_and_maps_afterwards(tmp_path):
    first = cached(str(tmp_path / "cache"), "key", SHAPE, blocks())
    again = cached(str(tmp_path / "cache"), "key", SHAPE, never())
    assert torch.equal(first, torch.from_numpy(PIXELS))
    assert torch.equal(again, first)
    again[0] = 9  # copy on write
    assert torch.equal(cached(str(tmp_path / "cache"), "key", SHAPE, never()), first)
    assert torch.equal(cached(None, "key", SHAPE, blocks()), first)


def test_an_interrupted_decoding_leaves_nothing(tmp_path):
    def interrupted():
        yield PIXELS[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(str(tmp_path), "key", SHAPE, interrupted())
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert torch.equal(cached(str(tmp_path), "key", SHAPE, blocks()), torch.from_numpy(PIXELS))


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / ".key.npy.7.tmp").touch()
    cached(str(tmp_path), "key", SHAPE, blocks())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".key.npy.sha256", "key.npy", "key.npy.lock"]


@pytest.mark.parametrize("wrong", [[PIXELS[:3]], [PIXELS, PIXELS[:1]]])
@pytest.mark.parametrize("folder", [True, False])
def test_another_number_of_images_is_an_error(tmp_path, wrong, folder):
    with pytest.raises(ValueError, match="announced"):
        cached(str(tmp_path) if folder else None, "key", SHAPE, wrong)
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "folder", "bare cut", "bare other"])
def test_a_damaged_cache_is_made_again_with_a_word(tmp_path, caplog, damage):
    cached(str(tmp_path), "key", SHAPE, blocks())
    (file,) = tmp_path.glob("*.npy")
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-1], "bare cut": whole[:-1], "bit": whole[:-1] + b"x"}.get(damage, b""))
    if damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage.startswith("bare"):
        (tmp_path / ".key.npy.sha256").unlink()
    if damage == "bare other":
        np.save(file, PIXELS[:2])
    assert torch.equal(cached(str(tmp_path), "key", SHAPE, blocks()), torch.from_numpy(PIXELS))
    assert f"{file} is damaged" in caplog.text
    assert caplog.text.count("made again") == 1
    assert torch.equal(cached(str(tmp_path), "key", SHAPE, never()), torch.from_numpy(PIXELS))


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
    assert listing_key([("a", file)], size=8) == keys[-1]


def test_another_file_of_the_same_name_size_and_time_has_another_key(tmp_path):
    keys = []
    for folder in ("dark", "light"):
        file = tmp_path / folder / "a"
        file.parent.mkdir()
        file.write_bytes(folder[:2].encode())
        os.utime(file, ns=(0, 0))
        keys.append(listing_key([("a", file)], size=8))
    time.sleep(0.02)  # the kernel's clock of inodes ticks every few ms
    file.write_bytes(b"xy")
    os.utime(file, ns=(0, 0))
    keys.append(listing_key([("a", file)], size=8))
    assert len(set(keys)) == 3
