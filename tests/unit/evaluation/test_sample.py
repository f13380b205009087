import json
import random

import pytest
import torch
from PIL import Image

from qdm_lightning import draw_images, load_student
from qdm_lightning.base.checks import UserError
from qdm_lightning.base.files import data_hash
from qdm_lightning.diffusion.images import to_uint8
from qdm_lightning.diffusion.spec import SamplerConfig
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.evaluation import sample as pictures
from qdm_lightning.evaluation.chunks import ChunkFolder
from qdm_lightning.evaluation.sample import read_picture, save_picture
from qdm_lightning.sample import sample


def drawn(run, *overrides):
    return sample(run, overrides, Progress("silent"))


def pixels(folder):
    return {int(file.stem): read_picture(file)[0] for file in folder.glob("*.png") if file.stem.isdigit()}


@pytest.fixture(scope="module")
def together(tiny_run, tmp_path_factory):
    return drawn(tiny_run, "seeds=0-63", f"out={tmp_path_factory.mktemp('together')}")


def test_64_seeds_a_shuffled_subset_and_shards_give_equal_pixels(together, tiny_run, tmp_path):
    whole = pixels(together.folder)
    assert sorted(whole) == list(range(64))
    subset = random.Random(0).sample(range(64), 20)
    some = drawn(tiny_run, f"seeds={subset}".replace(" ", ""), f"out={tmp_path / 'subset'}")
    assert (some.drawn, some.present) == (20, 0)
    for shard in (2, 3, 1):
        assert drawn(tiny_run, "seeds=0-63", f"shard={shard}/3", f"out={tmp_path / 'shards'}").grid is None
    for folder, seeds in ((some.folder, subset), (tmp_path / "shards", range(64))):
        found = pixels(folder)
        assert sorted(found) == sorted(seeds)
        assert all(torch.equal(image, whole[seed]) for seed, image in found.items())
    assert len({image.numpy().tobytes() for image in whole.values()}) == 64
    again = drawn(tiny_run, "seeds=0-63", f"out={tmp_path / 'shards'}")
    assert (again.drawn, again.present, again.grid) == (0, 64, tmp_path / "shards" / "grid.png")
    assert again.grid.read_bytes() == together.grid.read_bytes()


def test_they_are_the_images_that_are_evaluated(together, run_copy):
    evaluate(run_copy, ["scores=fd"], Progress("silent"))
    (folder,) = run_copy.glob("evaluations/chunks/*")
    store = ChunkFolder(folder / "images", data_hash(json.loads((folder / "identity.json").read_text())))
    images = torch.from_numpy(store.read(list(range(64))).arrays["images"])
    assert all(torch.equal(image, images[seed]) for seed, image in pixels(together.folder).items())


def test_a_picture_tells_how_it_was_made(together, tiny_run):
    with Image.open(together.folder / "5.png") as picture:
        assert (picture.mode, picture.size) == ("L", (8, 8))
    record = read_picture(together.folder / "5.png")[1]
    assert (record["seed"], record["run"], record["network"], record["sampler"]["steps"]) == (5, tiny_run.name, "student", 4)
    assert len(record["checkpoint_sha256"]) == 64
    assert record["environment"]["threads"] == 1
    assert record["environment"]["fake_quantization"] == "eager"  # as it ran, not as it stood before


def test_color_pictures(tmp_path):
    image = torch.arange(27, dtype=torch.uint8).reshape(3, 3, 3)
    save_picture(tmp_path / "a.png", image, {"seed": 1})
    back, record = read_picture(tmp_path / "a.png")
    assert torch.equal(back, image)
    assert record == {"seed": 1}


def test_pictures_of_another_making_are_not_mixed(run_copy):
    first = drawn(run_copy, "seeds=0-3", "out=" + str(run_copy / "mine"))
    before = {file: file.read_bytes() for file in first.folder.iterdir()}
    for override in ("sampler.steps=3", "network=teacher", "weights=raw"):
        with pytest.raises(UserError, match=r"is a picture of another making .*type out=<another folder>"):
            drawn(run_copy, "seeds=3-6", override, f"out={first.folder}")
    assert {file: file.read_bytes() for file in first.folder.iterdir()} == before
    (first.folder / "2.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"2.png is damaged"):
        drawn(run_copy, "seeds=0-3", f"out={first.folder}")


def test_interrupted_and_started_again(run_copy, together, monkeypatch):
    save, left = pictures.save_picture, [21]

    def failing(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(pictures, "save_picture", failing)
    with pytest.raises(KeyboardInterrupt):
        drawn(run_copy, "seeds=0-63")
    monkeypatch.setattr(pictures, "save_picture", save)
    result = drawn(run_copy, "seeds=0-63")
    assert (result.drawn, result.present) == (44, 20)
    whole = pixels(together.folder)
    assert all(torch.equal(image, whole[seed]) for seed, image in pixels(result.folder).items())


def test_trajectories(run_copy, together):
    result = drawn(run_copy, "seeds=[9,4,7]", "trajectory=true", "trajectory_seeds=2")
    assert sorted(file.name for file in result.folder.glob("trajectory*")) == ["trajectory_4.png", "trajectory_9.png"]
    with Image.open(result.folder / "trajectory_9.png") as picture:
        assert picture.height > 4 * 64  # teacher and student, x_t and x_0


def test_a_sampler_of_diffusers_over_the_runs_own(tiny_run, tmp_path):
    """As `draw_images` draws with the student's files; the record says which sampler it was."""
    words = ["sampler=dpmsolver", "sampler.steps=4", "sampler.batch_size=4", "sampler.scheduler.solver_order=1"]
    folder = drawn(tiny_run, "seeds=0-3", *words, f"out={tmp_path / 'out'}").folder
    record = read_picture(folder / "0.png")[1]["sampler"]
    node = {"_target_": "diffusers.DPMSolverMultistepScheduler", "timestep_spacing": "trailing", "solver_order": 1}
    assert record == SamplerConfig(kind="diffusers", steps=4, batch_size=4, scheduler=node).settings()
    images = to_uint8(draw_images(load_student(tiny_run), range(4), SamplerConfig(**record)))
    assert all(torch.equal(image, images[seed]) for seed, image in pixels(folder).items())
