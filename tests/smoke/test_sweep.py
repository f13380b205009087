"""Sweeps as they are typed: jobs at once share a teacher, one that is killed goes on to the same result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.display.progress import Progress
from qdm_lightning.train import train
from qdm_lightning.training.checkpoint_io import load_checkpoint

TINY = [
    "model.block_out_channels=[8,16]",
    "model.norm_num_groups=4",
    "data.batch_size=16",
    "teacher.max_steps=4",
    "trainer.max_steps=4",
    "trainer.val_every=2",
    "trainer.compile=off",
    "trainer.accelerator=cpu",
    "quant.calibration_batches=2",
    "sampler.steps=2",
    "num_samples=16",
]

KILLER = """
import os, signal
from pathlib import Path
from lightning.pytorch import Callback

class KilledOnce(Callback):
    def __init__(self, marker):
        self.marker = Path(marker)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)
"""


def sweep(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    places = [f"paths.cache={folder / 'cache'}", f"hydra.sweep.dir={folder / 'sweep'}"]
    command = [sys.executable, "-m", "qdm_lightning.train", "-m", *TINY, *places, *overrides]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def job(folder: Path, seed: int) -> Path:
    (found,) = (folder / "sweep").glob(f"*_seed{seed}_*")
    return found


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_killed_job_stops_no_other_and_goes_on_to_the_same_result(tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    typed = ["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "trainer.threads=1", "logger=none"]
    typed += ["callbacks.killer._target_=killer.KilledOnce", f"callbacks.killer.marker={tmp_path / 'marker'}"]
    first = sweep(tmp_path, *typed)
    assert first.returncode == 1, first.stderr
    assert "1 of 2 jobs are done" in first.stdout
    (killed,) = (seed for seed in (0, 1) if not (job(tmp_path, seed) / "metrics.json").is_file())
    other = job(tmp_path, 1 - killed)
    assert f"failed: {job(tmp_path, killed).name}: killed by SIGKILL" in first.stderr
    logs = [(job(tmp_path, seed) / "output.log").read_text() for seed in (0, 1)]
    assert sorted("teacher: 4/4" in log for log in logs) == [False, True]
    before = (other / "metrics.json").read_bytes()

    again = sweep(tmp_path, *typed)
    assert again.returncode == 0, again.stderr
    assert f"skipped, it is there: {other.name}" in again.stdout
    assert (other / "metrics.json").read_bytes() == before
    resumed = metrics(job(tmp_path, killed))
    assert resumed["student"]["resumed_from"] == 2

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        places = [f"paths.cache={tmp_path / 'cache'}", f"paths.output={tmp_path / 'alone'}"]
        cfg = compose("train", [*TINY, *places, f"seed={killed}", "trainer.threads=1", "logger=none"])
    alone = train(cfg, Progress("silent"))
    for measure in ("fd_digits", "image_mse", "nem_error", "val_loss"):
        assert resumed["student"][measure] == alone.metrics["student"][measure]
    one, two = (load_checkpoint(f / "checkpoints" / "last.ckpt")["state_dict"] for f in (alone.run_dir, job(tmp_path, killed)))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_jobs_at_once_through_submitit_each_of_two_processes(tmp_path):
    """One teacher; one folder, one W&B run and own ports a job, also where the port of another job is in the environment."""
    typed = ["seed=0,1", "hydra/launcher=submitit_local", "trainer.devices=2", "trainer.strategy=ddp", "trainer.threads=1"]
    done = sweep(tmp_path, *typed, MASTER_PORT="29555", MASTER_ADDR="127.0.0.1")
    assert done.returncode == 0, done.stderr[-3000:]
    folders = [job(tmp_path, seed) for seed in (0, 1)]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {*(f.name for f in folders), ".submitit", "multirun.yaml"}
    found = [metrics(folder) for folder in folders]
    assert [run["student"]["steps"] for run in found] == [4, 4]
    assert sorted(run["teacher_origin"]["trained_now"] for run in found) == [False, True]
    for folder in folders:
        assert len(list(folder.glob("wandb/offline-run-*"))) == 1
        assert "MEMBER: 2/2" in (folder / "output.log").read_text()
    assert len({(folder / "wandb_id").read_text() for folder in folders}) == 2
