"""Checkpoints are data, and those of a run."""

import pickle
import resource

import pytest
import torch
from safetensors.torch import save_file

from qdm_lightning.base.files import atomic_folder, atomic_path
from qdm_lightning.data.cache import cached
from qdm_lightning.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint


def test_checkpoints_come_back(tmp_path):
    path = tmp_path / "deep" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"x": torch.arange(3)}, "global_step": 1}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["x"], torch.arange(3))
    assert loaded["global_step"] == 1
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("format", ["checkpoint", "safetensors", "folder", "array"])
def test_a_full_disk_is_told_and_what_was_there_stays(tmp_path, format):
    """As far as a process may test it: files that may not grow beyond 10,000 bytes."""
    path, weights = tmp_path / "a", {"x": torch.ones(5000)}

    def write(content):
        if format == "checkpoint":
            AtomicCheckpointIO().save_checkpoint({"state_dict": content, "global_step": 1}, path)
        elif format == "array":
            cached(str(tmp_path), "a", (len(content["x"]), 1, 1, 1), [content["x"].byte().numpy().reshape(-1, 1, 1, 1)])
        else:
            with atomic_path(path) if format == "safetensors" else atomic_folder(path) as place:
                save_file(content, place if format == "safetensors" else place / "b")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if format != "array":
        write({"x": torch.ones(2)})
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write({"x": torch.ones(20_000)} if format == "array" else weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path) + (".npy" if format == "array" else "")
    left = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"}
    assert left == before


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
