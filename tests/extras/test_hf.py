"""`data=hf`: the same pictures as files, as parquet and as a data set of `datasets` give the same pixels as `data=images`."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from qdm_lightning.cli.compose import stored
from qdm_lightning.data.hf import HFData
from qdm_lightning.data.images import ImagesData
from qdm_lightning.display.progress import Progress
from qdm_lightning.train import train

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
COUNT = 12


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same pictures as a folder of files, a .parquet file, a folder of parquet files, and what `save_to_disk` leaves."""
    root = tmp_path_factory.mktemp("hf")
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    (root / "files").mkdir()
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 255, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "files" / f"{index:03}.png")
    files = [{"bytes": (root / "files" / f"{index:03}.png").read_bytes(), "path": None} for index in range(COUNT)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": files, "label": list(range(COUNT))}, features=features)
    table.to_parquet(root / "one.parquet")
    (root / "several").mkdir()
    table.select(range(5)).to_parquet(root / "several" / "train-00000-of-00002.parquet")
    table.select(range(5, COUNT)).to_parquet(root / "several" / "train-00001-of-00002.parquet")
    table.save_to_disk(root / "saved")
    datasets.DatasetDict({"train": table, "test": table.select(range(6))}).save_to_disk(root / "splits")
    features["mask"] = datasets.Image()
    datasets.Dataset.from_dict(
        {"image": files, "mask": files[::-1], "label": list(range(COUNT))}, features=features
    ).to_parquet(root / "two.parquet")
    datasets.Dataset.from_dict({"label": list(range(COUNT))}).to_parquet(root / "none.parquet")
    return root


def loaded(kind, path, **options):
    data = kind(path=str(path), image_size=8, val_fraction=0.25, **options)
    data.setup()
    return data


@pytest.mark.parametrize("form", ["files", "one.parquet", "several", "saved", "splits"])
def test_every_form_gives_the_pixels_of_the_files(places, form):
    expected, found = loaded(ImagesData, places / "files"), loaded(HFData, places / form)
    assert torch.equal(found.train_images, expected.train_images)
    assert torch.equal(found.val_images, expected.val_images)
    assert found.fingerprint() == expected.fingerprint()


def test_the_cache_is_of_these_pictures_and_settings(places, tmp_path):
    first = loaded(HFData, places / "one.parquet", cache=str(tmp_path))
    assert torch.equal(loaded(HFData, places / "saved", cache=str(tmp_path)).train_images, first.train_images)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    gray = loaded(HFData, places / "one.parquet", cache=str(tmp_path), channels=1)
    assert gray.train_images.shape == (9, 1, 8, 8)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_a_column_is_found_or_named(places):
    with pytest.raises(ValueError, match=r"has 2 columns of pictures \(image, mask\): type data.column="):
        loaded(HFData, places / "two.parquet")
    masks = loaded(HFData, places / "two.parquet", column="mask")
    assert not torch.equal(masks.train_images, loaded(HFData, places / "one.parquet").train_images)
    with pytest.raises(ValueError, match=r"has no columns of pictures \(label\)"):
        loaded(HFData, places / "none.parquet")
    with pytest.raises(ValueError, match=r"data.column=label holds .*int64.*, no pictures: .* has pictures in image"):
        loaded(HFData, places / "one.parquet", column="label")
    with pytest.raises(ValueError, match=r"data.column=picture is not there"):
        loaded(HFData, places / "one.parquet", column="picture")


def test_bad_sources_are_one_line(places, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there is no split val: type data.split=train or test"):
        loaded(HFData, places / "splits", split="val")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"data.path=.*broken.parquet cannot be read") as error:
        loaded(HFData, tmp_path / "broken.parquet")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"data.path=/not/there: nothing there"):
        HFData(path="/not/there")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"data.path=nobody/nothing cannot be had"):
        loaded(HFData, "nobody/nothing")


def test_a_picture_outside_the_data_set_is_not_read(places, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (9, 9)).save(secret)
    (tmp_path / "data").mkdir()
    rows = [{"bytes": None, "path": str(secret)}] * 6
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image(decode=False)}))
    import pyarrow.parquet

    pyarrow.parquet.write_table(table.data.table, tmp_path / "data" / "x.parquet")  # `datasets` itself would embed the bytes
    with pytest.raises(ValueError, match=r"names .*secret.png, which is no file of this data set"):
        loaded(HFData, tmp_path / "data" / "x.parquet")


def test_a_run_trains_on_it_and_measures_no_distance(places, tmp_path, composed):
    words = ["data=hf", f"data.path={places / 'one.parquet'}", "data.image_size=8", "data.channels=1", "data.batch_size=4"]
    words += ["debug=fast", "trainer.compile=off", "trainer.accelerator=cpu", f"paths.cache={tmp_path}"]
    words += ["model.block_out_channels=[8,16]", "model.norm_num_groups=4", f"paths.output={tmp_path / 'runs'}"]
    folder = train(composed(*words), Progress("silent")).run_dir
    record = json.loads((folder / "metrics.json").read_text())
    assert (record["floor"], record["teacher"], record["num_samples"]) == ({}, {}, 4)
    assert record["unmeasured"].startswith("metrics=none")
    assert json.loads((folder / "data.json").read_text())["shape"] == [1, 8, 8]
    assert stored(folder).data.path == str(places / "one.parquet")
