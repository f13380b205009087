"""Training goes on from the last sound checkpoint, and a lost best one is not replaced by another."""

import pytest
import torch

from qdm_lightning.base.files import atomic_path
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.checkpoints import STATE
from qdm_lightning.training.resume import TRAINING, mend_best, resume_point


def checkpoint(path, step, best):
    content = {"state_dict": {"x": torch.ones(2)}, "global_step": step, **{name: [] for name in TRAINING}}
    with atomic_path(path) as temporary:
        torch.save({**content, "callbacks": {STATE: {"loss": 0.5, "step": best}}}, temporary)


def turn(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_last_one_is_taken(tmp_path):
    assert resume_point(tmp_path) is None
    checkpoint(tmp_path / "best.ckpt", 4, 4)
    assert resume_point(tmp_path) is None
    checkpoint(tmp_path / "last.ckpt", 6, 4)
    point = resume_point(tmp_path)
    assert (point.file.name, point.step, point.warning) == ("last.ckpt", 6, "")
    assert mend_best(tmp_path, point) == ""


def test_the_best_one_is_taken_where_the_last_is_damaged(tmp_path):
    checkpoint(tmp_path / "best.ckpt", 4, 4)
    checkpoint(tmp_path / "last.ckpt", 6, 4)
    turn(tmp_path / "last.ckpt")
    point = resume_point(tmp_path)
    assert (point.file.name, point.step) == ("best.ckpt", 4)
    assert "last.ckpt is damaged" in point.warning
    assert point.warning.endswith("training goes on from best.ckpt, of step 4")
    turn(tmp_path / "best.ckpt")
    with pytest.raises(
        ValueError, match=r"last\.ckpt is damaged: .*nor is best\.ckpt sound: remove .* to train from the start"
    ):
        resume_point(tmp_path)


def test_what_cannot_be_gone_on_from_is_no_checkpoint(tmp_path):
    torch.save({"state_dict": {}, "global_step": 1, "optimizer_states": []}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is no checkpoint to go on from: it has no lr_schedulers"):
        resume_point(tmp_path)


@pytest.mark.parametrize("gone", [True, False])
def test_a_best_one_is_made_again_from_the_same_and_from_no_other(tmp_path, gone):
    best = tmp_path / "best.ckpt"

    def damaged(step):
        checkpoint(best, step, step)
        checkpoint(tmp_path / "last.ckpt", 6, step)
        best.unlink() if gone else turn(best)
        return resume_point(tmp_path)

    assert "is made again from last.ckpt" in mend_best(tmp_path, damaged(6))
    assert load_checkpoint(best)["global_step"] == 6
    with pytest.raises(ValueError, match=r"best\.ckpt .*the best student is lost: remove .* checkpoint=last"):
        mend_best(tmp_path, damaged(4))
