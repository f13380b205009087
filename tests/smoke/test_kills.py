"""The short form of `tests/faults/kills.py`: SIGKILL and SIGTERM in training and within a checkpoint, survived bit for bit."""

import subprocess
import sys
from pathlib import Path


def test_kills_are_survived(tmp_path):
    script = Path(__file__).parents[1] / "faults" / "kills.py"
    command = [
        sys.executable,
        script,
        "--count",
        "2",
        "--keep",
        tmp_path,
        "--moments",
        "training",
        "checkpoint",
        "--variants",
        "normalize",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "kills survived: 2 of 2"
