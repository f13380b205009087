"""Two processes train one job: teacher (not cached) and student, one folder, one set of results."""

import json
import os
import subprocess
import sys


def test_two_processes_train_one_run(tmp_path):
    arguments = (
        "trainer=cpu trainer.devices=2 model.block_out_channels=[8,16] model.norm_num_groups=4 data.batch_size=16 "
        "teacher.max_steps=4 trainer.max_steps=4 trainer.val_every=2 trainer.compile=off trainer.threads=1 "
        f"quant.calibration_batches=2 sampler.steps=2 num_samples=16 logger=none paths.cache={tmp_path / 'cache'} "
        f"paths.output={tmp_path / 'runs'}"
    )
    command = [sys.executable, "-m", "qdm_lightning.train", *arguments.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["student"]["steps"] == 4
    assert metrics["teacher_origin"]["trained_now"]
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,")
