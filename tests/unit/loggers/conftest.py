"""One tiny run with W&B and TensorBoard, shared by the tests of what they got."""

from collections.abc import Callable
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.display.progress import Progress
from qdm_lightning.train import train

BOARD_RUN = [
    "model.block_out_channels=[8,16]",
    "model.norm_num_groups=4",
    "data.batch_size=16",
    "teacher.max_steps=2",
    "trainer.max_steps=4",
    "trainer.val_every=2",
    "trainer.log_every=1",
    "trainer.compile=off",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "quant.calibration_batches=2",
    "sampler.steps=2",
    "sampler.batch_size=32",
    "num_samples=24",
]


@pytest.fixture(scope="session")
def board_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`board_runs(override, ..., name=...)`: the result of a tiny run below a folder `name`; all share a cache."""
    root = tmp_path_factory.mktemp("boards")

    def run(*overrides: str, name: str) -> Any:
        places = [f"paths.cache={root / 'cache'}", f"paths.output={root / name}"]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", [*BOARD_RUN, *places, *overrides])
        return train(cfg, Progress("silent"))

    run.root = root  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="session")
def board_run(board_runs: Callable[..., Any]) -> Any:
    """The result of a run with W&B and TensorBoard; its folder may be read, not written."""
    return board_runs("logger=wandb_tensorboard", "tags=[mine]", "trainer.sample_every=2", name="runs")
