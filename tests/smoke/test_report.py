"""`report` as it is typed, on a run of ours."""

import csv
import json
import os
import shutil
import subprocess
import sys


def test_a_real_run_and_an_unfinished_one(run_copy, tmp_path):
    shutil.copytree(run_copy, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "metrics.json").unlink()
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "qdm_lightning.report", str(tmp_path), f"out={tmp_path / 'out'}"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert (tmp_path / "out" / "results.md").read_text("utf-8") in said
    assert f"* {tmp_path.name}/unfinished: no metrics.json; last step in metrics.csv: 9" in said
    rows = csv.DictReader((tmp_path / "out" / "results.csv").read_text("utf-8").splitlines())
    [row] = [row for row in rows if row["measure"] == "fd_digits"]
    student = json.loads((run_copy / "metrics.json").read_text())["student"]
    assert float(row["mean"]) == student["fd_digits"]
    assert int(row["bytes"]) == student["cost"]["bytes"]
    assert "data:image/png;base64," in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_neither_torch_nor_hydra_is_loaded():
    code = (
        "import qdm_lightning.report, qdm_lightning.reporting.write, sys; "
        "sys.exit(bool({'torch', 'lightning', 'wandb', 'hydra', 'omegaconf'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
