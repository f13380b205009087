import numpy as np

from qdm_lightning.data.image_files import in_threads, resized


def test_threads_keep_the_order():
    made = list(in_threads(lambda i: np.full((1, 1, 1), i, np.uint8), list(range(50)), chunk=20))
    assert [len(block) for block in made] == [20, 20, 10]
    assert np.concatenate(made).flatten().tolist() == list(range(50))


def test_images_of_the_size_are_not_copied():
    images = np.zeros((4, 3, 8, 8), np.uint8)
    assert [block is images for block in resized(images, 8, "area")] == [True]
    assert [block.shape for block in resized(images, 4, "area")] == [(4, 3, 4, 4)]
