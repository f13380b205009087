"""Whole runs, tiny: what they leave, that resume loses nothing, that a teacher is trained once, what W&B gets."""

import csv
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from qdm_lightning import load_student
from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.compose import stored
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.display.progress import Progress
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.quantization import timesteps
from qdm_lightning.train import train
from qdm_lightning.training import teacher
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.module import DiffusionModule
from qdm_lightning.training.run import Run
from qdm_lightning.training.trainer import StageProgress

TINY = [
    "model.block_out_channels=[8,16]",
    "model.norm_num_groups=4",
    "data.batch_size=16",
    "teacher.max_steps=6",
    "trainer.max_steps=6",
    "trainer.val_every=2",
    "trainer.log_every=2",
    "trainer.compile=off",
    "trainer.accelerator=cpu",
    "quant.calibration_batches=2",
    "sampler.steps=3",
    "num_samples=24",
]


def run(tmp_path: Path, *overrides: str, name: str = "runs", logger: str = "none"):
    places = [f"paths.cache={tmp_path / 'cache'}", f"paths.output={tmp_path / name}", f"logger={logger}"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", overrides=[*TINY, *places, *overrides])
    return train(cfg, Progress("silent"))


def assert_same_weights(folder: Path, other: Path) -> None:
    one, two = (load_checkpoint(f / "checkpoints" / "last.ckpt")["state_dict"] for f in (folder, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def learning(folder: Path) -> list[dict[str, str]]:
    """The rows of teacher and student without what is measured at the end."""
    rows = [{k: v for k, v in row.items() if v and not k.startswith("final/")} for row in read_csv(folder / "metrics.csv")]
    rows = [row for row in rows if row.keys() > {"step"}]
    assert {"teacher/train/loss", "train/loss", "val/loss"} <= {name for row in rows for name in row}
    return rows


def killed_at(step: int):
    """For `StageProgress.on_train_batch_end`: ends a run at a step of its student."""

    def kill(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == step and not module.prefix:
            raise RuntimeError("killed")

    return kill


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return root, run(root)


def test_a_run_leaves_its_record(first):
    _, result = first
    metrics = json.loads((result.run_dir / "metrics.json").read_text())
    assert metrics["floor"]["fd_digits"] > 0
    assert metrics["teacher"]["fd_digits"] > 0
    assert {"fd_digits", "image_mse", "nem_error"} <= set(metrics["student"])
    assert len(metrics["student"]["nem_error"]) == 10
    assert {"teacher", "calibration", "student", "sampling_teacher", "sampling_student"} <= set(metrics["seconds"])
    assert metrics["seed"] == 0
    assert metrics["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert metrics["kernels"]["fake_quantization"] == "eager"
    names = (
        "config.yaml",
        "samples.png",
        "quantization.txt",
        "metrics.csv",
        "checkpoints/best.ckpt",
        "teacher/unet/config.json",
    )
    assert all((result.run_dir / name).is_file() for name in names)
    rows = read_csv(result.run_dir / "metrics.csv")
    assert {"train/loss", "val/loss", "teacher/val/loss", "final/student/fd_digits"} <= set(rows[0])


def test_the_record_of_a_trial_says_so(first):
    """That of any other run says nothing about it."""
    root, result = first
    trial = run(root, "trial=true", "quant=fp32", name="trial")
    assert json.loads((trial.run_dir / "metrics.json").read_text())["trial"] is True
    assert "trial" not in result.metrics


def test_the_teacher_is_trained_once_for_all_seeds(first):
    root, result = first
    other = run(root, "seed=1", "trainer.max_steps=2")
    assert result.metrics["teacher_origin"]["trained_now"]
    assert not other.metrics["teacher_origin"]["trained_now"]
    assert result.metrics["teacher_origin"]["key"] == other.metrics["teacher_origin"]["key"]
    changed = run(root, "teacher.seed=1", "trainer.max_steps=2")
    assert changed.metrics["teacher_origin"]["key"] != result.metrics["teacher_origin"]["key"]


def test_the_same_run_twice_gives_the_same_weights_and_images(first):
    root, result = first
    again = run(root, name="again")
    assert_same_weights(again.run_dir, result.run_dir)
    assert again.metrics["student"]["image_mse"] == result.metrics["student"]["image_mse"]


def test_a_killed_run_goes_on_to_the_same_weights(first, monkeypatch):
    """A kill after step 5: the last checkpoint is of step 4; optimizer, schedule, EMA, order and noise go on exactly."""
    root, result = first

    with monkeypatch.context() as patch:
        patch.setattr(StageProgress, "on_train_batch_end", killed_at(5))
        with pytest.raises(RuntimeError, match="killed"):
            run(root / "killed")  # with a cache of its own, so that it trains its teacher
    (folder,) = (root / "killed" / "runs").iterdir()
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 4
    resumed = train(stored(folder), Progress("silent"))
    assert resumed.run_dir == folder
    assert resumed.metrics["student"]["resumed_from"] == 4
    assert resumed.metrics["teacher_origin"]["key"] == result.metrics["teacher_origin"]["key"]
    assert_same_weights(folder, result.run_dir)
    for measure in ("fd_digits", "image_mse", "nem_error"):
        assert resumed.metrics["student"][measure] == result.metrics["student"][measure]
    assert learning(folder) == learning(result.run_dir)


def test_the_last_step_is_validated_once_and_may_be_the_best(first):
    """With `val_every` 2: five steps are validated at 2, 4 and 5, and six at 2, 4 and 6; the file counts steps from 0."""
    root, result = first
    other = run(root, "teacher.max_steps=5", "trainer.max_steps=5", name="five")
    for folder, last in ((other.run_dir, 5), (result.run_dir, 6)):
        for name in ("val/loss", "teacher/val/loss"):
            losses = {int(row["step"]) + 1: float(row[name]) for row in read_csv(folder / "metrics.csv") if row[name]}
            assert list(losses) == [2, 4, last]
        losses = {int(row["step"]) + 1: float(row["val/loss"]) for row in read_csv(folder / "metrics.csv") if row["val/loss"]}
        fitted = json.loads((folder / "metrics.json").read_text())["student"]
        assert fitted["best_step"] == min(losses, key=losses.get) == last  # of so short a training
        assert fitted["val_loss"] == pytest.approx(losses[last])
        for name in ("best", "last"):
            assert load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")["global_step"] == last


def test_a_run_goes_on_from_its_last_validation_and_takes_its_best(first, monkeypatch):
    """The loss grows, so that the first step that is validated is the best. One run dies at step 5, one after its training."""
    root, _ = first

    def growing(self, batch, batch_idx):
        self.log(f"{self.prefix}val/loss", float(self.global_step), batch_size=len(batch[0]))

    def resumed(name, place, method, kill):
        with monkeypatch.context() as patch:
            patch.setattr(place, method, kill)
            with pytest.raises(RuntimeError, match="killed"):
                run(root, name=name)
        (folder,) = (root / name).iterdir()
        return train(stored(folder), Progress("silent"))

    def killed(self, teacher, student):
        raise RuntimeError("killed")

    monkeypatch.setattr(DiffusionModule, "validation_step", growing)
    whole = resumed("growing", Run, "measure", killed)
    assert (whole.metrics["student"]["resumed_from"], whole.metrics["student"]["step_seconds"]) == (6, None)
    again = resumed("growing_killed", StageProgress, "on_train_batch_end", killed_at(5))
    assert again.metrics["student"]["resumed_from"] == 4
    for result in (whole, again):
        assert result.metrics["student"]["best_step"] == 2
        assert load_checkpoint(result.run_dir / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert_same_weights(whole.run_dir, again.run_dir)
    assert again.metrics["student"]["image_mse"] == whole.metrics["student"]["image_mse"]


def test_a_shipped_teacher_is_found_by_its_key(first, tmp_path, monkeypatch):
    """Before the cache is looked at; any other setting trains its own."""
    root, result = first
    expected = result.metrics["teacher_origin"]
    monkeypatch.setattr(teacher, "ASSETS", tmp_path / "assets")
    shutil.copytree(root / "cache" / "teachers" / expected["key"], tmp_path / "assets" / "any_name")
    taken = run(tmp_path, "quant=fp32")
    assert taken.metrics["teacher_origin"] == {**expected, "trained_now": False, "shipped": True}
    assert taken.metrics["teacher"] == result.metrics["teacher"]
    assert not (tmp_path / "cache" / "teachers").exists()
    other = run(tmp_path, "quant=fp32", "teacher.seed=1").metrics["teacher_origin"]
    assert other["trained_now"]
    assert "shipped" not in other


def test_a_runs_teacher_appears_with_its_origin(first, monkeypatch):
    root, _ = first

    def write(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher, "write_json", write)  # the cache has the teacher: what is written is the origin
    with pytest.raises(KeyboardInterrupt):
        run(root, name="without_origin")
    [folder] = (root / "without_origin").iterdir()
    assert not list(folder.glob("*teacher*"))


def test_retrain_replaces_the_cached_teacher(first, tmp_path, monkeypatch):
    root, result = first
    key = result.metrics["teacher_origin"]["key"]
    cached = shutil.copytree(root / "cache" / "teachers" / key, tmp_path / "cache" / "teachers" / key)
    shutil.copytree(cached, tmp_path / "assets" / "teacher")
    monkeypatch.setattr(teacher, "ASSETS", tmp_path / "assets")
    (cached / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    again = run(tmp_path, "teacher.retrain=true", "quant=fp32")
    assert again.metrics["teacher_origin"] == result.metrics["teacher_origin"]
    assert again.metrics["teacher"] == result.metrics["teacher"]
    assert load_unet(cached)


def test_the_teacher_that_is_to_be_shipped(first, tmp_path, monkeypatch):
    root, result = first
    key = result.metrics["teacher_origin"]["key"]

    started = subprocess.run

    def in_this_process(command, **options):
        if command[0] == "git":
            return started(command, **options)
        assert command[:3] == [sys.executable, "-m", "qdm_lightning.train"]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            train(compose("train", command[3:]), Progress("silent"))

    script = runpy.run_path(str(CONF_DIR.parent / "experiments" / "embedded" / "teacher.py"))
    monkeypatch.setattr(script["subprocess"], "run", in_this_process)
    script["main"](tmp_path / "made", TINY)
    files = [file.relative_to(tmp_path / "made").as_posix() for file in sorted((tmp_path / "made").rglob("[!.]*.*"))]
    assert files == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "teacher.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((tmp_path / "made" / "teacher.json").read_text())["key"] == key
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "made" / weights).read_bytes() == (root / "cache" / "teachers" / key / weights).read_bytes()


def test_a_full_precision_run_is_the_teacher_that_auto_takes(first):
    root, result = first
    alone = run(root, "quant=fp32", name="fp32")
    assert alone.metrics["teacher_origin"]["key"] == result.metrics["teacher_origin"]["key"]
    assert "student" not in alone.metrics
    assert alone.metrics["teacher"] == result.metrics["teacher"]
    taken = run(root, "teacher=checkpoint", f"teacher.path={alone.run_dir}", "trainer.max_steps=2", name="taken")
    assert taken.metrics["teacher"] == result.metrics["teacher"]


def test_a_teacher_that_diverges_is_not_cached(tmp_path):
    with pytest.raises(UserError, match=r"^in step \d .* lower teacher\.lr=1e\+12"):
        run(tmp_path, "teacher.lr=1e12", "teacher.warmup_steps=0", "teacher.gradient_clip=1e9")
    assert list(tmp_path.glob("cache/teachers/*/teacher.json")) == []
    assert list(tmp_path.glob("runs/*/metrics.json")) == []


@pytest.mark.parametrize(("method", "name"), [("training_step", "train/loss"), ("validation_step", "val/loss")])
def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(first, monkeypatch, method, name):
    original = getattr(DiffusionModule, method)

    def diverging(self, batch, index):
        loss = original(self, batch, index)
        if self.prefix or self.global_step < 3:
            return loss
        if method == "training_step":
            return loss * float("nan")
        self.log("val/loss", torch.tensor(float("inf")), batch_size=1)

    monkeypatch.setattr(DiffusionModule, method, diverging)
    with pytest.raises(UserError, match=f"^(in|after) step 4 {name} is (nan|inf).*: training diverged"):
        run(first[0], "seed=5", name=f"diverged_{method}")
    (folder,) = (first[0] / f"diverged_{method}").iterdir()
    assert {file.name: load_checkpoint(file)["global_step"] for file in (folder / "checkpoints").glob("[!.]*")} == {
        "last.ckpt": 2,
        "best.ckpt": 2,
        "diverged.ckpt": 3 if method == "training_step" else 4,
    }
    assert not (folder / "metrics.json").exists()


@pytest.mark.parametrize("taq", ["ema", "scale"])
def test_every_taq_variant_trains_everywhere_with_scales_by_channel(first, taq):
    options = ["taq.scope=all", "taq.groups=5", "quant.channel_scales=rms", "trainer.max_steps=2"]
    result = run(first[0], f"taq={taq}", *options, name=taq)
    assert result.metrics["student"]["fd_digits"] > 0
    loaded = load_student(result.run_dir)  # its codes are of r_c w_c
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad(), timesteps(t):
        assert torch.equal(loaded(x, t).sample, result.student.unet(x, t).sample)


def test_post_training_quantization_takes_no_step(first):
    result = run(
        first[0], "quant.mode=ptq", "quant.calibrator._target_=qdm_lightning.quantization.calibration.MinMax", name="ptq"
    )
    assert result.metrics["student"]["steps"] == 0
    assert result.metrics["student"]["image_mse"] > 0


def test_images_may_be_drawn_on_integer_codes(first):
    root, result = first
    drawn = run(root, "execution=integer", name="integer").metrics["student"]
    simulated = result.metrics["student"]
    assert (drawn["execution"], "execution" in simulated) == ("integer", False)
    assert {name: drawn[name] for name in ("val_loss", "nem_error")} == {n: simulated[n] for n in ("val_loss", "nem_error")}
    assert drawn["image_mse"] == pytest.approx(simulated["image_mse"], rel=0.05)


def test_weighted_by_propagation(first):
    """S(t) is measured once for the teacher and the sampler, and lies in the run; a run that goes on has the same weights."""
    runs = [run(first[0], "nem/weighting=propagation", "trainer.max_steps=2", name=f"weighted_{k}") for k in (0, 1)]
    measured = [json.loads((result.run_dir / "propagation.json").read_text()) for result in runs]
    assert measured[0] == measured[1]
    assert len(measured[0]["t"]) == len(measured[0]["S"]) == 3  # of the sampler
    assert runs[0].module.weights.mean() == pytest.approx(1)
    assert runs[0].module.weights.unique().numel() > 2
    assert torch.equal(runs[0].module.weights, runs[1].module.weights)


def test_on_policy_runs_and_resumes(first):
    result = run(first[0], "nem=on_policy", "nem.on_policy_buffer=40", "nem.on_policy_refresh=2", name="on_policy")
    assert "trajectory_buffer" in load_checkpoint(result.run_dir / "checkpoints" / "last.ckpt")
