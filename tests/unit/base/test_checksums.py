"""A file whose bytes are not those that were written is named; a kill at any moment leaves one that matches."""

import errno
import os
import pickle
import re
import subprocess
import threading

import pytest

from qdm_lightning.base import checksums
from qdm_lightning.base.checksums import checksum_file, remove_checked
from qdm_lightning.base.files import atomic_folder, atomic_path, read_text, reading, verify, write_whole


def test_the_checksum_is_one_that_sha256sum_checks(tmp_path):
    write_whole(tmp_path / "a", b"abc")
    write_whole(tmp_path / "a", b"abcd")
    assert len(checksum_file(tmp_path / "a").read_text().splitlines()) == 1
    subprocess.run(["sha256sum", "--check", "--strict", ".a.sha256"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_every_bit_and_every_cut_is_found(tmp_path):
    path, content = tmp_path / "a.txt", b"0123456789"
    write_whole(path, content)
    cuts = [content[:length] for length in range(len(content))] + [content + b"x", bytes(len(content))]
    bits = [content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :] for i in range(len(content)) for bit in range(8)]
    for damaged in cuts + bits:
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"a\.txt is damaged: its bytes are not those that were written .*; make it again$"
        ):
            read_text(path, "make it again")
    path.write_bytes(content)
    assert read_text(path) == "0123456789"


def test_what_was_changed_on_purpose_is_taken_when_the_checksum_is_removed(tmp_path):
    write_whole(tmp_path / "a", b"old")
    (tmp_path / "a").write_bytes(b"new")
    with pytest.raises(ValueError, match=r"remove \.a\.sha256 beside it"):
        verify(tmp_path / "a")
    checksum_file(tmp_path / "a").unlink()
    assert read_text(tmp_path / "a") == "new"


@pytest.mark.parametrize("content", [b"", b"\xff\n", b"none  a\n", None])
def test_a_damaged_checksum_lets_nothing_pass(tmp_path, content):
    write_whole(tmp_path / "a", b"x")
    checksum_file(tmp_path / "a").unlink()
    if content is None:
        checksum_file(tmp_path / "a").mkdir()
    else:
        checksum_file(tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="a is damaged"):
        verify(tmp_path / "a")


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="a is damaged: it is no file"):
        verify(tmp_path / "a")
    (tmp_path / "a" / "b").touch()
    remove_checked(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bare", [False, True])
def test_a_kill_at_any_moment_leaves_a_file_that_matches(tmp_path, monkeypatch, bare):
    """Each call of the system is the last one of a write, then of the next one too. `bare`: the first file has no checksum."""
    path, count = tmp_path / "a", [0]

    class Killed(BaseException):
        pass

    def counted(call):
        def stopped(*args, **options):
            count[0] -= 1
            if not count[0]:
                raise Killed
            return call(*args, **options)

        return stopped

    for name in ("replace", "write_text", "unlink"):
        monkeypatch.setattr(checksums.Path, name, counted(getattr(checksums.Path, name)))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    kills, survived = 0, False
    while not survived:
        kills += 1
        count[0] = 0
        write_whole(path, b"first")
        if bare:
            os.unlink(checksum_file(path))
        for content in (b"second", b"third"):
            count[0] = kills
            try:
                write_whole(path, content)
                survived = content == b"third"
            except Killed:
                pass
            count[0] = 0
            assert read_text(path) in ("first", "second", "third")
    assert kills > 5
    assert read_text(path) == "third"


def test_two_writers_and_readers_of_one_file(tmp_path):
    path, errors = tmp_path / "a", []
    write_whole(path, b"begin")

    def write(digit):
        for index in range(40):
            with atomic_path(path.with_name("a")) as temporary:  # threads share the process id, and so the temporary name
                temporary.write_bytes(f"{digit}{index}".encode())

    def read():
        for _ in range(200):
            try:
                read_text(path)
            except ValueError as error:
                errors.append(error)

    child = os.fork()
    if not child:
        write(1)
        os._exit(0)
    reader = threading.Thread(target=read)
    reader.start()
    write(2)
    reader.join()
    assert os.waitpid(child, 0)[1] == 0
    assert errors == []
    assert len(checksum_file(path).read_text().splitlines()) == 1


def test_each_file_of_a_folder_has_one(tmp_path):
    with atomic_folder(tmp_path / "a") as new:
        (new / "deep").mkdir()
        (new / "deep" / "x").write_text("x")
        write_whole(new / "y", b"y")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert names == ["a/.y.sha256", "a/deep/.x.sha256"]
    (tmp_path / "a" / "deep" / "x").write_text("z")
    with pytest.raises(ValueError, match="x is damaged"):
        verify(tmp_path / "a" / "deep" / "x")


class FromRust(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), FromRust("Error: I/O error: no space (os error 28)"), "torch"],
)
@pytest.mark.parametrize("writer", [atomic_path, atomic_folder])
def test_a_full_disk_names_the_file(tmp_path, writer, error):
    def write():
        with writer(tmp_path / "a"):
            if error == "torch":
                try:
                    raise OSError(errno.ENOSPC, "No space left on device")
                except OSError:
                    raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 as torch's writer ends
            raise error

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert not list(tmp_path.iterdir())


def test_advice_to_run_a_pickle_is_not_passed_on(tmp_path):
    (tmp_path / "a.ckpt").touch()
    error = pickle.UnpicklingError("Weights only load failed. \n(1) set `weights_only` to `False` ...\nsecond line")
    with (
        pytest.raises(ValueError, match=re.escape("a pickle can run code, and is not read")) as caught,
        reading(tmp_path / "a.ckpt"),
    ):
        raise error
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
