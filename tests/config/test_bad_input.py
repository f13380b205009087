"""Bad input: one line that says what is allowed, exit status 2, no traceback, nothing written."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import bad_input
import pytest
from bad_input_table import TABLE

from qdm_lightning.base.checks import UserError, writable
from qdm_lightning.cli import build as building
from qdm_lightning.cli import training
from qdm_lightning.cli.help import COMMANDS
from qdm_lightning.cli.schema import plain
from qdm_lightning.runs.folder import write_config

EVERY = 25
"""Of the whole table, which `make test-faults` tries, every 25th is tried here."""


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """What came out of each case, by what was typed; all of them are typed in forked children of one process."""
    keep = tmp_path_factory.mktemp("faults")
    command = [sys.executable, bad_input.__file__, "--every", str(EVERY), "--keep", str(keep)]
    subprocess.run(command, check=True, capture_output=True)
    records = map(json.loads, (keep / "bad_input.jsonl").read_text().splitlines())
    return {record["id"]: record for record in records}


@pytest.mark.parametrize("typed", [*bad_input.cases()][::EVERY])
def test_one_line_and_nothing_written(typed, tried):
    assert tried[typed]["fault"] == "", tried[typed]["err"]


def test_the_table_is_whole():
    """250 cases at least, over every command, each with what its line must say."""
    cases = [(command, words, said) for command, inputs in TABLE.items() for words, said in inputs.items()]
    assert len(cases) >= 250
    assert set(TABLE) == {*COMMANDS, "__main__"}
    assert all(said for _, _, said in cases)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(building, "accelerators", set)
    return tmp_path


@pytest.fixture
def refused(command_line, capsys, monkeypatch):
    """`refused(words, work=None)`: the one line that `train` answers; `work(experiment, progress)` stands for the training."""

    def refuse(words: list[str], work=None) -> str:
        monkeypatch.setattr(training, "_run", work or (lambda *_: pytest.fail("it began")))
        with pytest.raises(SystemExit) as end:
            command_line(training.Training("train", (), pytest.fail), *words)
        out, err = capsys.readouterr()
        assert end.value.code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return refuse


def test_beside_run_only_the_logger_may_be_given(folder, refused):
    (folder / "config.yaml").write_text("seed: 0\n")
    assert "seed=3 cannot be given with run=" in refused(["run=.", "seed=3"])
    assert "leave out -m" in refused(["-m", "run=."])


def test_bad_input_found_by_the_work_removes_its_folder(folder, refused):
    def work(experiment, progress):
        raise UserError("picture 3\nis damaged")

    assert "error: picture 3 is damaged" in refused([], work)
    assert list(folder.iterdir()) == []


def test_bad_input_found_by_the_work_leaves_what_others_wrote(folder, refused):
    def work(experiment, progress):
        Path("outputs/valuable").mkdir()
        raise UserError("no")

    refused([], work)
    assert [p.name for p in (folder / "outputs").iterdir()] == ["valuable"]


def test_a_folder_that_was_there_keeps_what_it_holds(folder, refused, composed):
    """Of another run: refused before anything is touched. Of this run: bad input found late takes nothing away."""

    def work(experiment, progress):
        raise UserError("no")

    mine = folder / "mine"
    write_config(mine, plain(composed("seed=1")))
    before = {path: path.read_bytes() for path in mine.rglob("*")}
    assert "holds a run with another configuration (seed=1, not 0)" in refused(["hydra.run.dir=mine"])
    assert "(quant.weight_bits=4, not 8)" in refused(["hydra.run.dir=mine", "seed=1", "quant=w8a8"])
    assert {path: path.read_bytes() for path in mine.rglob("*")} == before
    refused(["hydra.run.dir=mine", "seed=1"], work)
    assert (mine / "config.yaml").read_bytes() == before[mine / "config.yaml"]


@pytest.mark.parametrize("began", [False, True])
def test_what_cannot_be_written_is_one_line(folder, command_line, monkeypatch, capsys, began):
    """Before the first stage it is the user's choice, and nothing is left; after it the run stays, and how to go on is said."""

    def work(experiment, progress):
        write_config(experiment.run_dir, experiment.resolved)
        progress.started = began
        raise OSError(errno.ENOSPC, "No space left on device", "/full/last.ckpt")

    monkeypatch.setattr(training, "_run", work)
    with pytest.raises(SystemExit) as end:
        command_line(training.Training("train", (), pytest.fail), "hydra.run.dir=mine")
    err = capsys.readouterr().err
    assert err.startswith("error: /full/last.ckpt: No space left on device")
    assert err.count("\n") == 1
    assert end.value.code == (1 if began else 2)
    assert (folder / "mine" / "config.yaml").exists() == began
    assert (f"; to go on: python -m qdm_lightning.train run={folder / 'mine'}" in err) == began


def test_an_error_of_the_system_that_names_nothing_keeps_its_traceback(folder, command_line, monkeypatch):
    def work(experiment, progress):
        progress.started = True
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(training, "_run", work)
    with pytest.raises(OSError, match="Bad file"):
        command_line(training.Training("train", (), pytest.fail))


@pytest.mark.parametrize("setting", ["paths.output", "paths.cache", "hydra.run.dir"])
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no files")
def test_a_place_that_takes_no_files_is_named(setting, folder, refused):
    def work(experiment, progress):
        writable("paths.cache", Path(experiment.paths.cache))

    assert f"{'paths.cache=' if setting == 'paths.cache' else ''}/proc/none" in refused([f"{setting}=/proc/none"], work)
    assert list(folder.iterdir()) == []


def test_nodes_need_one_folder(folder, refused):
    assert "type hydra.run.dir=<folder>" in refused(["trainer.num_nodes=2", "trainer.devices=1"])
    assert list(folder.iterdir()) == []


def test_a_fault_of_ours_keeps_its_traceback(folder, command_line, monkeypatch):
    def work(experiment, progress):
        progress.started = True
        raise ValueError("in the middle of training")

    monkeypatch.setattr(training, "_run", work)
    with pytest.raises(ValueError, match="in the middle"):
        command_line(training.Training("train", (), pytest.fail))


@pytest.mark.parametrize("word", ["quant=w5", "+unknown=1"])
def test_as_a_command(word, tmp_path):
    ran = subprocess.run([sys.executable, "-m", "qdm_lightning.train", word], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
