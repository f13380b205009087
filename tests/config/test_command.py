"""What a command does around its task: help, folders, resuming, sweeps, Ctrl-C."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.compose import stored
from qdm_lightning.cli.help import COMMANDS, defaults, options, overview
from qdm_lightning.cli.schema import CONF_DIR, plain, run_name
from qdm_lightning.runs.folder import write_config
from qdm_lightning.train import show


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_gets_its_settings_and_a_folder_of_its_own(folder, train):
    [(first, one)], [(_, other)] = train("quant=w3a3", "seed=7"), train("quant=w3a3", "seed=7")
    assert (first["quant"]["weight_bits"], first["seed"]) == (3, 7)
    assert one.parent == folder / "outputs"
    assert one.name.endswith("_w3a3_scale-all_replace_ddim50_seed7")
    assert one != other
    assert not (one / ".hydra").exists()


def test_what_hydra_would_not_read_is_read(folder):
    """Flags between the overrides, and a home folder that the shell has left."""
    (folder / "mine").mkdir()
    code = "from qdm_lightning.cli import training; training.Training('train', [], print).main()"
    words = ["seed=1", "--config-dir", "mine", "paths.output=~/runs", "--cfg", "job"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env={**os.environ, "HOME": "/ours"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    settings = OmegaConf.create(ran.stdout)
    assert (settings.seed, settings.paths.output) == (1, "/ours/runs")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "w4a4_scale-all_replace_ddim50_seed0"),
        (("quant.act_bits=6", "taq=ema", "nem=off", "sampler=ddpm", "seed=2"), "w4a6_ema_off_ddpm1000_seed2"),
        (("taq=off",), "w4a4_off_replace_ddim50_seed0"),
        (("taq._target_=my.own.Quantizer",), "w4a4_Quantizer-all_replace_ddim50_seed0"),
        (("quant.mode=ptq",), "w4a4_scale-all_ptq_ddim50_seed0"),
        (("nem=on_policy",), "w4a4_scale-all_on_policy_ddim50_seed0"),
        (("quant=fp32",), "fp32_ddim50_seed0"),
    ],
)
def test_names_say_what_a_run_does(overrides, name, composed):
    assert run_name(composed(*overrides)) == name


def leave_a_run(folder: Path, composed, *overrides: str) -> Path:
    OmegaConf.save(composed(*overrides), folder / "config.yaml", resolve=True)
    return folder


def test_run_goes_on_in_its_folder_with_its_own_settings(folder, composed, train):
    left = leave_a_run(folder, composed, "quant=w3a3", "seed=5", "taq=off")
    before = (left / "config.yaml").read_bytes()
    [(settings, where)] = train(f"run={left}")
    assert where == left
    assert settings == plain(composed("quant=w3a3", "seed=5", "taq=off")) | {"run": str(left)}
    assert (left / "config.yaml").read_bytes() == before
    assert not (left / ".hydra").exists()


def test_a_folder_with_odd_characters(tmp_path, monkeypatch, composed, train):
    odd = tmp_path / "it's [one], a=b {c}"
    odd.mkdir()
    monkeypatch.chdir(odd)
    leave_a_run(odd, composed)
    assert train("run=.")[0][1] == odd


def test_the_logger_may_change_on_the_way(folder, composed, train):
    leave_a_run(folder, composed, "seed=5")
    [(settings, _)] = train("run=.", "logger=none")
    assert (settings["logger"], settings["seed"]) == ({}, 5)


def test_a_stored_run_may_not_bring_code(folder, composed, capsys, train):
    leave_a_run(folder, composed, "quant.act_quantizer._target_=os.system")
    with pytest.raises(SystemExit, match="2"):
        train("run=.")
    assert "would run os.system (quant.act_quantizer._target_)" in capsys.readouterr().err


def test_code_of_the_users_own_is_trusted_by_name_or_folder(folder, composed, train):
    leave_a_run(folder, composed, "taq=off", "quant.act_quantizer._target_=my.own.Quantizer")
    assert train("run=.", "quant.act_quantizer._target_=my.own.Quantizer")[0][0]["quant"]["act_quantizer"] == {
        "_target_": "my.own.Quantizer"
    }
    mine = folder / "mine" / "quant"
    mine.mkdir(parents=True)
    (mine / "own.yaml").write_text("act_quantizer:\n  _target_: my.own.Quantizer\n")
    assert len(train("run=.", f"--config-dir={folder / 'mine'}")) == 1


def test_options_of_the_users_own_folder(folder, capsys, train):
    mine = folder / "mine" / "taq"
    mine.mkdir(parents=True)
    (mine / "own.yaml").write_text("# Mine.\n_target_: my.own.Quantizer\nwidth: 3\n")
    [(settings, _)] = train(f"--config-dir={folder / 'mine'}", "taq=own", "taq.width=4")
    assert settings["taq"] == {"_target_": "my.own.Quantizer", "width": 4}
    train(f"--config-dir={folder / 'mine'}", "--help")
    assert "own        Mine." in capsys.readouterr().out


@pytest.mark.parametrize("by_lightning", [False, True])
def test_ctrl_c_says_how_to_go_on(by_lightning, folder, capsys, train):
    def work(experiment, progress):
        (experiment.run_dir / "config.yaml").touch()
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if by_lightning:
                sys.exit(1)
            raise

    with pytest.raises(SystemExit, match="130"):
        train(work=work)
    [left] = (folder / "outputs").iterdir()
    assert capsys.readouterr().err == f"interrupted; to go on: python -m qdm_lightning.train run={left}\n"


@pytest.mark.parametrize("trained", [True, False])
def test_what_was_trained_stays_when_the_run_ends_with_one_line(trained, folder, capsys, train):
    def work(experiment, progress):
        write_config(experiment.run_dir, experiment.resolved)
        if trained:
            (experiment.run_dir / "checkpoints").mkdir()
            (experiment.run_dir / "checkpoints" / "last.ckpt").write_text("kept")
        raise UserError("train/loss is nan")

    with pytest.raises(SystemExit, match="2"):
        train("hydra.run.dir=run", work=work)
    assert capsys.readouterr().err == "error: train/loss is nan\n"
    kept = {path.name for path in (folder / "run").glob("*")}
    assert kept == ({"train.log", "config.yaml", ".config.yaml.sha256", "checkpoints", ".lock"} if trained else set())
    assert (folder / "run").exists() == trained


@pytest.mark.parametrize("typed", ["hydra.run.dir=run", "run=run"])
def test_an_earlier_run_stays_whole_when_the_next_command_fails_early(typed, folder, composed, capsys, train):
    (folder / "run").mkdir()
    leave_a_run(folder / "run", composed)
    (folder / "run" / "metrics.json").write_text("kept")
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}

    def work(experiment, progress):
        raise UserError("data.path=pictures holds no pictures")

    with pytest.raises(SystemExit, match="2"):
        train(typed, work=work)
    assert capsys.readouterr().err == "error: data.path=pictures holds no pictures\n"
    assert before.items() <= {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}.items()


def test_help_lists_every_group_and_option(capsys, train):
    train("--help")
    out = capsys.readouterr().out
    for group in defaults("train"):
        for option in options(group) if group != "hydra" else ():
            assert f"{option.name} " in out
            assert option.line.split(":")[0][:40] in " ".join(out.split())
    assert "* w4a4" in out
    assert "quant=w3a3  fewer bits" in out


def test_cfg_job_prints_and_writes_nothing(folder, capsys, train):
    train("--cfg", "job", "seed=3", "data=images")  # data.path is missing still: printing is no run
    assert OmegaConf.create(capsys.readouterr().out).seed == 3
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("typed", [["--help"], ["--cfg", "job"]])
def test_quick_answers_import_no_torch(typed, tmp_path):
    code = f"""
import sys
from qdm_lightning.train import main
sys.argv = ["train", *{typed}]
main()
heavy = {{"torch", "lightning", "diffusers", "numpy", "wandb"}} & set(sys.modules)
assert not heavy, heavy
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_stored_needs_a_folder_of_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml"):
        stored(tmp_path)


def test_overview_is_complete():
    """Every module that can be run is a command, and every experiment, nested ones too, has its line."""
    package = CONF_DIR.parent / "src" / "qdm_lightning"
    runnable = {f.stem for f in package.glob("*.py") if '__name__ == "__main__"' in f.read_text("utf-8")} - {"__main__"}
    assert runnable == set(COMMANDS)
    text = overview()
    for file in (CONF_DIR / "experiment").rglob("*.yaml"):
        name = file.relative_to(CONF_DIR / "experiment").with_suffix("").as_posix()
        [line] = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 3, f"{file} needs a comment that says what it is"


@pytest.mark.parametrize("given", ["teacher=pretrained teacher.path", "model=pretrained model.path"])
def test_a_schedule_that_no_file_tells_must_be_typed(folder, train, capsys, given):
    """An average of weights that lies alone says nothing of the process it was trained on: the default would be a guess."""
    (folder / "unet_ema").mkdir()
    config = {"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1}
    (folder / "unet_ema" / "config.json").write_text(json.dumps(config))
    words = f"{given}=unet_ema".split()
    with pytest.raises(SystemExit) as end:
        train(*words)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "/unet_ema has no scheduler_config.json beside it" in line
    assert "type it, such as diffusion.num_train_timesteps=1000 diffusion.beta_start=0.0001" in line
    assert not (folder / "outputs").exists()
    [(settings, _)] = train(*words, "diffusion.beta_schedule=squaredcos_cap_v2")
    assert settings["diffusion"]["beta_schedule"] == "squaredcos_cap_v2"
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    assert len(train(*words)) == 1


@pytest.mark.parametrize("typed", ["hydra.run.dir=run", "run=run"])
def test_a_command_typed_while_a_run_is_under_way_touches_nothing(typed, folder, composed, capsys, train):
    (folder / "run").mkdir()
    leave_a_run(folder / "run", composed)
    before = {path: path.read_bytes() for path in (folder / "run").iterdir()}
    with FileLock(folder / "run" / ".lock"), pytest.raises(SystemExit, match="2"):
        train(typed)
    assert "is being trained by another process" in capsys.readouterr().err
    (folder / "run" / ".lock").unlink(missing_ok=True)
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*")} == before


def test_what_to_type_next_keeps_what_was_typed(tmp_path, capsys):
    def proposed(metrics: dict, *typed) -> list[str]:
        show(SimpleNamespace(metrics=metrics, run_dir=tmp_path), *typed)
        shown = [line.strip().split("  ")[0] for line in capsys.readouterr().out.splitlines()]
        return [line.removeprefix("python -m qdm_lightning.train ") for line in shown[shown.index("next:") + 1 :]]

    student, own = {"teacher": {}, "student": {"image_mse": 0.5}}, ["--config-dir=conf", "data.path=my pictures"]
    said = proposed(student, [*own, "quant=w4a4", "quant.probs_bits=4", "taq.groups=10", "nem/weighting=min_snr", "hydra.x=1"])
    assert said[:2] == [
        "--config-dir=conf 'data.path=my pictures' quant=w4a4 quant.probs_bits=4 taq=off nem=off",
        "--config-dir=conf 'data.path=my pictures' quant.probs_bits=4 taq.groups=10 nem/weighting=min_snr quant=w3a3",
    ]
    assert proposed(student, ["quant=w3a3", "taq=off", "nem=off"]) == ["--help"]
    assert proposed(student) == ["--help"]  # run=: what was typed then is not known
    teacher = proposed({"teacher": {}}, [*own, "model=unet_small", "quant=fp32", "trainer.max_steps=9"])
    assert teacher == [f"--config-dir=conf 'data.path=my pictures' model=unet_small teacher=checkpoint teacher.path={tmp_path}"]
