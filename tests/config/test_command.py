"""What a command does around its task: help, folders, resuming, sweeps, Ctrl-C."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qdm_lightning.cli import app as cli
from qdm_lightning.cli.build import plain, run_folder, stored, validate
from qdm_lightning.cli.help import COMMANDS, defaults, options, overview
from qdm_lightning.cli.schema import CONF_DIR, run_name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv: str, task=None) -> list[tuple[dict, Path]]:
    """Run the command in this process; returns (settings, run folder) of each job."""
    jobs = []

    def keep(cfg):
        jobs.append((plain(cfg), run_folder(cfg)))

    cli.run("train", task or keep, check=validate, examples=[("quant=w3a3", "fewer bits")], argv=argv)
    return jobs


def test_a_job_gets_its_settings_and_a_folder_of_its_own(folder):
    [(first, one)], [(_, other)] = run("quant=w3a3", "seed=7"), run("quant=w3a3", "seed=7")
    assert (first["quant"]["weight_bits"], first["seed"]) == (3, 7)
    assert one.parent == folder / "outputs"
    assert one.name.endswith("_w3a3_normalize_replace_ddim50_seed7")
    assert one != other
    assert (one / ".hydra" / "overrides.yaml").is_file()


def test_flags_and_overrides_may_come_in_any_order(folder):
    (folder / "mine").mkdir()
    [(settings, _)] = run("seed=1", "--config-dir", "mine", "quant=w3a3")
    assert (settings["seed"], settings["quant"]["weight_bits"]) == (1, 3)


def test_tilde_in_paths_output_is_the_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert run("paths.output=~/runs")[0][1].parent == folder / "home" / "runs"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "w4a4_normalize_replace_ddim50_seed0"),
        (("quant.act_bits=6", "taq=ema", "nem=off", "sampler=ddpm", "seed=2"), "w4a6_ema_off_ddpm1000_seed2"),
        (("taq=off",), "w4a4_off_replace_ddim50_seed0"),
        (("taq._target_=my.own.Quantizer",), "w4a4_Quantizer_replace_ddim50_seed0"),
        (("quant.mode=ptq",), "w4a4_normalize_ptq_ddim50_seed0"),
        (("nem=on_policy",), "w4a4_normalize_on_policy_ddim50_seed0"),
        (("quant=fp32",), "fp32_ddim50_seed0"),
    ],
)
def test_names_say_what_a_run_does(overrides, name, composed):
    assert run_name(composed(*overrides)) == name


def test_a_sweep_has_a_named_folder_for_each_job(folder):
    jobs = run("-m", "quant=w4a4,w3a3", "seed=0,1")
    names = [path.name.rpartition("_")[0] for _, path in jobs]
    assert names == [f"w{b}a{b}_normalize_replace_ddim50_seed{s}" for b, s in [(4, 0), (4, 1), (3, 0), (3, 1)]]
    assert len({path.name for _, path in jobs}) == 4
    assert len({path.parent for _, path in jobs}) == 1


def test_a_bad_job_of_a_sweep_does_not_stop_the_others(folder, capsys):
    seen = []

    def task(cfg):
        seen.append(cfg.seed)
        if cfg.seed == 0:
            raise cli.UserError("no such picture")

    with pytest.raises(SystemExit, match="2"):
        run("-m", "seed=0,1", task=task)
    assert seen == [0, 1]
    assert capsys.readouterr().err.endswith("error: no such picture\n")


def leave_a_run(folder: Path, composed, *overrides: str) -> Path:
    OmegaConf.save(composed(*overrides), folder / "config.yaml", resolve=True)
    return folder


def test_run_goes_on_in_its_folder_with_its_own_settings(folder, composed):
    left = leave_a_run(folder, composed, "quant=w3a3", "seed=5", "taq=off")
    before = (left / "config.yaml").read_bytes()
    [(settings, where)] = run(f"run={left}")
    assert where == left
    assert settings == plain(composed("quant=w3a3", "seed=5", "taq=off")) | {"run": str(left)}
    assert (left / "config.yaml").read_bytes() == before
    assert not (left / ".hydra").exists()


def test_a_folder_with_odd_characters(tmp_path, monkeypatch, composed):
    odd = tmp_path / "it's [one], a=b {c}"
    odd.mkdir()
    monkeypatch.chdir(odd)
    leave_a_run(odd, composed)
    assert run("run=.")[0][1] == odd


def test_the_logger_may_change_on_the_way(folder, composed):
    leave_a_run(folder, composed, "seed=5")
    [(settings, _)] = run("run=.", "logger=none")
    assert (settings["logger"], settings["seed"]) == ({}, 5)


def test_a_stored_run_may_not_bring_code(folder, composed, capsys):
    leave_a_run(folder, composed, "quant.act_quantizer._target_=os.system")
    with pytest.raises(SystemExit, match="2"):
        run("run=.")
    assert "would run os.system (quant.act_quantizer._target_)" in capsys.readouterr().err


def test_code_of_the_users_own_is_trusted_by_name_or_folder(folder, composed):
    leave_a_run(folder, composed, "quant.act_quantizer._target_=my.own.Quantizer")
    assert run("run=.", "quant.act_quantizer._target_=my.own.Quantizer")[0][0]["quant"]["act_quantizer"] == {
        "_target_": "my.own.Quantizer"
    }
    mine = folder / "mine" / "quant"
    mine.mkdir(parents=True)
    (mine / "own.yaml").write_text("act_quantizer:\n  _target_: my.own.Quantizer\n")
    assert len(run("run=.", f"--config-dir={folder / 'mine'}")) == 1


def test_options_of_the_users_own_folder(folder, capsys):
    mine = folder / "mine" / "taq"
    mine.mkdir(parents=True)
    (mine / "own.yaml").write_text("# Mine.\n_target_: my.own.Quantizer\nwidth: 3\n")
    [(settings, _)] = run(f"--config-dir={folder / 'mine'}", "taq=own", "taq.width=4")
    assert settings["taq"] == {"_target_": "my.own.Quantizer", "width": 4}
    run(f"--config-dir={folder / 'mine'}", "--help")
    assert "own        Mine." in capsys.readouterr().out


@pytest.mark.parametrize("by_lightning", [False, True])
def test_ctrl_c_says_how_to_go_on(by_lightning, folder, capsys):
    def task(cfg):
        (run_folder(cfg) / "config.yaml").touch()
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if by_lightning:
                sys.exit(1)
            raise

    with pytest.raises(SystemExit, match="130"):
        run(task=task)
    [left] = (folder / "outputs").iterdir()
    assert capsys.readouterr().err == f"interrupted; to go on: python -m qdm_lightning.train run={left}\n"


def test_help_lists_every_group_and_option(capsys):
    run("--help")
    out = capsys.readouterr().out
    for group in defaults("train"):
        for option in options(group) if group != "hydra" else ():
            assert f"{option.name} " in out
            assert option.line.split(":")[0][:40] in " ".join(out.split())
    assert "* w4a4" in out
    assert "quant=w3a3  fewer bits" in out


def test_cfg_job_prints_and_writes_nothing(folder, capsys):
    run("--cfg", "job", "seed=3", "data=images")  # data.path is missing still: printing is no run
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
    package = Path(cli.__file__).parent
    runnable = {f.stem for f in package.glob("*.py") if '__name__ == "__main__"' in f.read_text("utf-8")} - {"__main__"}
    assert runnable == set(COMMANDS)
    text = overview()
    for file in (CONF_DIR / "experiment").rglob("*.yaml"):
        name = file.relative_to(CONF_DIR / "experiment").with_suffix("").as_posix()
        [line] = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 3, f"{file} needs a comment that says what it is"
