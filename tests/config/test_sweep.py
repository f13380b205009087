"""Sweeps without training: which jobs there are, what their folders are called, which of them run, what is said at the end."""

import json
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli import jobs
from qdm_lightning.cli import sweep as sweeping
from qdm_lightning.runs.folder import held


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """Instead of training: each job's command is kept, and it leaves its results, but for those that `statuses` lets fail."""
    commands, statuses = [], {}

    def run(command, environment, log):
        commands.append(command)
        where = Path(command[-1].removeprefix("run=")[1:-1].replace(r"\'", "'"))
        seed = OmegaConf.load(where / "config.yaml").seed
        if seed in statuses:
            if isinstance(statuses[seed], BaseException):
                raise statuses[seed]
            return statuses[seed]
        (where / "metrics.json").write_text(json.dumps({"seed": seed}))
        return 0

    monkeypatch.setattr(jobs, "_run", run)
    run.commands, run.statuses = commands, statuses
    return run


@pytest.fixture
def sweep(train):
    """`sweep(*words)`: `python -m qdm_lightning.train -m` with these words."""
    return lambda *words: train("-m", *words)


@pytest.fixture
def planned(sweep, monkeypatch):
    """`planned(*words)`: overrides and folder of each job that a command would run."""

    def plan(*words: str) -> list:
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(sweeping, "_train", lambda job, plans, launcher, master: seen.extend(plans))
            sweep(*words)
        return seen

    return plan


def cells(found) -> list[str]:
    """Folders' names without the seed and the hash."""
    return [job.folder.name.rpartition("_seed")[0] for job in found]


TAQ_NEM = [f"{t}_{n}" for t in ("off", "scale-all") for n in ("off", "replace")]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("taq_nem", [f"w{b}a{b}_{cell}_ddim50" for b in (4, 3, 2) for cell in TAQ_NEM]),
        ("taq_nem quant=w4a4 taq=off", ["w4a4_off_off_ddim50", "w4a4_off_replace_ddim50"]),
        ("bits", [f"w{w}a{a}_scale-all_replace_ddim50" for w, a in ((8, 8), (4, 8), (4, 4), (3, 3), (2, 2))]),
        ("samplers sampler=ddpm", [f"w4a4_scale-all_replace_ddpm{n}" for n in (10, 20, 50, 100)]),
        ("taq_variants", [f"w4a4_{t}_replace_ddim50" for t in ("off", "normalize", "ema", "scale-all")]),
        ("taq_variants taq=ema,scale taq.scope=all", ["w4a4_ema-all_replace_ddim50", "w4a4_scale-all_replace_ddim50"]),
    ],
)
def test_ablation(typed, expected, folder, planned):
    assert cells(planned(*f"experiment=ablation/{typed}".split())) == expected


def test_an_experiment_may_sweep_over_experiments(folder, planned):
    found = planned("experiment=ablation/quantizers", "quant=w3a3", "seed=1")
    labels = [job.folder.name.rpartition("_")[0].partition("seed1_")[2] for job in found]
    assert labels == ["ptq_minmax", "ptq_mse", "ptq_timestep_scales", "lsq", "lsq_taq", "lsq_nem", "qdm", "qdm_on_policy"]
    assert all("quant=w3a3" in job.overrides for job in found)
    assert all(f"experiment=quantizers/{label}" in job.overrides for label, job in zip(labels, found, strict=True))


def test_without_m_one_line_says_to_add_it(folder, capsys, train):
    with pytest.raises(SystemExit, match="2"):
        train("experiment=ablation/taq_nem")
    assert capsys.readouterr().err == "error: experiment=ablation/taq_nem is a sweep over quant, taq, nem: add -m to run it\n"
    assert list(folder.iterdir()) == []


def test_a_folder_is_named_by_the_settings_alone(folder, planned):
    wide = planned("experiment=ablation/taq_nem", "quant=w3a3", "nem=off", "seed=1", "sampler.steps=10,20")
    names = [job.folder.name for job in wide]
    assert len(set(names)) == len(names) == 4
    elsewhere = ("paths.cache=other", "logger=none", "trainer.threads=1", "hydra/launcher=joblib")
    narrow = planned("quant=w3a3", "nem=off", "taq=scale", "seed=1", "sampler.steps=20", *elsewhere)
    assert [job.folder.name for job in narrow] == [n for n in names if n.startswith("w3a3_scale-all_off_ddim20_seed1_")]
    changed = planned("quant=w3a3", "nem=off", "seed=1", "sampler.steps=20", "optimizer.lr=1e-4,1e-5")
    assert len({*names, *(job.folder.name for job in changed)}) == 6


def test_a_default_that_is_typed_renames_nothing(folder, planned):
    [plain] = planned("quant=w3a3", "seed=1")
    typed = planned("quant=w3a3", "seed=1", "trainer.log_every=10", "quant.first_last_bits=8", "optimizer.ema_decay=0.995")
    assert [job.folder.name for job in typed] == [plain.folder.name]
    earlier, now = planned("quant=w3a3", "seed=1", "taq=normalize,scale")
    assert now.folder.name == plain.folder.name
    assert earlier.folder.name == "w3a3_normalize_replace_ddim50_seed1_bab5b5"  # where a later version must find these results


def test_equal_jobs_are_refused_before_anything_starts(folder, capsys, trained, sweep):
    with pytest.raises(SystemExit, match="2"):
        sweep("quant=w4a4,w3a3", "quant.weight_bits=4", "quant.act_bits=4")
    assert "two jobs are the same run: (quant=w4a4 " in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_a_failed_job_does_not_stop_the_others_and_the_same_command_runs_it_alone(folder, capsys, trained, sweep):
    trained.statuses |= {0: -9, 1: 2}
    command = ["seed=0,1,2", "quant=w3a3", "hydra.sweep.dir=mine"]
    with pytest.raises(SystemExit, match="1"):
        sweep(*command)
    out, err = capsys.readouterr()
    assert len(trained.commands) == 3
    assert "1 of 3 jobs are done" in out
    first, second, how = err.splitlines()
    assert first.startswith("failed: w3a3_scale-all_replace_ddim50_seed0_")
    assert first.endswith(": killed by SIGKILL")
    assert second.endswith(": exit status 2, see above")
    assert how == "to run what is missing: python -m qdm_lightning.train -m seed=0,1,2 quant=w3a3 hydra.sweep.dir=mine"
    trained.statuses.clear()
    sweep(*command)
    assert [c[-1] for c in trained.commands[3:]] == [c[-1] for c in trained.commands[:2]]
    out = capsys.readouterr().out
    assert "skipped, it is there: w3a3_scale-all_replace_ddim50_seed2_" in out
    assert "3 of 3 jobs are done" in out
    sweep(*command)
    sweep("seed=2", *command[1:])
    assert len(trained.commands) == 5


def test_ctrl_c_says_how_to_go_on(folder, capsys, trained, sweep):
    trained.statuses[1] = KeyboardInterrupt()
    with pytest.raises(SystemExit, match="130"):
        sweep("seed=0,1,2")
    assert len(trained.commands) == 2
    (where,) = (folder / "outputs").iterdir()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"interrupted; to go on: python -m qdm_lightning.train -m seed=0,1,2 hydra.sweep.dir=outputs/{where.name}"


def test_a_folder_of_another_run_is_refused(folder, capsys, trained, sweep):
    sweep("seed=3", "hydra.sweep.dir=mine", "hydra.sweep.subdir=fixed")
    with pytest.raises(SystemExit, match="2"):
        sweep("seed=4", "hydra.sweep.dir=mine", "hydra.sweep.subdir=fixed")
    assert "fixed/config.yaml is of another run" in capsys.readouterr().err


def test_what_a_job_is_told(folder, trained, sweep):
    """Its own folder, trust in the code that the user typed, the user's own options; Hydra's and training's settings are in
    the folder."""
    (folder / "own").mkdir()
    callback = "callbacks.mine._target_=lightning.pytorch.callbacks.Timer"
    sweep("--config-dir", "own", "seed=1", r"hydra.sweep.dir='it\'s'", f"+{callback}", "logger=none")
    (command,) = trained.commands
    (job,) = (folder / "it's").glob("*/config.yaml")
    assert command[2:5] == ["qdm_lightning.train", "--config-dir", "own"]
    assert sorted(command[5:-1]) == [f"+{callback}", "logger=none"]
    assert command[-1] == f"run='{job.parent}'".replace("it's", r"it\'s")


def test_a_missing_launcher_names_what_installs_it(folder, capsys, monkeypatch, sweep, planned):
    planned("seed=1")  # Hydra has looked for its plugins now
    for name in ("joblib.yaml", "submitit_slurm.yaml"):
        monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], name)
    for name, package in (("joblib", "hydra-joblib-launcher"), ("slurm", "hydra-submitit-launcher")):
        with pytest.raises(SystemExit, match="2"):
            sweep("seed=1", f"hydra/launcher={name}")
        err = capsys.readouterr().err
        assert package in err
        assert err.endswith(": pip install 'qdm-lightning[sweeps]'\n")


def test_slurm_composes(folder, planned):
    assert len(planned("seed=0,1", "hydra/launcher=slurm", "hydra.launcher.partition=gpu")) == 2


@pytest.mark.parametrize(
    ("launcher", "count", "devices", "threads"),
    [
        ({"_target_": "x.BasicLauncher"}, 8, 1, 0),
        ({"_target_": "x.JoblibLauncher", "n_jobs": -1}, 36, 1, 1),
        ({"_target_": "x.JoblibLauncher", "n_jobs": -1}, 2, 1, 4),
        ({"_target_": "x.JoblibLauncher", "n_jobs": -5}, 36, 1, 2),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 2}, 36, 2, 2),
        ({"_target_": "x.LocalLauncher", "cpus_per_task": None}, 3, 1, 2),
        ({"_target_": "x.SlurmLauncher", "cpus_per_task": 6, "tasks_per_node": 1}, 36, 2, 3),
        ({"_target_": "x.SlurmLauncher", "cpus_per_task": 6, "tasks_per_node": 2}, 36, 2, 6),
    ],
)
def test_jobs_share_eight_cores(launcher, count, devices, threads, monkeypatch):
    monkeypatch.setattr(jobs, "cores", lambda: 8)
    settings = OmegaConf.create({"launcher": launcher, "sweeper": {"max_batch_size": None}})
    assert jobs._threads(settings, count, devices) == threads


def test_a_folder_belongs_to_one_process_at_a_time(folder, capsys):
    taken, release = threading.Event(), threading.Event()

    def hold():  # filelock refuses to wait for a lock of the same thread
        with FileLock(folder / ".lock"):
            taken.set()
            release.wait()

    other = threading.Thread(target=hold)
    other.start()
    taken.wait()
    with pytest.raises(UserError, match="is being trained by another process"), held(folder):
        pytest.fail("let in")
    threading.Timer(0.3, release.set).start()
    jobs._wait_for(folder)
    assert release.is_set()
    other.join()
    assert "waiting for the process that still runs" in capsys.readouterr().out
    with held(folder):
        pass


def test_what_is_left_of_a_sweep(tmp_path, monkeypatch):
    folders = [tmp_path / str(i) for i in range(7)]
    monkeypatch.setattr(jobs, "is_finished", lambda folder: folder in folders[:2])
    settings = OmegaConf.create(
        {"launcher": {"_target_": "x.JoblibLauncher", "n_jobs": 2}, "sweeper": {"max_batch_size": None}}
    )
    assert jobs._what_is_left(60.0, settings, folders) == "; 5 of 7 left, about 2:30 at this pace"
    assert jobs._what_is_left(60.0, settings, folders[:2]) == ""


def test_the_plan_of_a_sweep_counts_what_its_jobs_train_and_draw():
    def plan(mode, steps, images):
        cfg = OmegaConf.create({"trainer": {"max_steps": steps}, "quant": {"mode": mode}, "num_samples": images})
        return sweeping.Plan([], cfg, Path("x"))

    plans = [plan("qat", 1500, 1024), plan("qat", 600, 1024), plan("ptq", 600, 512)]
    assert sweeping._what_it_takes(plans) == "plan: 3 jobs, together 2,100 training steps and 2,560 images"
