import json
import shutil

import pytest
import torch

from qdm_lightning import load_student
from qdm_lightning.evaluate import evaluate
from qdm_lightning.quantization.packing import packed_state
from qdm_lightning.quantization.timestep import timesteps
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.restore import restore, restore_student, restore_teacher
from qdm_lightning.training.student_files import WEIGHTS

CPU = torch.device("cpu")


def of(run):
    return evaluate.check(evaluate.compose(run))[0]


def test_the_averaged_student_is_the_one_that_the_run_saved(tiny_run):
    restored = restore_student(of(tiny_run), CPU)
    assert not restored.network.training
    assert not any(p.requires_grad for p in restored.network.parameters())
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        ours = restored.network(x, t)
        with timesteps(t):
            theirs = load_student(tiny_run)(x, t).sample
    assert torch.equal(ours, theirs)
    step = load_checkpoint(tiny_run / "checkpoints" / "best.ckpt")["global_step"]
    assert restored.origin["step"] == step


def test_raw_weights_are_the_optimizers(tiny_run):
    state = load_checkpoint(tiny_run / "checkpoints" / "last.ckpt")["state_dict"]
    raw = restore_student(of(tiny_run), CPU, weights="raw", checkpoint="last").network.state_dict()
    assert all(torch.equal(value, state[f"student.{name}"]) for name, value in raw.items())
    assert any(not torch.equal(value, state[f"ema.module.{name}"]) for name, value in raw.items())


def test_the_teacher(tiny_run):
    restored = restore_teacher(of(tiny_run), CPU)
    assert restored.origin["file"] == "teacher/unet/diffusion_pytorch_model.safetensors"
    assert not restored.network.training
    with pytest.raises(ValueError, match="leave out weights=raw"):
        restore(of(tiny_run), "teacher", "raw", "best", CPU)


def test_what_is_missing_or_does_not_fit(run_copy, tmp_path):
    found = of(run_copy)
    other = load_checkpoint(run_copy / "checkpoints" / "best.ckpt")
    name = next(n for n in other["state_dict"] if n.startswith("ema.module.unet.conv_in"))
    other["state_dict"].pop(name)
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt is no checkpoint of this network: .*conv_in\.weight"):
        restore_student(found, CPU, checkpoint=str(tmp_path / "other.ckpt"))
    (tmp_path / "broken.ckpt").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        restore_student(found, CPU, checkpoint=str(tmp_path / "broken.ckpt"))
    (run_copy / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"best.ckpt is not there.*qdm_lightning.train run=... goes on"):
        restore_student(found, CPU)
    shutil.rmtree(run_copy / "teacher")
    with pytest.raises(FileNotFoundError, match="has no teacher yet"):
        restore_teacher(found, CPU)


def test_a_calibrated_student_comes_from_its_folder(run_copy):
    found = of(run_copy)
    expected = restore_student(found, CPU)
    shutil.rmtree(run_copy / "checkpoints")
    found.quant.mode = "ptq"
    restored = restore_student(found, CPU)
    assert restored.origin["weights"] == "calibrated"
    one, two = packed_state(expected.network), packed_state(restored.network)
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    (run_copy / "student" / WEIGHTS).write_bytes(b"no")
    with pytest.raises(ValueError, match="is damaged"):
        restore_student(found, CPU)


def test_a_run_may_have_moved_and_its_teachers_source_may_be_gone(run_copy):
    config = (run_copy / "config.yaml").read_text()
    (run_copy / "config.yaml").write_text(config.replace("source: auto\n  path: null", "source: pretrained\n  path: /gone"))
    assert of(run_copy).teacher.path == str(run_copy / "teacher")
    assert json.loads((run_copy / "metrics.json").read_text())["teacher"]
