import os
import subprocess

import numpy as np
import pytest

from qdm_lightning.base import files
from qdm_lightning.base.checksums import checksum_file
from qdm_lightning.evaluation import chunks
from qdm_lightning.evaluation.chunks import ChunkFolder

SEEDS = [3, 5, 4]


@pytest.fixture
def folder(tmp_path):
    folder = ChunkFolder(tmp_path / "features", "key")
    folder.write(SEEDS, {"features": np.arange(6, dtype=np.float32).reshape(3, 2)}, {"seconds": 1.5})
    return folder


def test_what_was_written_is_read(folder):
    chunk = folder.read(SEEDS)
    np.testing.assert_array_equal(chunk.arrays["features"], [[0, 1], [2, 3], [4, 5]])
    assert chunk.arrays["features"].dtype == np.float32
    assert chunk.meta["seconds"] == 1.5
    assert folder.read([3, 4, 5]) is None
    assert [file.name for file in folder.path.glob("[!.]*")] == [folder.file(SEEDS).name]


def test_every_damaged_byte_and_every_cut_is_found_without_the_checksum_beside_it(folder):
    file = folder.file(SEEDS)
    checksum_file(file).unlink()
    whole = file.read_bytes()
    array = np.arange(6, dtype=np.float32).tobytes()
    start = whole.index(array)
    for position in [*range(start, start + len(array)), *range(0, len(whole) - 22, 61)]:
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            read = folder.read(SEEDS)
        except ValueError:
            continue
        # a byte of the zip's own book-keeping that says nothing about the contents
        assert position not in range(start, start + len(array))
        np.testing.assert_array_equal(read.arrays["features"], [[0, 1], [2, 3], [4, 5]])
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged"):
            folder.read(SEEDS)


def test_contents_with_a_valid_zip_but_another_checksum_key_or_seeds(folder):
    file = folder.file(SEEDS)
    checksum_file(file).unlink()
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for other in ({"features": arrays["features"] + 1}, {"meta": np.array('{"key": "key", "seconds": 9}')}):
        np.savez(file, **{**arrays, **other})
        with pytest.raises(ValueError, match="checksum"):
            folder.read(SEEDS)
    np.savez(file, **arrays)
    assert folder.read(SEEDS) is not None
    with pytest.raises(ValueError, match="is damaged"):
        ChunkFolder(folder.path, "another key").read(SEEDS)
    file.rename(folder.file([1, 2, 3]))
    with pytest.raises(ValueError, match="is damaged"):
        folder.read([1, 2, 3])


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(chunks.np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        folder.write([8, 9], {"features": np.zeros((2, 2))}, {})
    assert folder.read([8, 9]) is None
    assert len(list(folder.path.iterdir())) == 2  # that of the fixture, and its checksum
    with pytest.raises(ValueError, match="has 2 rows"):
        folder.write(SEEDS, {"features": np.zeros((2, 2))}, {})


def test_remains_of_processes_that_are_gone_are_swept(folder, monkeypatch):
    """A process of this machine is looked for; one of another has an hour."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    for process in (gone.pid, os.getpid()):
        (folder.path / f".a.npz.{files._host()}.{process}.tmp").write_bytes(b"half")
    (folder.path / f".a.npz.elsewhere.{gone.pid}.tmp").write_bytes(b"half")
    folder.sweep()
    left = {file.name.removeprefix(".a.npz.") for file in folder.path.glob(".*.tmp")}
    assert left == {f"{files._host()}.{os.getpid()}.tmp", f"elsewhere.{gone.pid}.tmp"}
    monkeypatch.setattr(files, "STALE", -1.0)
    monkeypatch.setattr(files.os, "kill", lambda process, number: (_ for _ in ()).throw(ProcessLookupError))
    folder.sweep()
    assert not list(folder.path.glob(".*.tmp"))
