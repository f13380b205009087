"""Runs whose files were damaged, or whose folder is gone, in the middle."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from qdm_lightning.cli.compose import stored
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.display.progress import Progress
from qdm_lightning.train import train
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.trainer import StageProgress

TINY = [
    *("model.block_out_channels=[8,16]", "model.norm_num_groups=4", "data.batch_size=8", "teacher.max_steps=4"),
    *("trainer.max_steps=4", "trainer.val_every=2", "trainer.val_images=8", "trainer.compile=off", "trainer.threads=1"),
    *("quant.calibration_batches=1", "sampler.steps=2", "sampler.batch_size=8", "num_samples=8", "logger=none"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Root of a run that nothing happened to, and its result."""
    root = tmp_path_factory.mktemp("whole")
    return root, new_run(root)


def new_run(root: Path, *overrides: str):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", [*TINY, f"paths.cache={root / 'cache'}", f"paths.output={root / 'runs'}", *overrides])
    return train(cfg, Progress("silent"))


def turn(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def at_step(prefix: str, step: int, action: Callable[[], None]):
    """For `StageProgress.on_train_batch_end`: does something after a step of the teacher (`teacher/`) or the student."""

    def act(self, trainer, module, *rest):
        if (module.prefix, trainer.global_step) == (prefix, step):
            action()

    return act


def killed() -> None:
    raise RuntimeError("killed")


def test_a_damaged_last_checkpoint_is_replaced_by_the_best_and_the_record_says_so(whole, tmp_path):
    _, expected = whole
    folder = Path(shutil.copytree(expected.run_dir, tmp_path / "run"))
    (folder / "metrics.json").unlink()
    turn(folder / "checkpoints" / "last.ckpt")
    again = train(stored(folder), Progress("silent"))
    [warning] = again.metrics["student"]["warnings"]
    assert "last.ckpt is damaged" in warning
    assert again.metrics["student"]["image_mse"] == expected.metrics["student"]["image_mse"]


def test_a_teacher_in_the_cache_is_trained_again_where_a_file_of_it_is_damaged(whole, tmp_path, capsys):
    root, expected = whole
    for name in ("teacher.json", "unet/diffusion_pytorch_model.safetensors"):
        cache = shutil.copytree(root / "cache", tmp_path / Path(name).stem / "cache")
        (folder,) = (folder for folder in (cache / "teachers").iterdir() if folder.is_dir())
        turn(folder / name)
        again = new_run(tmp_path / Path(name).stem, "quant=fp32", "trainer.max_steps=4")
        assert again.metrics["teacher_origin"]["trained_now"]
        assert again.metrics["teacher"] == expected.metrics["teacher"]


@pytest.mark.parametrize("both", [False, True])
def test_a_half_trained_teacher_is_gone_on_with_or_begun_again(whole, tmp_path, monkeypatch, both):
    _, expected = whole
    with monkeypatch.context() as patch:
        patch.setattr(StageProgress, "on_train_batch_end", at_step("teacher/", 3, killed))
        with pytest.raises(RuntimeError, match="killed"):
            new_run(tmp_path, "quant=fp32")
    (work,) = tmp_path.glob("cache/teachers/*.work/checkpoints")
    assert load_checkpoint(work / "last.ckpt")["global_step"] == 2
    turn(work / "last.ckpt")
    if both:
        turn(work / "best.ckpt")
    again = new_run(tmp_path, "quant=fp32")
    assert again.metrics["teacher"] == expected.metrics["teacher"]


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_whose_folder_is_removed_ends_with_an_error(whole, tmp_path, monkeypatch, step):
    root, _ = whole
    folder = tmp_path / "run"

    def remove():
        (found,) = (tmp_path / "runs").iterdir()
        shutil.rmtree(found)
        folder.touch()

    monkeypatch.setattr(StageProgress, "on_train_batch_end", at_step("", step, remove))
    with pytest.raises(FileNotFoundError, match="the run's folder was removed or moved while it was in use"):
        new_run(tmp_path, f"paths.cache={root / 'cache'}")
    assert folder.exists()
    assert not list(tmp_path.glob("runs/*/metrics.json"))
