"""Runs that were killed go on to the same result, wherever they lie by then, and disturb none that is under way."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli import app
from qdm_lightning.cli.compose import stored
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.display.progress import Progress
from qdm_lightning.loggers.csv_metrics import CSVMetrics
from qdm_lightning.runs.folder import LOCK, held
from qdm_lightning.train import train
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.checkpoints import best_loss
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.student_files import WEIGHTS
from qdm_lightning.training.trainer import StageProgress


def test_a_moved_run_keeps_its_best(tmp_path, monkeypatch):
    """The loss grows: the first step that is validated is the best, also after a kill in another place."""

    def growing(self, batch, batch_idx):
        self.log(f"{self.prefix}val/loss", float(self.global_step), batch_size=len(batch[0]))

    def killed(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5 and not module.prefix:
            raise RuntimeError("killed")

    def finalized(self, status):
        assert not (self.path.parent / "metrics.json").exists()
        self.save()

    def run(name: str) -> Path:
        tiny = (
            "model.block_out_channels=[8,16] model.norm_num_groups=4 data.batch_size=8 teacher.max_steps=2 trainer.max_steps=6 "
        )
        tiny += "trainer.val_every=2 trainer.log_every=1 trainer.val_images=8 trainer.compile=off trainer.accelerator=cpu "
        tiny += "quant.calibration_batches=2 sampler.steps=2 num_samples=8 logger=none"
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", [*tiny.split(), f"paths.cache={tmp_path / 'cache'}", f"run={tmp_path / name}"])
        return train(cfg, Progress("silent")).run_dir

    monkeypatch.setattr(DiffusionModule, "validation_step", growing)
    monkeypatch.setattr(CSVMetrics, "finalize", finalized)
    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(StageProgress, "on_train_batch_end", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run("here")
    moved = Path(shutil.move(tmp_path / "here", tmp_path / "there"))
    result = train(stored(moved), Progress("silent"))
    assert (result.metrics["student"]["resumed_from"], result.metrics["student"]["best_step"]) == (4, 2)
    assert result.metrics["student"]["val_loss"] == best_loss(load_checkpoint(whole / "checkpoints" / "last.ckpt")) == 2.0
    for name in (f"student/{WEIGHTS}", "samples.png"):
        assert (moved / name).read_bytes() == (whole / name).read_bytes()
    of_both = [csv.DictReader((folder / "metrics.csv").read_text().splitlines()) for folder in (whole, moved)]
    rows = [
        [{k: v for k, v in row.items() if "teacher/" not in k[:8]} for row in read if row.get("val/loss")] for read in of_both
    ]
    assert rows[0] == rows[1]  # the first alone trained the teacher
    assert len(rows[0]) == 3


def test_the_best_loss_of_an_older_checkpoint_is_found():
    key = "ModelCheckpoint{'monitor': 'val/loss', 'mode': 'min'}"
    last = "ModelCheckpoint{'monitor': None, 'mode': 'min'}"
    assert best_loss({"callbacks": {last: {"best_model_score": None}, key: {"best_model_score": torch.tensor(0.25)}}}) == 0.25
    assert best_loss({"callbacks": {}}) is None


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path):
    for name in ("config.yaml", "train.log"):
        (tmp_path / name).write_text("of the other")
    with FileLock(tmp_path / LOCK):
        with pytest.raises(UserError, match="is being trained by another process"), held(tmp_path):
            pass
        app._discard(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "train.log", LOCK}
    app._discard(tmp_path)
    assert not tmp_path.exists()


def test_whoever_holds_a_folder_removes_what_killed_writes_left(tmp_path):
    for name in (
        "checkpoints/.last.ckpt.7.tmp",
        ".metrics.csv.7.tmp",
        ".student.abc.tmp/new/config.json",
        "student/config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / ".evaluation.json.7.tmp").write_text("an evaluation holds no lock")
    with held(tmp_path):
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {LOCK, "student/config.json", ".evaluation.json.7.tmp"}
