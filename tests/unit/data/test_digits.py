from pathlib import Path

import numpy as np
import pytest
import torch

import qdm_lightning
from qdm_lightning.data.digits import DigitsData, load_digits

DIGITS = Path(qdm_lightning.__file__).parent / "data" / "assets" / "digits.npz"


def test_split_covers_all_digits_once():
    train, val = load_digits()
    assert train.shape == (1500, 1, 8, 8)
    assert val.shape == (297, 1, 8, 8)
    assert train.dtype == val.dtype == torch.uint8
    with np.load(DIGITS) as archive:
        assert sorted(map(bytes, archive["images"])) == sorted(map(bytes, torch.cat([train, val]).numpy()))
        counts = np.bincount(archive["labels"])
        by_image = dict(zip(map(bytes, archive["images"]), archive["labels"], strict=True))
    for images, labels in zip((train, val), DigitsData().load_labels(), strict=True):
        assert [by_image[bytes(image.numpy())] for image in images] == labels.tolist()
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as scikit-learn's description says


def test_gray_values_are_the_sixteenths_of_the_source():
    levels = {round(v * 255 / 16) for v in range(17)}
    assert set(torch.cat(load_digits()).unique().tolist()) == levels


def test_data_module():
    data = DigitsData(batch_size=10)
    data.setup()
    assert (data.channels, data.image_size, data.flip) == (1, 8, False)
    assert next(iter(data.train_dataloader())).shape == (10, 1, 8, 8)
    assert data.fingerprint() == "0598553df6af6eb66e217f89758a0339676ddb5b344e275572197aaac236b130"


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"data\.batch_size=0"):
        DigitsData(batch_size=0)
    with pytest.raises(TypeError, match="color"):
        DigitsData(color=True)
