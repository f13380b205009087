"""`logger=trackio` and `logger=mlflow`: the scalars of a run, read back by the libraries themselves."""

import importlib.util
import logging
import subprocess
import sys
from functools import partial

import pytest

from qdm_lightning.cli.validate import validate
from qdm_lightning.loggers import mlflow_logger, opened, trackio_logger

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]
CONFIG = {"seed": 3, "data": {"_target_": "x.Y", "batch_size": 4}, "tags": ["a"]}


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def log_twice(factory, folder):
    """A run, and the same run gone on with."""
    for first in (0, 2):
        with opened([factory], run_dir=folder, config=CONFIG) as [logger]:
            for step in range(first, first + 2):
                logger.log_metrics({"train/loss": 1.0 / (step + 1), "epoch": 0}, step)


@pytest.mark.skipif(not there("trackio"), reason="pip install 'qdm-lightning[trackio]'")
def test_trackio(tmp_path):
    """In a process of its own: Trackio reads TRACKIO_DIR when it is imported."""
    code = f"""
import os, pathlib, sys
os.environ["TRACKIO_DIR"] = {str(tmp_path / "trackio")!r}
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
from functools import partial
from test_trackers import log_twice
from qdm_lightning.loggers import trackio_logger
log_twice(partial(trackio_logger, project="p"), pathlib.Path({str(tmp_path / "run_a")!r}))
from trackio.sqlite_storage import SQLiteStorage
[name] = SQLiteStorage.get_runs("p")
rows = SQLiteStorage.get_logs("p", name)
assert name == "run_a", name
assert [(row["step"], row["train/loss"]) for row in rows] == [(k, 1.0 / (k + 1)) for k in range(4)], rows
config = SQLiteStorage.get_run_config("p", name)
assert config["seed"] == 3 and config["data"]["batch_size"] == 4, config
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""


@pytest.mark.skipif(not there("mlflow"), reason="pip install 'qdm-lightning[mlflow]'")
def test_mlflow(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "run_a"
    folder.mkdir()
    log_twice(partial(mlflow_logger, experiment="p"), folder)
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert run.info.run_id == (folder / "mlflow_run_id").read_text().strip()
    assert run.info.run_name == "run_a"
    assert run.data.params["data.batch_size"] == "4"
    found = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in found] == [(k, 1.0 / (k + 1)) for k in range(4)]


@pytest.mark.parametrize("option", ["trackio", "mlflow"])
def test_what_is_not_installed_is_named(option, composed, monkeypatch):
    monkeypatch.setattr("qdm_lightning.cli.logger_schema.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"logger={option} needs {option}: pip install 'qdm-lightning\[{option}\]'"):
        validate(composed(f"logger={option}"))


@pytest.mark.skipif(not there("trackio"), reason="pip install 'qdm-lightning[trackio]'")
def test_a_fault_of_trackio_is_a_warning(tmp_path, caplog):
    class Run:
        def log(self, *args, **kwargs):
            raise OSError("disk full")

        finish = log

    from qdm_lightning.loggers.trackio_run import TrackioRun

    with caplog.at_level(logging.WARNING, logger="qdm_lightning"):
        logger = TrackioRun(Run())
        logger.log_metrics({"x": 1.0}, 0)
        logger.finalize("finished")
    assert "Trackio: metrics not logged: OSError: disk full" in caplog.text
    assert trackio_logger is not None
