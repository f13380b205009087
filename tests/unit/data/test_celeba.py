import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CelebA
from torchvision.transforms import CenterCrop

from qdm_lightning.data import celeba
from qdm_lightning.data.celeba import CelebAData

SPLITS = {"000001.jpg": 0, "000002.jpg": 1, "000003.jpg": 0, "000004.jpg": 2, "000005.jpg": 0}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data.root in torchvision's layout with five aligned pictures, and the sum of its partition list."""
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in SPLITS:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
        coarse.resize((178, 218)).save(folder / "img_align_celeba" / name, quality=95)
    partition = "".join(f"{name} {split}\n" for name, split in SPLITS.items()).encode()
    (folder / "list_eval_partition.txt").write_bytes(partition)
    listed = [
        (i, hashlib.md5(partition).hexdigest() if n == "list_eval_partition.txt" else m, n) for i, m, n in CelebA.file_list
    ]
    monkeypatch.setattr(CelebA, "file_list", listed)
    return tmp_path


def load(root, **options):
    data = CelebAData(root=str(root), cache=options.pop("cache", None), **options)
    data.setup()
    return data


def picture(root, name):
    return Image.open(root / "celeba" / "img_align_celeba" / name)


def test_splits_crop_and_resize(root):
    data = load(root)
    for images, names in ((data.train_images, [n for n, s in SPLITS.items() if s == 0]), (data.val_images, ["000002.jpg"])):
        expected = [CenterCrop(140)(picture(root, name)).resize((64, 64), Image.Resampling.BILINEAR) for name in names]
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack([np.asarray(image) for image in expected]))


def test_decoded_once(root, monkeypatch):
    first = load(root, cache=str(root / "cache"))
    monkeypatch.setattr(celeba, "decode", lambda *_: pytest.fail("decoded again"))
    again = load(root, cache=str(root / "cache"))
    assert torch.equal(again.train_images, first.train_images)
    assert again.fingerprint() == first.fingerprint()


def test_other_settings_are_decoded_apart(root):
    small, large = load(root, image_size=8, cache=str(root / "cache")), load(root, cache=str(root / "cache"))
    assert (small.train_images.shape, large.train_images.shape) == ((3, 3, 8, 8), (3, 3, 64, 64))
    wide = load(root, crop=178, cache=str(root / "cache"))
    assert not torch.equal(wide.train_images, large.train_images)


@pytest.mark.parametrize("name", ["000003.jpg", "000004.jpg"])
def test_every_listed_picture_must_be_there_and_decode(root, name):
    file = root / "celeba" / "img_align_celeba" / name
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of the 5 pictures .* looked for {file}; type data\.download=true, or get"):
        load(root, cache=str(root / "cache"))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        load(root, cache=str(root / "cache"))
    file.write_bytes(whole)
    assert len(load(root, cache=str(root / "cache")).train_images) == 3


def test_pictures_in_the_wild_are_refused(root):
    Image.new("RGB", (300, 400)).save(root / "celeba" / "img_align_celeba" / "000001.jpg")
    with pytest.raises(ValueError, match=r"000001\.jpg is 300x400: aligned CelebA pictures are 178x218"):
        load(root)


def test_partition_list_missing_damaged_or_another(root):
    file = root / "celeba" / "list_eval_partition.txt"
    whole = file.read_text()
    file.write_text(whole.replace("000003.jpg 0", "000003.jpg 1"))
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt is damaged: its MD5 sum"):
        load(root)
    assert len(load(root, verify=False).val_images) == 2
    for content in ("000001.jpg 7\n", "../x.jpg 0\n", "000001.jpg 0\n"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"list_eval_partition\.txt is damaged"):
            load(root, verify=False)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition\.txt is missing: looked for"):
        load(root)


def test_a_download_that_fails_says_what_to_get(tmp_path, monkeypatch):
    def refuse(*_):
        raise ImportError("no module gdown")

    monkeypatch.setattr(celeba, "import_module", refuse)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded .*gdown.* img_align_celeba\.zip"):
        load(tmp_path, download=True)
