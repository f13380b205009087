import os

import numpy as np
import pytest
from PIL import Image

from qdm_lightning.data.image_files import MOST_PIXELS, decode, in_threads, picture_files, resized


def save(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), shade, np.uint8)).save(path)


def test_linked_folders_are_followed_and_none_is_read_twice(tmp_path):
    top = tmp_path / "set"
    save(tmp_path / "disk" / "cats" / "1.png")
    save(tmp_path / "disk" / "cats" / "2.png")
    save(top / "dogs" / "3.png")
    (top / "cats").symlink_to(tmp_path / "disk" / "cats")
    (top / "again").symlink_to(top / "dogs")
    (top / "dogs" / "loop").symlink_to(top)
    (top / "gone.png").symlink_to(tmp_path / "nothing.png")
    (top / "notes.txt").write_text("no picture")
    found, left_out = picture_files(top)
    assert [path.relative_to(top).as_posix() for path in found] == ["cats/1.png", "cats/2.png", "dogs/3.png"]
    assert sorted(left_out.values()) == [1, 1, 2]


def test_a_pipe_is_no_picture(tmp_path):
    save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    assert [path.name for path in picture_files(tmp_path)[0]] == ["1.png"]


def test_the_first_of_several_frames_is_taken_and_counted(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), shade, np.uint8)) for shade in (10, 100, 200)]
    for name in ("a.gif", "b.tif", "c.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        picture, pages = decode(tmp_path / name, 1)
        assert pages == 3
        assert set(np.asarray(picture).flatten()) == {10}


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"8BPS\x00\x01" + bytes(100), b"<html></html>", b""]
)
def test_only_formats_of_pictures_are_read_whatever_the_ending(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png is damaged or no picture"):
        decode(tmp_path / "x.png", 3)


def test_too_many_pixels_are_told_before_they_are_decoded(tmp_path):
    width = MOST_PIXELS // 1000 + 1
    (tmp_path / "x.ppm").write_bytes(f"P5 {width} 1000 255\n".encode())
    with pytest.raises(ValueError, match=r"x\.ppm has more than 89,478,485 pixels"):
        decode(tmp_path / "x.ppm", 1)


def test_threads_keep_the_order():
    made = list(in_threads(lambda i: np.full((1, 1, 1), i, np.uint8), list(range(50)), chunk=20))
    assert [len(block) for block in made] == [20, 20, 10]
    assert np.concatenate(made).flatten().tolist() == list(range(50))


def test_images_of_the_size_are_not_copied():
    images = np.zeros((4, 3, 8, 8), np.uint8)
    assert [block is images for block in resized(images, 8, "area")] == [True]
    assert [block.shape for block in resized(images, 4, "area")] == [(4, 3, 4, 4)]
