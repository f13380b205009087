"""How `training/assets/teacher_digits` was made: `python experiments/embedded/teacher.py [folder]`, minutes on a CPU.

It is the teacher that `python -m qdm_lightning.train` would train on the digits, as the cache keeps it: a diffusers folder,
and `teacher.json` with its key, the settings behind it and what its training came to.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qdm_lightning.base.files import atomic_folder
from qdm_lightning.training.teacher import ASSETS

OVERRIDES = ("quant=fp32", "teacher.retrain=true", "logger=none", "num_samples=16", "sampler.steps=2")


def main(folder: Path, overrides: Sequence[str] = ()) -> None:
    """Train the teacher in a process of its own, and put it into `folder`, which is replaced whole or not at all."""
    with tempfile.TemporaryDirectory() as scratch:
        places = [f"paths.cache={scratch}/cache", f"paths.output={scratch}/runs"]
        subprocess.run([sys.executable, "-m", "qdm_lightning.train", *OVERRIDES, *places, *overrides], check=True)
        (trained,) = Path(scratch, "cache", "teachers").glob("*/teacher.json")
        with atomic_folder(folder) as new:
            shutil.copytree(trained.parent, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    print(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS / "teacher_digits")
