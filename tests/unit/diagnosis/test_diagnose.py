import json
import shutil

import pytest
from PIL import Image

from qdm_lightning.base.checks import UserError
from qdm_lightning.diagnose import diagnose
from qdm_lightning.diagnosis import diagnose as diagnosing
from qdm_lightning.diagnosis import gains
from qdm_lightning.display.progress import Progress

QUICK = ["num_images=8", "timesteps=3", "points=3"]


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    for module, name, value in (
        (gains, "SAMPLES", 40),
        (gains, "VALUES", 16),
        (gains, "SEARCH", gains.MSESearch(steps=2)),
        (diagnosing, "PROPAGATION_IMAGES", 2),
        (diagnosing, "PROPAGATION_POINTS", 3),
    ):
        monkeypatch.setattr(module, name, value)


def test_a_run_alone_and_beside_others(run_copy, tiny_run):
    alone = diagnose(run_copy, [*QUICK, "layers=['*.query','conv_in']"], Progress("silent"))
    (name,) = alone.record["runs"]
    found = alone.record["runs"][name]
    assert name == "run"
    assert "conv_in" in found["activations"]
    assert found["activations"]["conv_in"]["t"] == [0, 500, 999]
    error = found["error"]
    assert error["t"] == [750, 250, 0]
    assert (error["mse"][0], error["cosine"][0]) == (0, pytest.approx(1))
    metrics = json.loads((run_copy / "metrics.json").read_text())
    assert 0.2 < error["image_mse"] / metrics["student"]["image_mse"] < 5  # 8 of its 64 images
    assert json.loads((run_copy / "diagnosis" / "diagnosis.json").read_text()) == json.loads(json.dumps(alone.record))
    assert list(alone.pictures) == ["activations", "error", "gains", "propagation"]
    assert {gain["name"] for gain in alone.record["gains"]} >= {"conv_in", "mid_block.attentions.0.probabilities"}
    assert (run_copy / "diagnosis" / "gains.txt").read_text().startswith("input of ")
    assert "probabilities" in alone.gains
    assert list(alone.record["propagation"]["t"]) == [750, 250, 0]
    for path in alone.pictures.values():
        with Image.open(path) as picture:
            assert min(picture.size) > 300
    other = shutil.copytree(run_copy, run_copy.parent / "other")
    both = diagnose(run_copy, [*QUICK, f"against={other}", f"out={run_copy / 'both'}"], Progress("silent"))
    assert list(both.record["runs"]) == ["run", "other"]
    assert both.record["runs"]["other"]["error"] == both.record["runs"]["run"]["error"]


def test_a_teacher_errs_nowhere_and_says_where_its_student_would_gain(run_copy):
    result = diagnose(run_copy, [*QUICK, "network=teacher", "layers=mid_block*0.conv1"], Progress("silent"))
    assert list(result.pictures) == ["activations", "gains", "propagation"]
    (found,) = result.record["runs"].values()
    assert found["error"] is None
    assert list(found["activations"]) == ["mid_block.resnets.0.conv1"]


def test_pictures_go_to_wandb(run_copy):
    diagnose(run_copy, [*QUICK, "logger=wandb", "logger.mode=offline"], Progress("silent"))
    kept = [file.name for file in run_copy.rglob("wandb/**/media/images/**/*.png")]
    assert sum("activations" in name for name in kept) == 1
    assert sum("error" in name for name in kept) == 1
    assert sum("gains" in name for name in kept) == 1
    assert list(run_copy.rglob("wandb/**/media/table/**/*gains*.json"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layers=nothing", "the pattern 'nothing' matches no layer"),
        ("against=nowhere", "run=nowhere is not a folder"),
        ("nem=off", "nem=off belongs to training"),
    ],
)
def test_bad_input(override, message, run_copy):
    with pytest.raises((UserError, FileNotFoundError), match=message):
        diagnose(run_copy, [*QUICK, override], Progress("silent"))
    assert not (run_copy / "diagnosis").exists()
