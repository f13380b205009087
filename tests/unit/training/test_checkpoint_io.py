"""Checkpoints are data, and those of a run."""

import pickle

import pytest
import torch

from qdm_lightning.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint


def test_checkpoints_come_back(tmp_path):
    path = tmp_path / "deep" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.arange(3)}, "global_step": 1}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["x"], torch.arange(3))
    assert loaded["global_step"] == 1
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not list(path.parent.iterdir())


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_checkpoint_with_code_is_refused_and_no_advice_is_passed_on(tmp_path, writer):
    writer({"x": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt is damaged: .*a pickle can run code, and is not read") as caught:
        load_checkpoint(tmp_path / "evil.ckpt")
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds a list"),
        (torch.ones(2), "it holds a Tensor"),
        ({"model": {}}, "it has no state_dict"),
        ({"state_dict": {}}, "it has no global_step"),
        ({"state_dict": [], "global_step": 1}, "it has no state_dict"),
    ],
)
def test_what_is_no_checkpoint_of_a_run_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"a\.ckpt is no checkpoint of a run: {message}"):
        load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("damage", [lambda b: b[:900], lambda b: b"", lambda b: bytes(len(b)), lambda b: b"text"])
def test_a_damaged_checkpoint_without_a_checksum_and_a_missing_one(tmp_path, damage):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"x": torch.ones(1000)}, "global_step": 1}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged: .*cannot be read") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt"):
        load_checkpoint(tmp_path / "none.ckpt")
