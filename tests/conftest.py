"""What all tests share: no state of Hydra, W&B or logging passes from one to the next."""

import logging
import os
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


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """`composed("quant=w3a3", ..., root="train", folder=...)`: the configuration as a command would compose it."""

    def compose_it(*overrides: str, root: str = "train", folder: Path = CONF_DIR) -> DictConfig:
        with initialize_config_dir(str(folder), version_base="1.3"):
            return compose(root, list(overrides))

    return compose_it
