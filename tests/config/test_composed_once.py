"""How often a process composes and builds: once for the check of each job, once in Hydra, and nothing is built twice."""

from collections import Counter

import pytest
from hydra.core.config_loader import ConfigLoader

from qdm_lightning.cli import compose, jobs, training
from qdm_lightning.cli.compose import stored
from qdm_lightning.runs import folder as run_folder


@pytest.fixture
def counted(monkeypatch):
    """Calls by name: `compose` (ours), `sweep` (a job, by Hydra's loader), `build`, `read` (a stored configuration)."""
    calls = Counter()

    def count(owner, attribute, name):
        original = getattr(owner, attribute)

        def counting(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, counting)

    [loader] = {kind for kind in ConfigLoader.__subclasses__() if kind.__module__.startswith("hydra.")}
    count(compose, "compose", "compose")
    count(loader, "load_sweep_config", "sweep")
    count(training, "build", "build")
    count(compose, "read_config", "read")
    return calls


def test_a_run(counted, command_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = []
    monkeypatch.setattr(training, "_run", lambda experiment, progress: built.append(experiment))
    command_line(training.Training("train", (), lambda *_: None), "logger=none")
    assert counted == {"compose": 1, "build": 1}
    [experiment] = built
    assert experiment.run_dir.parent == tmp_path / "outputs"


def test_a_run_that_goes_on_reads_its_folder_once(counted, command_line, tmp_path, monkeypatch, composed):
    monkeypatch.chdir(tmp_path)
    run_folder.write_config(tmp_path / "run", compose.OmegaConf.to_container(composed("logger=none"), resolve=True))
    monkeypatch.setattr(training, "_run", lambda experiment, progress: None)
    command_line(training.Training("train", (), lambda *_: None), "run=run")
    assert counted == {"compose": 1, "build": 1, "read": 1}
    assert stored("run").seed == 0


def test_a_sweep(counted, command_line, tmp_path, monkeypatch):
    """Its parent composes and builds once for each job; the jobs are processes of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "_run", lambda *_: 1)
    with pytest.raises(SystemExit, match="1"):
        command_line(training.Training("train", (), pytest.fail), "-m", "seed=0,1,2", "logger=none")
    assert counted == {"sweep": 3, "build": 3}
