"""execution=integer in the commands: other images of the same student, never mixed with the simulated ones."""

import json

import pytest
import torch

from qdm_lightning.base.checks import UserError
from qdm_lightning.diagnose import diagnose
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.evaluation.protocol import table
from qdm_lightning.evaluation.sample import read_picture
from qdm_lightning.quantization import timesteps
from qdm_lightning.reporting.collect import collect
from qdm_lightning.sample import sample
from qdm_lightning.training.student_files import load_student


def silent():
    return Progress("silent")  # of its own: one that has begun tells errors apart


def test_evaluations_of_both_executions_stand_apart(run_copy):
    records = {how: evaluate(run_copy, ["scores=fd", f"execution={how}"], silent()).record for how in ("simulated", "integer")}
    assert [record["execution"] for record in records.values()] == list(records)
    assert records["simulated"]["identity"] != records["integer"]["identity"]
    assert len(list(run_copy.glob("evaluations/chunks/*"))) == 2
    assert records["integer"]["scores"]["fd_digits"] == pytest.approx(records["simulated"]["scores"]["fd_digits"], rel=0.05)
    assert "integer" in str(list(table(list(records.values())).columns[1].cells)[1])
    results = [result for result in collect([run_copy]).results if "evaluations" in result.source]
    assert sorted(result.protocol.get("execution", "") for result in results) == ["", "integer"]


def test_a_picture_says_its_execution(tiny_run, tmp_path):
    own = sample(tiny_run, ["seeds=0-7", "execution=integer", f"out={tmp_path / 'integer'}"], silent())
    other = sample(tiny_run, ["seeds=0-7", f"out={tmp_path / 'simulated'}"], silent())
    (image, record), (expected, simulated) = (read_picture(folder.folder / "3.png") for folder in (own, other))
    assert (record["execution"], record["isa"] in ("amx", "vnni", "avx2", "other")) == ("integer", True)
    assert "execution" not in simulated
    assert (image.int() - expected.int()).abs().float().mean() < 4
    with pytest.raises(UserError, match=r"3.png is a picture of another making"):
        sample(tiny_run, ["seeds=3", f"out={tmp_path / 'integer'}"], silent())


def test_a_diagnosis_shows_the_error_of_the_integers(run_copy):
    options = ["num_images=4", "timesteps=2", "points=2", "layers=conv_in", "execution=integer"]
    record = diagnose(run_copy, options, silent()).record
    kept = json.loads((run_copy / "diagnosis" / "diagnosis.json").read_text())
    for runs in (record["runs"], kept["runs"]):
        assert next(iter(runs.values()))["execution"] == "integer"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network=teacher", "execution=integer is for a quantized network, the teacher has full precision"),
        ("execution=int8", "execution=int8 is not allowed"),
    ],
)
def test_bad_input(override, message, tiny_run):
    with pytest.raises(ValueError, match=message):
        sample(tiny_run, ["execution=integer", override], silent())


def test_integer_execution_is_for_the_cpu(tiny_run, monkeypatch):
    monkeypatch.setattr("qdm_lightning.evaluation.subject.measuring_device", lambda _: torch.device("cuda"))
    with pytest.raises(UserError, match="execution=integer runs on the CPU, not on cuda: type accelerator=cpu"):
        sample(tiny_run, ["execution=integer"], silent())


def test_load_student_on_integers(tiny_run):
    simulated, integer = load_student(tiny_run), load_student(tiny_run, execution="integer")
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 300, 600, 999])
    with torch.no_grad(), timesteps(t):
        expected, found = simulated(x, t).sample, integer(x, t).sample
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()
    with pytest.raises(ValueError, match="execution=float is not allowed"):
        load_student(tiny_run, execution="float")
