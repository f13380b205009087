"""Commands typed in this process."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qdm_lightning.cli import app, training
from qdm_lightning.cli.schema import plain
from qdm_lightning.cli.validate import validate


@pytest.fixture
def command_line(monkeypatch):
    """`command_line(command, *words)`: run an `app.Command` as if these words had been typed."""

    def run(command: app.Command, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [command.name, *words])
        command.main()

    return run


@pytest.fixture
def train(command_line, monkeypatch):
    """`train(*words, work=None)`: `python -m qdm_lightning.train` that builds and trains nothing.

    Returns (settings, run folder) of each job. `work(experiment, progress)` stands for the training.
    """

    def build(cfg):
        checked = {name: getattr(validate(cfg), name) for name in ("teacher", "diffusion")}
        return SimpleNamespace(resolved=plain(cfg), run_dir=None, resume=False, has_teacher=False, **checked)

    def run(*words: str, work=None) -> list[tuple[dict, Path]]:
        jobs = []

        def keep(experiment, progress):
            jobs.append((experiment.resolved, experiment.run_dir))
            return work(experiment, progress) if work else None

        with monkeypatch.context() as patch:
            patch.setattr(training, "build", build)
            patch.setattr(training, "_run", keep)
            command_line(training.Training("train", [("quant=w3a3", "fewer bits")], lambda *_: None), *words)
        return jobs

    return run
