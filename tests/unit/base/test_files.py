"""Files are whole or absent, and errors of reading name them."""

import hashlib
import os

import pytest

from qdm_lightning.base import files
from qdm_lightning.base.files import (
    atomic_folder,
    atomic_path,
    data_hash,
    file_hash,
    read_json,
    reading,
    remove_leftovers,
    sha256,
    write_json,
)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    writing = atomic_path(path)
    writing.__enter__().write_text("half")
    with pytest.raises(RuntimeError):
        writing.gen.throw(RuntimeError())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    with atomic_folder(path) as folder:
        (folder / "old").touch()
    writing = atomic_folder(path)
    (writing.__enter__() / "new").touch()
    with pytest.raises(RuntimeError):
        writing.gen.throw(RuntimeError())
    assert sorted(p.name for p in path.iterdir()) == [".old.sha256", "old"]
    with atomic_folder(path) as folder:
        (folder / "new").touch()
    assert sorted(p.name for p in path.iterdir()) == [".new.sha256", "new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("writer", [atomic_path, atomic_folder])
def test_content_is_on_the_disk_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch, writer):
    path, events = tmp_path / "deep" / "a", []
    monkeypatch.setattr(
        files.os, "fsync", lambda handle: events.append((os.readlink(f"/proc/self/fd/{handle}"), path.exists()))
    )
    with writer(path) as temporary:
        file = temporary if writer is atomic_path else temporary / "b"
        file.write_text("x")
    assert (str(file), False) in events
    assert [before for name, before in events if ".sha256" in name] == [False]
    assert events[-1] == (str(path.parent), True)


def test_leftovers_of_one_file_alone_are_removed(tmp_path):
    for name in (".a.npz.12.tmp", ".a.npz2.12.tmp", "a.npz"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.npz2.12.tmp", "a.npz"]


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None, "\u00e9"]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, None, "\u00e9"]}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{", b"[" * 100_000])
def test_what_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is damaged: .+; make it again$") as caught:
        read_json(tmp_path / "a.json", "make it again")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")


def test_an_error_without_a_message_is_named_by_its_type(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=r"a is damaged: EOFError$"), reading(tmp_path / "a"):
        raise EOFError


def test_hashes_are_the_documented_ones(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == sha256(["a", b"bc"]) == hashlib.sha256(b"abc").hexdigest()
    assert data_hash({"b": [2], "a": 1}) == hashlib.sha256(b'{"a": 1, "b": [2]}').hexdigest()
