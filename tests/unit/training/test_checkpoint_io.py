"""Checkpoints are data."""

import pickle

import pytest
import torch

from qdm_lightning.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint


def test_checkpoints_come_back(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3), "n": 1}, tmp_path / "deep" / "a.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "deep" / "a.ckpt")
    assert torch.equal(loaded["x"], torch.arange(3))
    assert loaded["n"] == 1


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_a_checkpoint_with_code_is_refused(tmp_path):
    torch.save({"x": Evil()}, tmp_path / "evil.ckpt", pickle_module=pickle)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "evil.ckpt")


def test_a_truncated_checkpoint_and_a_missing_one(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt"):
        load_checkpoint(tmp_path / "none.ckpt")
