"""Jobs of a sweep at once over the same jobs one after the other, one thread each: whole commands, from start to end.

    python benchmarks/sweep.py [--rounds 3] [--jobs 2] [--steps 300] [--images 256]

The teacher and its images are cached before. The last line is one JSON object; `at_once_over_one_after_another` is the figure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from pairs import interleave, report

from qdm_lightning.cli.schema import cores


def command(scratch: Path, options: argparse.Namespace) -> list[str]:
    """The sweep of `options.jobs` seeds, without its launcher and folder."""
    return [
        *(sys.executable, "-m", "qdm_lightning.train", "-m", f"seed={','.join(map(str, range(options.jobs)))}"),
        *(f"trainer.max_steps={options.steps}", f"num_samples={options.images}", "trainer.threads=1", "trainer=cpu"),
        *("logger=none", f"teacher.max_steps={options.teacher_steps}", f"paths.cache={scratch / 'cache'}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--teacher-steps", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sweep = command(scratch, options)

        def run(*typed: str) -> Callable[[], None]:
            def once() -> None:
                folder = tempfile.mkdtemp(dir=scratch)
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run([*sweep, *typed, f"hydra.sweep.dir={folder}"], env=environment, capture_output=True)
                if done.returncode:
                    raise RuntimeError(done.stderr.decode()[-2000:])

            return once

        run("trainer.max_steps=1", "hydra/launcher=basic")()  # the teacher and its images, and the compiled kernels
        variants = {
            "one_after_another": run("hydra/launcher=basic"),
            "at_once": run("hydra/launcher=joblib", f"hydra.launcher.n_jobs={options.jobs}"),
        }
        pairs = interleave(variants, "one_after_another", options.rounds, 0)
    record = {"benchmark": "sweep", "jobs": options.jobs, "steps": options.steps, "images": options.images}
    report(pairs, "one_after_another", {**record, "cores": cores(), "torch": torch.__version__})


if __name__ == "__main__":
    main()
