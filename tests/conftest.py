"""What all tests share: no state of Hydra, W&B or logging passes from one to the next."""

import atexit
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import absl.logging
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from qdm_lightning.cli.schema import CONF_DIR

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB_DATA_DIR"] = tempfile.mkdtemp(prefix="qdm_wandb_")  # where it stages the files of artifacts
atexit.register(shutil.rmtree, os.environ["WANDB_DATA_DIR"], ignore_errors=True)
os.environ.pop("WANDB_API_KEY", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: several tests run at once
# absl, which OpenVINO and TensorBoard import, closes its stream when Hydra sets up logging: it must not be the one of pytest.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True)
def _no_state_left() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    for handler in set(root.handlers) - set(handlers):  # Hydra's file of a run folder
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The smoke tests first: they take longest, and left to the end one worker would run them while the others idle."""
    items.sort(key=lambda item: "smoke" not in item.path.parts)


TINY_RUN = [
    "model.block_out_channels=[8,16]",
    "model.norm_num_groups=4",
    "data.batch_size=16",
    "teacher.max_steps=20",
    "trainer.max_steps=10",
    "trainer.compile=off",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "quant.calibration_batches=2",
    "sampler.steps=4",
    "sampler.batch_size=16",
    "num_samples=64",
    "taq=normalize",  # a state of a scale and a zero point for each quantizer
    "logger=none",
]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run, seconds long; tests must not write into it, but copy it."""
    from qdm_lightning.display.progress import Progress
    from qdm_lightning.train import train

    root = tmp_path_factory.mktemp("tiny")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", [*TINY_RUN, f"paths.cache={root / 'cache'}", f"paths.output={root / 'runs'}"])
    return train(cfg, Progress("silent")).run_dir


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run that a test may write into: its files have no checksums, and may be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns(".*.sha256")))


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """`composed("quant=w3a3", ..., root="train", folder=...)`: the configuration as a command would compose it."""

    def compose_it(*overrides: str, root: str = "train", folder: Path = CONF_DIR) -> DictConfig:
        with initialize_config_dir(str(folder), version_base="1.3"):
            return compose(root, list(overrides))

    return compose_it


@dataclass
class OfflineRun:
    """What an offline W&B run wrote into its own file. `history` has a dict for each call that logged."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)

    def keys(self) -> set[str]:
        """Every name in the history."""
        return {name for row in self.history for name in row}

    def kind(self, name: str) -> str:
        """`number`, or W&B's type of the media under a name."""
        value = next(row[name] for row in self.history if name in row)
        return value["_type"] if isinstance(value, dict) else "number"


@pytest.fixture
def offline_runs() -> Callable[[Path], list[OfflineRun]]:
    """`offline_runs(run_dir)`: the W&B runs that lie in a run folder, oldest first."""

    def read(run_dir: Path) -> list[OfflineRun]:
        return [_offline_run(path) for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))]

    return read


def _whole_file(path: Path) -> list[Any]:
    """The records of a finished run's file. W&B's service writes its end after `finish()` has returned: wait for it."""
    from wandb.proto import wandb_internal_pb2

    end = time.monotonic() + 60
    while True:
        records = [wandb_internal_pb2.Record.FromString(data) for data in _leveldb_records(path.read_bytes())]
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < end, f"{path} has no end: {len(records)} records"
        time.sleep(0.05)


def _offline_run(path: Path) -> OfflineRun:
    found = OfflineRun()
    for record in _whole_file(path):
        if record.HasField("run"):
            found.run = record.run
        if record.HasField("artifact"):
            found.artifacts.append(record.artifact)
        if record.HasField("metric"):
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        for update in [*record.run.config.update, *record.config.update]:
            found.config[update.key] = json.loads(update.value_json)
        _put(found.summary, record.summary.update)
        if record.history.item:
            found.history.append({})
            _put(found.history[-1], record.history.item)
    return found


def _put(into: dict[str, Any], items: Any) -> None:
    for item in items:
        name, *inner = item.nested_key or [item.key]
        if inner:
            into.setdefault(name, {})["/".join(inner)] = json.loads(item.value_json)
        else:
            into[name] = json.loads(item.value_json)


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """After 7 bytes: blocks of 32 KiB with chunks of (checksum 4, length 2, type 1); 1 full, 2 first, 3 middle, 4 last."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        chunk = data[position + 7 : position + 7 + length]
        if len(chunk) < length:  # still being written
            return
        position += 7 + length
        parts = chunk if kind in (1, 2) else parts + chunk
        if kind in (1, 4):
            yield parts
