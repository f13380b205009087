import zipfile

import numpy as np
import pytest
import torch

from qdm_lightning.data import imagenet64
from qdm_lightning.data.imagenet64 import TRAIN_FILES, ImageNet64Data


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Ten training batches of two or three images and a validation batch of four, as Chrabaszcz et al. wrote them."""
    rng = np.random.default_rng(0)
    counts = {**{name: 2 + i % 2 for i, name in enumerate(TRAIN_FILES)}, "val_data.npz": 4}
    for name, count in counts.items():
        arrays = {"data": rng.integers(0, 256, (count, 12288), dtype=np.uint8), "labels": np.arange(1, count + 1)}
        if name != "val_data.npz":
            arrays["mean"] = np.zeros(12288)
        np.savez_compressed(tmp_path / name, **arrays)
    monkeypatch.setattr(imagenet64, "TRAIN_IMAGES", 25)
    monkeypatch.setattr(imagenet64, "VAL_IMAGES", 4)
    return tmp_path


def load(root, **options):
    data = ImageNet64Data(root=str(root), cache=options.pop("cache", None), **options)
    data.setup()
    return data


def test_batches_in_order_channel_by_channel(root):
    data = load(root)
    rows = np.concatenate([np.load(root / f"train_data_batch_{i}.npz")["data"] for i in range(1, 11)])
    assert data.train_images.shape == (25, 3, 64, 64)
    planes = np.stack([rows[:, i * 4096 : (i + 1) * 4096].reshape(-1, 64, 64) for i in range(3)], axis=1)
    assert np.array_equal(data.train_images.numpy(), planes)
    assert np.array_equal(data.val_images.numpy().reshape(4, -1), np.load(root / "val_data.npz")["data"])
    data.labelled = True
    assert data.train_labels.tolist() == [label for i in range(10) for label in range(2 + i % 2)]  # theirs begin at 1
    assert data.val_labels.tolist() == [0, 1, 2, 3]


def test_classes_in_the_order_of_their_wordnet_ids(root, tmp_path):
    """As networks have them that were trained on ImageNet's folders, whose names are sorted."""
    wnids = [f"n{(7919 * number) % 1009:08d}" for number in range(1, 1001)]
    lines = [f"{wnid} {number} name_{number}" for number, wnid in enumerate(wnids, 1)]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines) + "\n")
    data = load(root, synsets=str(tmp_path / "map_clsloc.txt"))
    data.labelled = True
    assert data.val_labels.tolist() == [sorted(wnids).index(wnid) for wnid in wnids[:4]]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match="not one line for each of the classes 1 to 1000"):
        load(root, synsets=str(tmp_path / "map_clsloc.txt")).all_labels()


def test_half_size_by_area(root):
    data = load(root, image_size=32)
    means = load(root).val_images.numpy().reshape(4, 3, 32, 2, 32, 2).mean((3, 5))
    assert np.abs(data.val_images.numpy() - means).max() <= 1


def test_uncompressed_once(root, monkeypatch):
    first = load(root, cache=str(root / "cache"))
    monkeypatch.setattr(imagenet64, "read_batch", lambda *_: pytest.fail("read again"))
    assert torch.equal(load(root, cache=str(root / "cache")).train_images, first.train_images)


def test_a_missing_batch_is_named(root):
    (root / "train_data_batch_7.npz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"train_data_batch_7\.npz is missing: looked for {root}.*image-net\.org"):
        load(root)


def test_a_batch_too_few_images_is_refused_unless_told(root):
    np.savez(root / "val_data.npz", data=np.zeros((3, 12288), np.uint8), labels=[1, 2, 3])
    with pytest.raises(ValueError, match=r"hold 3 images, not 4"):
        load(root)
    assert len(load(root, verify=False).val_images) == 3


def test_damaged_batches_are_named_and_leave_no_cache(root):
    file = root / "train_data_batch_3.npz"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    for damaged in (bytes(flipped), whole[:-100], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train_data_batch_3\.npz is damaged"):
            load(root, cache=str(root / "cache"))
    assert not list((root / "cache").glob("*.npy"))


@pytest.mark.parametrize(
    "arrays",
    [
        {"data": np.zeros((4, 3072), np.uint8), "labels": [1] * 4},
        {"data": np.zeros((4, 12288)), "labels": [1] * 4},
        {"data": np.zeros((3, 12288), np.uint8), "labels": [1] * 4},
        {"labels": [1] * 4},
    ],
)
def test_another_format_is_refused(root, arrays):
    np.savez(root / "val_data.npz", **arrays)
    with pytest.raises(ValueError, match=r"val_data\.npz"):
        load(root)


def bomb(path, labels, shape, size=0):
    """An .npz whose `data` has a header of `shape`, and `size` zeros behind it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, kind, announced, content in (
            ("labels", "<i8", (labels,), bytes(8 * labels)),
            ("data", "|u1", shape, bytes(size)),
        ):
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": announced})
                stream.write(content)


@pytest.mark.parametrize(
    ("bombs", "message"),
    [
        ({"labels": 4, "shape": (2**29, 12288)}, r"promises 6,597,069,766,656 bytes"),  # 6.6 TB in 200 bytes
        ({"labels": 4, "shape": (3000, 12288), "size": 3000 * 12288}, r"not uint8 \(N, 12288\) with N labels"),
        ({"labels": 8, "shape": (8, 12288), "size": 8 * 12288}, r"it says that it holds 8 images, and all of ImageNet are 7"),
        ({"labels": 4, "shape": (4, 2**40, 0)}, r"not uint8 \(N, 12288\)"),
    ],
)
def test_a_bomb_is_refused_before_memory_is_taken(root, monkeypatch, bombs, message):
    monkeypatch.setattr(imagenet64, "TRAIN_IMAGES", 7)
    monkeypatch.setattr(imagenet64.np, "load", lambda *_, **__: pytest.fail("it was read"))
    bomb(root / "val_data.npz", **bombs)
    with pytest.raises(ValueError, match=rf"val_data\.npz is damaged: .*{message}"):
        imagenet64.read_batch(root / "val_data.npz")


def test_download_says_where_to_log_in(root):
    with pytest.raises(ValueError, match=r"data\.download=true cannot fetch ImageNet.*Imagenet64_val\.zip"):
        load(root, download=True)
