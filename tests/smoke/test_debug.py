"""`metrics=none` and the debug groups: each goes its whole way, and the record says what it is."""

import json

import pytest
import torch

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.build import build
from qdm_lightning.cli.compose import stored
from qdm_lightning.data.digits import DigitsData
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.train import train

TINY = "model.block_out_channels=[8,16] model.norm_num_groups=4 trainer.compile=off trainer.accelerator=cpu trainer.threads=1"


def run(composed, tmp_path, *words):
    places = [f"paths.cache={tmp_path / 'cache'}", f"paths.output={tmp_path / 'runs'}"]
    folder = train(composed(*TINY.split(), *places, *words), Progress("silent")).run_dir
    return folder, json.loads((folder / "metrics.json").read_text())


def test_fast_without_a_distance(composed, tmp_path):
    folder, record = run(composed, tmp_path, "metrics=none", "debug=fast")
    assert (record["trial"], record["floor"], record["teacher"]) == (True, {}, {})
    assert "floor_at_size" not in record
    assert record["unmeasured"].startswith("metrics=none: no distance is measured")
    assert not [name for name in record["student"] if name.startswith("fd_")]
    assert (folder / "samples.png").is_file()
    assert "fd_" not in (folder / "metrics.csv").read_text().splitlines()[0]
    with pytest.raises(UserError, match="metrics=none measures nothing: type the feature network"):
        evaluate(folder, [], Progress("silent"))
    assert "fd_digits" in evaluate(folder, ["metrics=digits"], Progress("silent")).record["scores"]


@pytest.mark.extras
def test_profile_leaves_a_trace(composed, tmp_path):
    words = ["debug=profile", "logger=none", "data.batch_size=4", "trainer.max_steps=4", "callbacks.profile.skip=1"]
    folder, record = run(composed, tmp_path, *words, "callbacks.profile.steps=1", "sampler.steps=2", "metrics=none")
    assert record["trial"]
    events = json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert "aten::convolution" in names
    assert "ProfilerStep#2" in names  # one is skipped, one thrown away
    assert "ProfilerStep#3" not in names
    assert "aten::" in (folder / "profile" / "operations.txt").read_text()
    stored(folder)  # the callback may stand there


def test_overfit_sees_a_handful_of_images_alone(composed, tmp_path):
    experiment = build(composed("debug=overfit", "logger=none", f"paths.output={tmp_path}"))
    experiment.load_data()
    whole = DigitsData()
    whole.setup()
    for images in (experiment.data.train_images, experiment.data.val_images):
        assert torch.equal(images, whole.train_images[:8])
    assert experiment.data.fingerprint() != whole.fingerprint()
