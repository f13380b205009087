"""Two processes train one job: teacher (not cached) and student, one folder, one set of results."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from qdm_lightning.training.checkpoint_io import load_checkpoint


def arguments(tmp_path: Path) -> list[str]:
    return (
        "trainer=cpu model.block_out_channels=[8,16] model.norm_num_groups=4 data.batch_size=16 "
        "teacher.max_steps=4 trainer.max_steps=4 trainer.val_every=2 trainer.compile=off trainer.threads=1 "
        f"quant.calibration_batches=2 sampler.steps=2 num_samples=16 logger=none paths.cache={tmp_path / 'cache'} "
        f"paths.output={tmp_path / 'runs'}"
    ).split()


def test_two_processes_train_one_run(tmp_path):
    command = [sys.executable, "-m", "qdm_lightning.train", "trainer.devices=2", *arguments(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["student"]["steps"] == 4
    assert metrics["teacher_origin"]["trained_now"]
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,")


def test_two_nodes_train_one_run(tmp_path):
    """Two processes that were started apart, on loopback: each believes to be alone on its node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "qdm_lightning.train",
        "trainer.num_nodes=2",
        *arguments(tmp_path),
        "teacher.retrain=true",
        f"hydra.run.dir={folder}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, "NODE_RANK": str(node)}
        )
        for node in (1, 0)
    ]
    (other, err), (first, first_err) = (node.communicate(timeout=240) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], err[-3000:] + first_err[-3000:]
    assert (other, "student: 4/4" in first) == ("", True)
    assert "MEMBER: 1/2" in first_err
    assert "MEMBER: 2/2" in err
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["student"]["steps"] == 4
    assert metrics["teacher_origin"]["trained_now"]
    assert not (tmp_path / "runs").exists()


def test_a_signal_to_one_process_ends_both_with_every_step_in_the_checkpoint(tmp_path):
    folder = tmp_path / "run"
    typed = [
        *arguments(tmp_path),
        "trainer.devices=2",
        "trainer.max_steps=100000",
        "trainer.log_every=1",
        f"hydra.run.dir={folder}",
    ]
    command = [sys.executable, "-m", "qdm_lightning.train", *typed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        end = time.monotonic() + 240
        while not (folder / "checkpoints" / "last.ckpt").is_file() and first.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        (other,) = psutil.Process(first.pid).children()
        other.terminate()
        err = first.communicate(timeout=120)[1]
        assert first.returncode == 143, err[-3000:]
        assert err.splitlines()[-1].startswith(f"interrupted; to go on: python -m qdm_lightning.train logger=none run={folder}")
        psutil.wait_procs([other], timeout=30)
        assert not other.is_running()
    finally:
        first.kill()
    steps = load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"]
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(steps))
