"""CIFAR-10 in its real format: Python 2 pickles, written here opcode by opcode, and their MD5 sums."""

import hashlib
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from qdm_lightning.data.cifar10 import Cifar10Data, read_batch


def py2_string(text):
    return b"T" + struct.pack("<i", len(text)) + text


def py2_batch(label, data, labels):
    """What Python 2's cPickle made of {"batch_label", "labels", "data", "filenames"} at protocol 2."""
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"M" + struct.pack("<H", data.shape[0]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01" + shape
    array += dtype + b"\x89" + py2_string(data.tobytes()) + b"tb"
    names = b"](" + b"".join(py2_string(b"name_s_%06d.png" % i) for i in range(len(labels))) + b"e"
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    items = [(b"batch_label", py2_string(label)), (b"labels", numbers), (b"data", array), (b"filenames", names)]
    return b"\x80\x02}(" + b"".join(py2_string(key) + value for key, value in items) + b"u."


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 3, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def root(tmp_path, monkeypatch, pixels):
    """A data.root with five training batches and a test batch of three images, and torchvision's lists of their sums."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    sums = []
    for (name, _), images in zip(CIFAR10.train_list + CIFAR10.test_list, pixels, strict=True):
        content = py2_batch(name.encode(), images.reshape(3, 3072), [len(sums), 2, 9])
        (folder / name).write_bytes(content)
        sums.append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    return tmp_path


def load(root, **options):
    data = Cifar10Data(root=str(root), **options)
    data.setup()
    return data


def test_reads_what_torchvision_reads(root, pixels):
    data = load(root)
    assert torch.equal(data.train_images, torch.from_numpy(pixels[:5].reshape(15, 3, 32, 32)))
    for images, train in ((data.train_images, True), (data.val_images, False)):
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), CIFAR10(root, train=train).data)
        assert data.all_labels()[0 if train else 1].tolist() == CIFAR10(root, train=train).targets


def test_labels_are_read_when_they_are_asked_for_and_checked(root):
    data = load(root)
    assert data.train_labels is None  # of a network without classes
    for labels, message in (([0, 1], "not one label in 0..9 for each image"), ([0, 1, 10], "not one label in 0..9")):
        (root / CIFAR10.base_folder / "test_batch").write_bytes(py2_batch(b"x", np.zeros((3, 3072), np.uint8), labels))
        data = load(root, verify=False)
        with pytest.raises(ValueError, match=message):
            data.all_labels()


def test_half_size_is_the_mean_of_two_by_two(root, pixels):
    data = load(root, image_size=16)
    means = pixels[5].reshape(3, 3, 16, 2, 16, 2).mean((3, 5))
    assert (data.channels, data.image_size) == (3, 16)
    assert np.abs(data.val_images.numpy() - means).max() <= 1  # Pillow rounds after each of its two passes


def test_a_missing_file_is_named(root):
    (root / CIFAR10.base_folder / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=rf"data_batch_4 is missing: looked for {root}.*data\.download=true") as caught:
        load(root)
    assert CIFAR10.url in str(caught.value)


def test_one_damaged_byte_is_found_by_the_sum(root):
    file = root / CIFAR10.base_folder / "data_batch_2"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_2 is damaged: its MD5 sum is"):
        load(root)
    assert len(load(root, verify=False).train_images) == 15


def test_without_sums_the_format_is_still_checked(root):
    file = root / CIFAR10.base_folder / "test_batch"
    for content in (file.read_bytes()[:5000], b"", pickle.dumps([1]), pickle.dumps({"data": np.zeros((2, 5), np.uint8)})):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="test_batch is"):
            load(root, verify=False)


def test_a_pickle_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    (tmp_path / "batch").write_bytes(pickle.dumps({"data": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="it would call"):
        read_batch(tmp_path / "batch")
    assert not (tmp_path / "ran").exists()


def test_batches_pickled_by_todays_numpy_are_read_too(tmp_path, pixels):
    data = pixels[0].reshape(3, 3072)
    for protocol in (2, 4):
        (tmp_path / "batch").write_bytes(pickle.dumps({"data": data}, protocol=protocol))
        assert np.array_equal(read_batch(tmp_path / "batch"), pixels[0])


def test_download_unpacks_an_archive_that_is_already_there(root, tmp_path_factory, monkeypatch):
    target = tmp_path_factory.mktemp("target")
    with tarfile.open(target / CIFAR10.filename, "w:gz") as tar:
        tar.add(root / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((target / CIFAR10.filename).read_bytes()).hexdigest())
    assert torch.equal(load(target, download=True).train_images, load(root).train_images)


def test_a_download_that_fails_says_what_to_get(root, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")  # nobody listens there
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded to .*127\.0\.0\.1:9/cifar\.tar\.gz by other means"):
        load(tmp_path_factory.mktemp("empty"), download=True)
