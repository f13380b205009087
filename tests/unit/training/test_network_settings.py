"""Weights of another network with the same names and shapes: every reader refuses them, and names the difference."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdm_lightning import load_student
from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.build import build
from qdm_lightning.cli.compose import stored
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.train import train
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.network_settings import KEY, check_settings, network_settings, quantization_settings, unet_config
from qdm_lightning.training.restore import restore_student
from qdm_lightning.training.student_files import WEIGHTS

CPU = torch.device("cpu")
TINY = """
    model.block_out_channels=[8,16] model.norm_num_groups=4 data.batch_size=8 teacher.max_steps=1 trainer.max_steps=2
    trainer.val_every=1 trainer.compile=off trainer.accelerator=cpu trainer.threads=1 quant.calibration_batches=1
    quant.calibrator.steps=2 sampler.steps=2 num_samples=4 trainer.val_images=16 logger=none
"""
OTHERS = {
    "quant=w3a3": r"quant\.weight_bits=3, not 4",
    "quant=w4a8": r"quant\.act_bits=8, not 4",
    "quant.qkv_bits=8": r"quant\.qkv_bits=8, not 4",
    "quant.rules={conv_out: 5}": r"quant\.rules=\{'conv_out': 5\}, not \{\}",
    "taq=off": "taq=off, not scale",
    "taq=ema": "taq=ema, not scale",
    "taq.scope=qkv": r"taq\.scope=qkv, not all",
    "taq.scope=[*query]": r"taq\.scope=\['\*query'\], not all",
    "quant.channel_scales=rms": r"quant\.channel_scales=rms, not off",
    "taq.groups=10": r"taq\.groups=10, not 20",
    "diffusion.beta_schedule=squaredcos_cap_v2": r"diffusion\.beta_schedule=squaredcos_cap_v2, not linear",
    "model.freq_shift=1": r"unet\.freq_shift=1, not 0",
}
"""Settings beside those of the run that is given such files, and what is said; most have its names and shapes."""


@pytest.fixture
def settings(composed, tmp_path):
    """`settings(*overrides)`: what shapes the student of a run, without the run."""

    def of(*overrides: str) -> dict:
        e = build(composed(*TINY.split(), f"paths.output={tmp_path}", *overrides))
        return network_settings(unet_config(e.build_model()), e.diffusion, quantization_settings(e.resolved))

    return of


@pytest.fixture
def run(tmp_path_factory, composed):
    """`run(*overrides)`: folder of such a finished run, made once; not to be written into."""
    root = tmp_path_factory.getbasetemp() / "network_settings"

    def run_it(*overrides: str) -> Path:
        place = root / ("_".join(overrides) or "own")
        if not place.is_dir():
            cfg = composed(*TINY.split(), f"paths.cache={root / 'cache'}", *overrides)
            cfg.run = str(place)
            train(cfg, Progress("silent"))
        return place

    return run_it


@pytest.fixture
def own(run, tmp_path):
    """A copy of the run to be given files of others."""
    return Path(shutil.copytree(run(), tmp_path / "own", ignore=shutil.ignore_patterns(".*.sha256")))


def experiment(folder):
    return evaluate.check(evaluate.compose(folder))[0]


def without_settings(checkpoint):
    """As a version before wrote it."""
    content = load_checkpoint(checkpoint)
    del content[KEY]
    torch.save(content, checkpoint)


@pytest.mark.parametrize("other", OTHERS)
def test_settings_that_shape_a_network_are_told_apart(settings, other):
    mine, theirs = settings(), settings(other)
    with pytest.raises(UserError, match=rf"best\.ckpt is of another network: {OTHERS[other]}$") as raised:
        check_settings(theirs, mine, Path("best.ckpt"))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError):
        check_settings(mine, theirs, Path("best.ckpt"))
    assert check_settings(json.loads(json.dumps(theirs)), settings(other), Path("best.ckpt")) == ""


def test_settings_that_say_the_same_in_other_words_are_no_difference(settings):
    mine = settings()
    assert settings("quant.qkv_bits=4") == mine
    assert settings("taq=off", "taq.scope=all") == settings("taq=off")
    assert settings("seed=3", "trainer.max_steps=7", "nem=off", "model.dropout=0.2", "quant.calibrator.steps=9") == mine
    order = ["{conv_*: 8, conv_out: 5}", "{conv_out: 5, conv_*: 8}"]
    one, two = (settings(f"quant.rules={rules}") for rules in order)  # the last one wins
    with pytest.raises(UserError, match=r"quant\.rules="):
        check_settings(one, two, Path("best.ckpt"))


def test_checkpoints_and_students_say_what_they_are_of(run, settings):
    expected = settings()
    for name in ("best", "last"):
        assert load_checkpoint(run() / "checkpoints" / f"{name}.ckpt")[KEY] == expected
    other = load_checkpoint(run("quant=w3a3") / "checkpoints" / "best.ckpt")
    assert other[KEY] == settings("quant=w3a3")
    assert other["state_dict"].keys() == load_checkpoint(run() / "checkpoints" / "best.ckpt")["state_dict"].keys()


def test_a_checkpoint_of_other_bits_is_not_evaluated(run, own):
    file = run("quant=w3a3") / "checkpoints" / "best.ckpt"
    for weights in ("ema", "raw"):
        with pytest.raises(UserError, match=r"best\.ckpt is of another network: quant\.weight_bits=3, not 4"):
            restore_student(experiment(own), CPU, checkpoint=str(file), weights=weights)
    shutil.copy(file, own / "checkpoints")
    with pytest.raises(UserError, match=r"quant\.weight_bits=3, not 4"):
        restore_student(experiment(own), CPU)


def test_a_run_does_not_go_on_from_a_checkpoint_of_other_bits(run, own):
    (own / "metrics.json").unlink()
    shutil.copy(run("quant=w3a3") / "checkpoints" / "last.ckpt", own / "checkpoints")
    before = {file: file.read_bytes() for file in own.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"last\.ckpt is of another network: quant\.weight_bits=3, not 4$"):
        train(stored(own), Progress("silent"))
    assert {file: file.read_bytes() for file in own.rglob("*") if file.is_file()} == before
    shutil.copy(run() / "checkpoints" / "last.ckpt", own / "checkpoints")
    shutil.copy(run("quant=w3a3") / "checkpoints" / "best.ckpt", own / "checkpoints")
    with pytest.raises(UserError, match=r"best\.ckpt is of another network: quant\.weight_bits=3, not 4$"):
        train(stored(own), Progress("silent"))


def test_a_student_in_the_place_of_another_is_refused(run, own):
    """Its whole folder, where the run tells, and its weights alone, where the folder does."""
    other = run("quant=w3a3") / "student"
    shutil.copy(other / WEIGHTS, own / "student" / WEIGHTS)
    ptq = experiment(own)
    ptq.quant.mode = "ptq"
    said = r"model\.safetensors is of another network: quant\.weight_bits=3, not 4$"
    for read in (lambda: load_student(own), lambda: load_student(own / "student"), lambda: restore_student(ptq, CPU)):
        with pytest.raises(UserError, match=said):
            read()
    save_file(load_file(other / WEIGHTS), own / "student" / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors does not say of which bits"):
        load_student(own)
    shutil.rmtree(own / "student")
    shutil.copytree(other, own / "student")
    for read in (lambda: load_student(own), lambda: restore_student(ptq, CPU)):
        with pytest.raises(UserError, match=r"config\.json is of another network: quant\.weight_bits=3, not 4$"):
            read()
    assert load_student(own / "student").conv_in.weight.shape == (8, 1, 3, 3)


def test_a_students_checkpoint_is_no_teacher(run, composed, tmp_path):
    file = run() / "checkpoints" / "best.ckpt"
    shutil.copy(file, tmp_path / "alone.ckpt")
    cfg = composed(*TINY.split(), f"paths.output={tmp_path}", "teacher=checkpoint", f"teacher.path={tmp_path / 'alone.ckpt'}")
    with pytest.raises(UserError, match=r"alone\.ckpt is of another network: taq=scale, not off"):
        train(cfg, Progress("silent"))


def test_a_checkpoint_of_before_is_taken_with_a_warning_that_the_records_keep(own):
    for name in ("best", "last"):
        without_settings(own / "checkpoints" / f"{name}.ckpt")
    said = "best.ckpt does not say of which bits, TaQ and schedule its weights are: names and shapes alone were checked"
    assert restore_student(experiment(own), CPU).origin["warning"].endswith(said)
    record = evaluate(own, ["scores=fd", "num_samples=4"], Progress("silent")).record
    assert [line for line in record["warnings"] if line.endswith(said)]
    (own / "metrics.json").unlink()
    again = train(stored(own), Progress("silent"))
    assert any("names and shapes alone were checked" in line for line in again.metrics["warnings"])
    assert json.loads((own / "metrics.json").read_text())["warnings"] == again.metrics["warnings"]


def test_a_checkpoint_of_a_later_version_or_with_half_its_settings_is_refused(own):
    file = own / "checkpoints" / "best.ckpt"
    content = load_checkpoint(file)
    content[KEY]["format"] = 3
    torch.save(content, file)
    with pytest.raises(UserError, match=r"best\.ckpt has format 3, this version reads up to 2"):
        restore_student(experiment(own), CPU)
    for said, message in (([], "has format None"), ({"format": 2}, "is of another network: taq is missing")):
        torch.save({**content, KEY: said}, file)
        with pytest.raises(UserError, match=message):
            restore_student(experiment(own), CPU)
