"""What W&B and TensorBoard get from whole runs, tiny, read back from their own files; one W&B run a job; faults end no run."""

import importlib.util
import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import wandb
from PIL import Image

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.build import build
from qdm_lightning.cli.compose import stored
from qdm_lightning.cli.schema import plain
from qdm_lightning.cli.validate import validate
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.loggers import opened, tensorboard_logger, wandb_logger
from qdm_lightning.loggers.media import TIMESTEP, log_files, log_pictures, log_table, log_values
from qdm_lightning.runs.naming import labels
from qdm_lightning.train import train
from qdm_lightning.training.trainer import StageProgress


def wandb_run(run_dir: Path, config=(), **settings):
    """A W&B run that logs nothing."""
    with opened([partial(wandb_logger, project="p", **settings)], run_dir=run_dir, config=dict(config)):
        pass


MIN_MAX = "quant.calibrator._target_=qdm_lightning.quantization.calibration.MinMax"


def test_wandb_says_which_run_it_is(board_run, offline_runs):
    result = board_run
    found = offline_runs(result.run_dir)[0]
    assert (found.run.job_type, found.run.run_group, found.run.project) == ("qat", "", "qdm-lightning")
    assert list(found.run.tags) == ["mine", "bits:w4a4", "taq:scale-all", "nem:replace", "sampler:ddim-2"]
    expected = {**labels(plain(stored(result.run_dir))), "name": "w4a4 scale-all replace ddim-2"}
    assert found.config["cell"] == expected
    assert found.config["quant"]["weight_bits"] == 4
    assert found.run.run_id == (result.run_dir / "wandb_id").read_text().strip()


def test_wandb_gets_scalars_pictures_tables_and_histograms(board_run, offline_runs):
    result = board_run
    found = offline_runs(result.run_dir)[0]
    kinds = {name: found.kind(name) for name in found.keys()}  # noqa: SIM118 - not a dict
    for name in ("teacher/train/loss", "train/loss", "val/nem", "sampled/fd_digits", "final/student/image_mse"):
        assert kinds[name] == "number"
    assert kinds["samples/teacher_above_student"] == kinds["samples/student"] == "image-file"
    assert kinds["quantization/layers"] == kinds["results/final"] == kinds["nem_error/table"] == "table-file"
    assert kinds["scales/weights_log2"] == kinds["scales/activations_log2"] == "histogram"
    assert kinds["scale/conv_in.weight_quantizer"] == kinds["zero_point/mid_block.attentions.0.query"] == "number"
    student = result.metrics["student"]
    assert found.summary["student/fd_digits"] == student["fd_digits"]
    assert found.summary["student/cost/bytes"] == student["cost"]["bytes"]
    assert found.summary["kernels"] == result.metrics["kernels"]


def table(run_dir: Path, name: str) -> list[dict[str, object]]:
    [file] = run_dir.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json")
    stored_table = json.loads(file.read_text())
    return [dict(zip(stored_table["columns"], row, strict=True)) for row in stored_table["data"]]


def test_tables_hold_what_the_record_holds(board_run):
    result = board_run
    layers = {row["module"]: row for row in table(result.run_dir, "quantization/layers")}
    assert sum(row["macs"] for row in layers.values()) == result.metrics["student"]["cost"]["macs"]
    assert sum(row["bytes"] for row in layers.values()) == result.metrics["student"]["cost"]["bytes"]
    assert (layers["conv_in"]["weight_bits"], layers["conv_in"]["quantizers"]) == (8, "LSQWeight GroupedActivation")
    final = {(row["network"], row["measure"]): row["value"] for row in table(result.run_dir, "results/final")}
    assert final["student", "fd_digits"] == result.metrics["student"]["fd_digits"]
    errors = table(result.run_dir, "nem_error/table")
    assert [row["nem_error"] for row in errors] == result.metrics["student"]["nem_error"]
    assert [(row["first_t"], row["last_t"]) for row in errors][:2] == [(0, 99), (100, 199)]


def test_activations_lie_over_the_timesteps(board_run, offline_runs):
    result = board_run
    found = offline_runs(result.run_dir)[0]
    rows = [row for row in found.history if "nem_error/by_timestep" in row]
    assert [row["timestep"] for row in rows] == list(range(50, 1000, 100))
    assert [row["nem_error/by_timestep"] for row in rows] == result.metrics["student"]["nem_error"]
    name = "activations/mid_block.attentions.0.query"
    counts = [sum(row[name]["values"]) for row in rows]
    assert min(counts) >= 12 * 16 * 4  # 12 samples of 16 channels and 2x2 pixels, at least
    assert found.axes["activations/*"] == "timestep"
    assert found.axes["val/*"] == "trainer/global_step"
    logged = {key for key in rows[0] if key.startswith("activations/")}
    assert {key.rpartition(".")[2] for key in logged} == {"query", "key", "value", "input_quantizer"}


def test_the_students_folder_is_an_artifact_and_the_best_checkpoint_named_in_it(board_run, offline_runs):
    result = board_run
    found = offline_runs(result.run_dir)[0]
    [model] = [artifact for artifact in found.artifacts if artifact.type == "model"]
    entries = {entry.path: entry for entry in model.manifest.contents}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert set(entries) == {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", weights, "best.ckpt"}
    assert Path(entries[weights].local_path) == result.run_dir / "student" / weights
    assert entries["best.ckpt"].ref == (result.run_dir / "checkpoints" / "best.ckpt").as_uri()
    metadata = json.loads(model.metadata)
    assert (metadata["bits"], metadata["taq"], metadata["nem"]) == ("w4a4", "scale-all", "replace")
    assert metadata["student/image_mse"] == result.metrics["student"]["image_mse"]


def test_tensorboard_gets_the_same(board_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = board_run
    board = EventAccumulator(str(result.run_dir / "tensorboard"), size_guidance={"histograms": 0, "images": 0, "scalars": 0})
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "val/nem", "teacher/val/loss", "sampled/fd_digits", "nem_error/by_timestep"} <= set(tags["scalars"])
    assert {"samples/teacher_above_student", "samples/student"} <= set(tags["images"])
    assert {"scales/weights_log2", "activations/mid_block.attentions.0.query"} <= set(tags["histograms"])
    assert [e.step for e in board.Histograms("activations/mid_block.attentions.0.query")] == list(range(50, 1000, 100))
    errors = [e.value for e in board.Scalars("nem_error/by_timestep")]
    assert errors == pytest.approx(result.metrics["student"]["nem_error"], rel=1e-6)
    [picture] = board.Images("samples/teacher_above_student")
    with Image.open(result.run_dir / "samples.png") as expected:
        assert (picture.width, picture.height) == expected.size
    text = board.Tensors("quantization/layers/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| conv_in |" in text
    assert "hparams.yaml" not in [file.name for file in (result.run_dir / "tensorboard").iterdir()]


def test_metrics_csv_has_the_runs_scalars_alone(board_run):
    result = board_run
    head = (result.run_dir / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "sampled/fd_digits", "final/student/fd_digits", "final/student/nem_error_mean"} <= set(head)
    assert not [name for name in head if name.startswith(("scale", "zero_point", "activations", "nem_error"))]


def test_an_evaluation_is_an_artifact_of_the_same_run(board_run, offline_runs, tmp_path):
    folder = shutil.copytree(board_run.run_dir, tmp_path / "run")
    done = evaluate(folder, ["num_samples=32", "logger=wandb"], Progress("silent"))
    runs = offline_runs(folder)
    assert len(runs) == 2
    assert {found.run.run_id for found in runs} == {runs[0].run.run_id}
    [artifact] = [a for a in runs[-1].artifacts if a.type == "evaluation"]
    assert [Path(e.local_path) for e in artifact.manifest.contents] == [done.folder / "evaluation.json"]
    assert runs[-1].summary["evaluation/student/fd_digits"] == done.record["scores"]["fd_digits"]


def test_a_sweeps_folder_is_the_group(board_run, tmp_path, offline_runs):
    (tmp_path / "my_sweep").mkdir()
    (tmp_path / "my_sweep" / "multirun.yaml").write_text("hydra: {}\n")
    experiment = build(stored(board_run.run_dir))
    for job in ("0_a", "1_b"):
        wandb_run(tmp_path / "my_sweep" / job, config=experiment.resolved)
    runs = [offline_runs(tmp_path / "my_sweep" / job)[0].run for job in ("0_a", "1_b")]
    assert [found.run_group for found in runs] == ["my_sweep"] * 2
    assert [found.display_name for found in runs] == ["0_a", "1_b"]
    assert runs[0].run_id != runs[1].run_id


def test_under_wandb_agent_the_runs_id_is_the_agents(tmp_path, offline_runs, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    wandb.teardown()  # W&B reads the environment once a process
    try:
        wandb_run(tmp_path / "job")
    finally:
        wandb.teardown()
    [found] = offline_runs(tmp_path / "job")
    assert found.run.run_id == (tmp_path / "job" / "wandb_id").read_text().strip() == "fromagent"
    assert found.run.sweep_id == "sweep1"


def test_a_killed_run_goes_on_in_its_wandb_run(board_runs, monkeypatch, offline_runs):

    def killed(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 3 and not module.prefix:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(StageProgress, "on_train_batch_end", killed)
        with pytest.raises(RuntimeError, match="killed"):
            board_runs("logger=wandb", name="killed")
    [folder] = (board_runs.root / "killed").iterdir()
    train(stored(folder), Progress("silent"))
    first, second = offline_runs(folder)
    assert first.run.run_id == second.run.run_id
    assert (first.run.job_type, list(first.run.tags)) == (second.run.job_type, list(second.run.tags))
    assert not [a for a in first.artifacts if a.type == "model"]
    assert [a.name for a in second.artifacts if a.type == "model"] == [f"model-{second.run.run_id}"]


@pytest.mark.parametrize(("typed", "job"), [(["quant=fp32"], "teacher"), (["quant.mode=ptq", MIN_MAX], "ptq")])
def test_job_types(board_runs, typed, job, offline_runs):
    result = board_runs(*typed, "logger=wandb", "logger.artifacts=false", "trainer.histograms=[]", name=job)
    [found] = offline_runs(result.run_dir)
    assert found.run.job_type == job
    assert not [a for a in found.artifacts if a.type == "model"]
    assert not [name for name in found.keys() if name.startswith("activations/")]  # noqa: SIM118
    assert ("nem_error/by_timestep" in found.keys()) == (job == "ptq")  # noqa: SIM118


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["quant=w3a3", "taq=ema", "nem=on_policy", "sampler=ddpm"], "qat w3a3 ema on_policy ddpm-1000"),
        (["taq=off", "nem=off"], "qat w4a4 off off ddim-50"),
        (["quant.mode=ptq"], "ptq w4a4 scale-all off ddim-50"),
        (["taq._target_=my.Grid", "quant.qkv_bits=8"], "qat w4a4 Grid-all replace ddim-50"),
        (["quant=fp32"], "teacher ddim-50"),
    ],
)
def test_labels(overrides, expected, composed):
    from omegaconf import OmegaConf

    assert " ".join(labels(OmegaConf.to_container(composed(*overrides), resolve=True)).values()) == expected


def test_nothing_cosmetic_ends_a_run(tmp_path, caplog):
    """A picture that is not there, a histogram of NaN, a table with a hole, files that are gone: a warning each."""
    factories = [partial(wandb_logger, project="p"), tensorboard_logger]
    with (
        caplog.at_level(logging.WARNING, logger="qdm_lightning"),
        opened(factories, run_dir=tmp_path, config={}) as loggers,
    ):
        log_pictures(loggers, "picture", tmp_path / "none.png", 0)
        log_values(loggers, {"histogram": torch.full((3,), torch.nan)}, 0, TIMESTEP)
        log_table(loggers[:1], "table", ["one"], [[1, 2]])
        log_files(loggers, "model", [tmp_path / "none"], {})
        loggers[0].log_metrics({"x": object()}, 0)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("qdm_lightning")]
    expected = ["W&B: picture", "TensorBoard: picture", "W&B: histogram", "TensorBoard: histogram"]
    expected += ["W&B: table", "W&B: model files", "W&B: metrics"]
    assert [line.partition(" not logged")[0] for line in said] == expected


def test_loggers_get_what_they_take(board_run, tmp_path):
    """Any of Lightning's, or the user's, beside ours."""
    cfg = stored(board_run.run_dir)
    cfg.logger = {"mine": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}}
    with opened(build(cfg).loggers, run_dir=tmp_path, config={}) as [logger]:
        assert type(logger).__name__ == "CSVLogger"


def test_a_missing_tensorboard_is_named_with_the_command(composed, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("qdm_lightning.cli.logger_schema.find_spec", lambda name: None if name == "tensorboard" else find(name))
    for option in ("tensorboard", "wandb_tensorboard"):
        with pytest.raises(ValueError, match=r"pip install 'qdm-lightning\[tensorboard\]'"):
            validate(composed(f"logger={option}"))


def test_settings_of_two_loggers_are_checked_too(composed):
    validate(composed("logger=wandb_tensorboard", "logger.wandb.project=mine", "logger.tensorboard.folder=board"))
    with pytest.raises(ValueError, match="choose one of offline, online"):
        validate(composed("logger=wandb_tensorboard", "logger.wandb.mode=sometimes"))
    with pytest.raises(UserError, match="projct is not an argument"):
        build(composed("logger=wandb_tensorboard", "+logger.wandb.projct=x"))


def test_a_wandb_that_does_not_answer(tmp_path, monkeypatch, caplog, offline_runs):
    """Asked for: an error, before anything is trained. Not asked for: offline, and a warning."""
    init = wandb.init

    def unreachable(**settings):
        if settings["mode"] == "online":
            raise wandb.errors.CommError("no such host\nand more")
        return init(**settings)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(ValueError, match=r"no such host; to go without: logger\.mode=offline or logger=none"):
        wandb_run(tmp_path / "a", mode="online")
    with caplog.at_level(logging.WARNING, logger="qdm_lightning"):
        wandb_run(tmp_path / "b")
    assert "W&B cannot be reached (no such host): this run is logged offline" in caplog.text
    assert len(offline_runs(tmp_path / "b")) == 1
