"""The search by Optuna on the digits: trials are runs, values are theirs, and the same command goes on."""

import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]
SEARCH = Path(__file__).parents[2] / "experiments" / "optuna_digits" / "search.py"
TINY = (
    "model.block_out_channels=[8,16] model.norm_num_groups=4 trainer.compile=off trainer.accelerator=cpu trainer.threads=1 "
    "debug=fast num_samples=8"
)


def search(trials, folder, *words):
    command = [sys.executable, str(SEARCH), "--trials", str(trials), "--folder", str(folder), *TINY.split(), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_search_goes_on(tmp_path):
    words = [f"paths.cache={tmp_path / 'cache'}"]
    assert search(1, tmp_path / "study", *words).returncode == 0
    ran = search(2, tmp_path / "study", *words)
    assert ran.returncode == 0, ran.stderr
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}")
    for trial in study.trials:
        folder = tmp_path / "study" / f"trial_{trial.number:04}"
        assert trial.value == json.loads((folder / "metrics.json").read_text())["student"]["image_mse"]
    assert len(study.trials) == 2
    assert f"image_mse {study.best_value:.4g}" in ran.stdout
