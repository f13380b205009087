"""Bad input: one line that says what is allowed, exit status 2, no traceback, nothing written."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from qdm_lightning.base.checks import UserError, writable
from qdm_lightning.cli import build as building
from qdm_lightning.cli import training
from qdm_lightning.cli.schema import plain
from qdm_lightning.runs.folder import write_config

HERE = Path(__file__).parent

CASES = {
    # names
    "quant=w5": "quant=w5 is not an option: choose one of fp32, w2a2, w3a3, w4a4, w4a8, w8a8",
    "taq=normalised": "for example taq=normalize",
    "quant=5": "quant=5: a group takes the name of an option",
    "experiment=null": "experiment=null: a group takes the name of an option",
    "qunat=w4a4": "did you mean quant?",
    "sampler.step=5": "did you mean sampler.steps?",
    "quant.edge_bits=8": "quant.edge_bits is not a setting: it is called quant.first_last_bits",
    "sampler.micro_batch=8": "sampler.micro_batch is not a setting: it is called sampler.batch_size",
    "max_steps=5": "did you mean teacher.max_steps or trainer.max_steps?",
    "+unknown=1": "unknown is not a setting",
    "++unknown=1": "unknown is not a setting",
    "+taq.foo=1": "taq.foo is not a setting: taq has _target_, psi, scope",
    "+sampler.foo=1": "sampler.foo is not a setting",
    "quant@other=w4a4": "quant@other is not a group",
    "~taq": "taq is missing",
    # types and values
    "sampler.steps=abc": "sampler.steps=abc is not allowed: sampler.steps must be an integer",
    "seed=1.5": "seed must be an integer",
    "seed=null": "seed=null is not allowed: seed needs a value",
    "seed=-1": "seed=-1 is not allowed: it must lie in [0, 4294967295]",
    "seed=4294967296": "seed=4294967296 is not allowed: it must lie in [0, 4294967295]",
    "teacher.seed=4294967296": "teacher.seed=4294967296 is not allowed: it must lie in [0, 4294967295]",
    "sampler.steps=1": "sampler.steps=1 is not allowed: it must be at least 2",
    "trainer.devices=[1]": "trainer.devices must be int or str",
    "quant.weight_bits=9": "quant.weight_bits=9 is not allowed: choose one of 2, 3, 4, 5, 6, 7, 8, 32",
    "quant.rules={conv_in:9}": "quant.rules.conv_in=9 is not allowed",
    "num_samples=1": "num_samples=1 is not allowed",
    "sampler.steps=${nowhere}": "Interpolation key 'nowhere' not found",
    "logger.mode=sometimes": "choose one of offline, online",
    "taq.scope=everywhere": "choose one of attention, all",
    "data=images": "data.path=<folder",
    "data=images data.path=/does/not/exist": "data.path=/does/not/exist: nothing there",
    "teacher=checkpoint": "teacher.path=<folder>",
    "teacher=checkpoint teacher.path=/does/not/exist": "teacher.path=/does/not/exist: nothing there",
    "teacher=pretrained teacher.path=/does/not/exist": "/does/not/exist has no config.json",
    "metrics=custom": "metrics._target_=<package.module.Class>",
    "metrics._target_=no.such.Network": "metrics._target_ cannot be imported: Error loading 'no.such.Network'",
    "metrics._target_=torch.nn.Linear": "metrics: Linear.__init__() missing 2 required positional arguments",
    "quant.act_quantizer.nonsense=1": "quant.act_quantizer.nonsense is not an argument of",
    "callbacks.mine=3": "callbacks.mine needs a _target_",
    "paths.output=/dev/null/runs": "paths.output=/dev/null/runs is not allowed: /dev/null is a file",
    "paths.cache=/dev/null/x": "paths.cache=/dev/null/x is not allowed",
    "hydra.run.dir=/dev/null/x": "hydra.run.dir=/dev/null/x is not allowed",
    "-m seed=0,1 hydra.sweep.dir=/dev/null/x": "hydra.sweep.dir=/dev/null/x is not allowed",
    # combinations
    "sampler.steps=1001": "at most 1000",
    "taq=ema taq.groups=1001": "at most 1000",
    "model=unet_small": "the images are 8 pixels wide, the network takes 16: type model.sample_size=8 or another model=",
    "model.in_channels=3 model.out_channels=3": "the images have 1 channel(s), the network takes 3",
    "quant=fp32 taq=normalize": "type taq=off",
    "quant=fp32 nem=add": "type nem=off",
    "quant=fp32 quant.mode=ptq": "type quant.mode=qat",
    "quant=fp32 teacher=checkpoint teacher.path=/": "leave out teacher=checkpoint",
    "quant.mode=ptq nem=on_policy": "type nem=replace",
    "teacher=pretrained teacher.path=a/b model=unet_digits": "leave out the other model",
    "trainer.devices=3": "type a multiple of 3",
    "trainer=gpu": "type trainer=auto or trainer=cpu",
    # the command line itself
    "word": "'word' is not understood",
    "seed=(": "seed=(",
    "seed=1,2": "seed=1,2 gives several values: add -m",
    "--nonsense": "unrecognized arguments: --nonsense",
    "--cfg": "--cfg",
    "--config-name=nothing": "there is no nothing.yaml",
    "--config-dir=/does/not/exist": "--config-dir=/does/not/exist is not a folder",
    "--config-path=/": "--config-dir",
    "--experimental-rerun=x": "run=<folder of the run>",
    "run=/does/not/exist": "run=/does/not/exist is not a folder",
    "run=.": "run=. has no config.yaml",
    # every job of a sweep, before the first
    "-m seed=0,1 quant=w4a4,w5": "quant=w5 is not an option",
    "-m quant=w4a4,fp32 taq=off,normalize nem=off": "job 3 (quant=fp32 taq=normalize nem=off): a run with quant=fp32",
    "-m sampler.steps=10,2000": "job 1 (sampler.steps=2000)",
    "hydra.mode=MULTIRUN seed=0,-1": "job 1 (seed=-1)",
    "--cfg job quant=w5": "quant=w5 is not an option",
    "--cfg job +unknown=1": "unknown is not a setting",
}


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


@pytest.mark.parametrize("words", CASES)
def test_one_line_and_nothing_written(words, folder, refused):
    assert CASES[words] in refused(words.split())
    assert list(folder.iterdir()) == []


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
