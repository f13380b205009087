import numpy as np
import pytest
import torch
from PIL import Image

from qdm_lightning.data import images as images_module
from qdm_lightning.data.images import ImagesData


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def load(path, **options):
    data = ImagesData(path=str(path), **options)
    data.setup()
    return torch.cat([data.train_images, data.val_images]), data


def as_set(images):
    return {image.numpy().tobytes() for image in images}


def test_folder_is_read_to_the_bottom_in_any_format(tmp_path, rng):
    pixels = rng.integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for array, name in zip(pixels, ["1.png", "a/2.bmp", "a/b/3.TIFF", ".hidden/4.png"], strict=True):
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    images, data = load(tmp_path)
    assert images.shape == (3, 3, 6, 6)
    assert as_set(images) == as_set(torch.from_numpy(pixels[:3].transpose(0, 3, 1, 2).copy()))
    assert (data.channels, data.image_size) == (3, 6)


@pytest.mark.parametrize("shape", [(5, 4, 4, 3), (5, 4, 4, 1), (5, 4, 4)])
def test_npz_pixels_come_through_unchanged(tmp_path, rng, shape):
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(5))
    channels = 3 if shape[-1] == 3 else 1
    images, _ = load(tmp_path / "x.npz", channels=channels)
    assert as_set(images) == as_set(torch.from_numpy(pixels.reshape(5, 4, 4, channels).transpose(0, 3, 1, 2).copy()))


def test_split_is_fixed_and_the_parts_are_disjoint(tmp_path):
    pixels = np.arange(50, dtype=np.uint8).repeat(4).reshape(50, 2, 2)
    np.savez(tmp_path / "sole.npz", pixels)
    _, data = load(tmp_path / "sole.npz", channels=1, val_fraction=0.2)
    _, again = load(tmp_path / "sole.npz", channels=1, val_fraction=0.2)
    assert (len(data.train_images), len(data.val_images)) == (40, 10)
    assert sorted(torch.cat([data.train_images, data.val_images])[:, 0, 0, 0].tolist()) == list(range(50))
    assert torch.equal(data.val_images, again.val_images)
    assert data.fingerprint() == again.fingerprint()


def test_area_filter_averages_the_central_square(tmp_path, rng):
    pixels = 4 * rng.integers(0, 64, (3, 8, 12), dtype=np.uint8)  # so that means of four are whole numbers
    np.savez(tmp_path / "x.npz", pixels)
    images, _ = load(tmp_path / "x.npz", channels=1, image_size=4, filter="area")
    expected = torch.from_numpy(pixels[:, :, 2:10].reshape(3, 4, 2, 4, 2).mean((2, 4)).astype(np.uint8))
    assert as_set(images[:, 0]) == as_set(expected)


def test_color_becomes_gray_and_gray_becomes_color(tmp_path):
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("L", (2, 2), 9).save(tmp_path / "gray.png")
    gray, _ = load(tmp_path, channels=1)
    assert sorted(gray[:, 0, 0, 0].tolist()) == [9, 76]  # ITU-R 601: 0.299 * 255
    color, _ = load(tmp_path, channels=3)
    assert sorted(color[:, :, 0, 0].tolist()) == [[9, 9, 9], [255, 0, 0]]


def test_transparent_pixels_are_white(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / name)
    assert load(tmp_path)[0].unique().tolist() == [255]


def refused(path, error, match, **options):
    with pytest.raises(error, match=match) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)


def test_damaged_and_unfit_files_are_named(tmp_path, rng):
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, ValueError, r"bad\.png is damaged")
    (tmp_path / "bad.png").unlink()
    refused(tmp_path, ValueError, "at least 5")
    Image.new("RGB", (5, 4)).save(tmp_path / "other.png")
    refused(tmp_path, ValueError, r"other\.png is 5x4, not 64x64: type data\.image_size=64")
    Image.fromarray(np.zeros((64, 64), dtype=np.uint16)).save(tmp_path / "other.png")
    refused(tmp_path, ValueError, r"other\.png has more than 8 bits")


def test_missing_pictures_are_named(tmp_path):
    refused(tmp_path / "absent", FileNotFoundError, r"data\.path=.*absent: nothing there")
    refused(tmp_path, FileNotFoundError, "holds no picture")
    with pytest.raises(ValueError, match=r"type data\.path="):
        ImagesData()
    refused(tmp_path, ValueError, r"data\.filter=cubic .* lanczos, area", filter="cubic")


@pytest.mark.parametrize(
    "arrays",
    [
        {"a": np.zeros((2, 4, 4, 3), np.uint8), "b": np.zeros(2)},
        {"images": np.zeros((2, 4, 4, 3), np.float32)},
        {"images": np.zeros((2, 3, 4, 4), np.uint8)},
        {"images": np.zeros((0, 4, 4, 3), np.uint8)},
        {"images": np.array([{}])},
    ],
)
def test_unfit_npz_is_named(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", ValueError, r"x\.npz .*an \.npz of uint8 \(N, H, W, C\)")


def test_damaged_npz_is_named(tmp_path, rng):
    np.savez(tmp_path / "x.npz", images=rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    whole[400] ^= 1
    for damaged in (bytes(whole), bytes(whole[:-40]), b"junk", b""):
        (tmp_path / "x.npz").write_bytes(damaged)
        refused(tmp_path / "x.npz", ValueError, r"x\.npz is damaged")


def test_a_folder_is_decoded_once(tmp_path, rng, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{i}.png")
    plain, _ = load(tmp_path / "in", image_size=4)
    first, data = load(tmp_path / "in", image_size=4, cache=str(tmp_path / "cache"))
    assert torch.equal(first, plain)
    monkeypatch.setattr(images_module, "decode", lambda *_: pytest.fail("decoded again"))
    again, _ = load(tmp_path / "in", image_size=4, cache=str(tmp_path / "cache"))
    assert torch.equal(again, first)
    assert (len(data.train_images), len(data.val_images)) == (3, 1)
