"""What all tests share: no state of Hydra, W&B or logging passes from one to the next."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from qdm_lightning.schema import CONF_DIR

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("WANDB_API_KEY", None)


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
    "sampler.micro_batch=16",
    "num_samples=64",
    "logger=none",
]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run, seconds long; tests must not write into it, but copy it."""
    from qdm_lightning.reporting.terminal import Progress
    from qdm_lightning.train import train

    root = tmp_path_factory.mktemp("tiny")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", [*TINY_RUN, f"paths.cache={root / 'cache'}", f"paths.output={root / 'runs'}"])
    return train(cfg, Progress("silent")).run_dir


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run that a test may write into."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """`composed("quant=w3a3", ..., root="train", folder=...)`: the configuration as a command would compose it."""

    def compose_it(*overrides: str, root: str = "train", folder: Path = CONF_DIR) -> DictConfig:
        with initialize_config_dir(str(folder), version_base="1.3"):
            return compose(root, list(overrides))

    return compose_it
