"""The paper's experiments: every setting that makes them the paper's, the networks that they build, what they ask for."""

from itertools import product
from pathlib import Path

import pytest
import torch

from qdm_lightning.cli import training
from qdm_lightning.cli.build import build_student
from qdm_lightning.cli.help import options
from qdm_lightning.cli.validate import validate
from qdm_lightning.metrics import inception
from qdm_lightning.metrics.spec import InceptionMetric
from qdm_lightning.quantization import prepare
from qdm_lightning.quantization.spec import TaQScale

PARAMETERS = {"cifar10": 35_746_307, "celeba": 78_700_803, "imagenet64": 121_059_459}
SIZES = {"cifar10": 32, "celeba": 64, "imagenet64": 64}
NAMES = [f"{data}_{sampler}" for data, sampler in product(PARAMETERS, ("ddpm", "ddim"))]
QUANTS = {"w4a4": 4, "w3a3": 3, "w2a2": 2}


def test_there_are_six():
    assert [option.name for option in options("experiment") if option.name.startswith("paper/")] == sorted(
        f"paper/{name}" for name in NAMES
    )


@pytest.mark.parametrize(("name", "quant"), list(product(NAMES, QUANTS)))
def test_settings_are_ddpms(name, quant, composed):
    s = validate(composed(f"experiment=paper/{name}", f"quant={quant}"))
    data, sampler = name.split("_")
    process, teacher, optimizer = s.diffusion, s.teacher, s.optimizer
    assert (process.num_train_timesteps, process.beta_start, process.beta_end) == (1000, 1e-4, 0.02)
    assert process.beta_schedule == "linear"
    assert (s.data.batch_size, s.data.flip, s.data.image_size, s.model.sample_size) == (128, True, SIZES[data], SIZES[data])
    assert s.model.dropout == 0.1
    assert (teacher.source, teacher.lr, teacher.warmup_steps, teacher.schedule) == ("auto", 2e-4, 5000, "constant")
    assert 10 <= round(teacher.lr / optimizer.lr) <= 100
    assert (optimizer.beta1, optimizer.beta2, optimizer.schedule) == (0.9, 0.999, "constant")
    assert teacher.ema_decay == optimizer.ema_decay == 0.9999
    assert teacher.gradient_clip == optimizer.gradient_clip == 1
    assert teacher.max_steps == s.trainer.max_steps == (800_000 if data == "cifar10" else 500_000)
    assert (s.sampler.kind, s.sampler.steps) == (sampler, 1000 if sampler == "ddpm" else 100)
    assert (s.sampler.variance, s.sampler.eta) == ("fixed_large", 0)
    assert s.num_samples == 50_000
    assert isinstance(s.metrics, InceptionMetric)
    assert (s.quant.weight_bits, s.quant.act_bits, s.quant.probs_bits, s.quant.first_last_bits) == (QUANTS[quant],) * 2 + (8, 8)
    assert (type(s.taq), s.taq.scope) == (TaQScale, "all")
    assert s.nem.mode == "replace"


@pytest.mark.parametrize("data", PARAMETERS)
def test_network_and_student_are_built(data, composed):
    for quant, bits in QUANTS.items():
        build_model, config, quantizers = build_student(composed(f"experiment=paper/{data}_ddpm", f"quant={quant}"))
        with torch.device("meta"):
            unet = build_model()
            assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[data]
            report = prepare(unet, config, quantizers)
        rows = {row.name: (row.weight_bits, row.act_bits) for row in report.quantized}
        assert rows["conv_in"] == rows["conv_out"] == rows["time_embedding.linear_1"] == (8, 8)
        assert rows["mid_block.resnets.0.conv1"] == (bits, bits)
        assert rows["mid_block.attentions.0.qkv"] == (32, bits)


def test_ddim_shares_network_and_teacher_with_ddpm(composed):
    for data in PARAMETERS:
        one, two = (composed(f"experiment=paper/{data}_{sampler}") for sampler in ("ddpm", "ddim"))
        assert all(
            one[group] == two[group] for group in ("data", "model", "diffusion", "quant", "teacher", "optimizer", "trainer")
        )


def test_only_a_trial_that_is_asked_for_is_short(composed):
    s = validate(composed("experiment=paper/cifar10_ddim", "debug=trial"))
    assert (s.trial, s.teacher.max_steps, s.trainer.max_steps, s.num_samples, s.sampler.batch_size) == (True, 2, 2, 16, 16)
    s = validate(composed("experiment=paper/cifar10_ddim", "trainer.max_steps=2"))
    assert (s.trial, s.teacher.max_steps, s.num_samples, s.sampler.batch_size) == (False, 2, 50_000, 128)
    s = validate(composed("experiment=paper/cifar10_ddim", "debug=trial", "num_samples=64"))
    assert s.num_samples == 64


def test_full_precision_trains_the_very_teacher(composed):
    student, teacher = (validate(composed("experiment=paper/celeba_ddpm", f"quant={quant}")) for quant in ("w4a4", "fp32"))
    taken = ("lr", "warmup_steps", "schedule", "ema_decay", "gradient_clip")
    assert [getattr(teacher.optimizer, name) for name in taken] == [getattr(student.teacher, name) for name in taken]
    assert teacher.trainer.max_steps == student.teacher.max_steps
    assert teacher.nem.mode == "off"


def test_a_teacher_from_a_diffusers_folder(composed):
    typed = ["experiment=paper/cifar10_ddim", "teacher=pretrained", "teacher.path=google/ddpm-cifar10-32"]
    s = validate(composed(*typed, "model=pretrained"))
    assert (s.model.path, s.teacher.source, s.optimizer.lr) == ("google/ddpm-cifar10-32", "pretrained", 2e-5)


def test_what_is_missing_is_one_line_before_anything_begins(tmp_path, monkeypatch, capsys, command_line):
    def refused(words, capsys):
        with pytest.raises(SystemExit) as end:
            command_line(training.Training("train", (), pytest.fail), *words)
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert error.count("\n") == 1
        return error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"http://127.0.0.1:9/{inception.WEIGHTS}")  # nobody listens there
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    trial = ["experiment=paper/cifar10_ddim", "quant=w4a4", "debug=trial"]
    assert "metrics=inception needs weights-inception" in refused(trial, capsys)
    assert "no such file" in refused([*trial, "metrics.weights=nowhere.pth"], capsys)
    assert "metrics=resnet20 needs trained weights" in refused([*trial, "metrics=resnet20"], capsys)
    assert "beside an experiment, type model=pretrained" in refused([*trial, "teacher=pretrained", "teacher.path=a/b"], capsys)
    assert [path.name for path in Path().rglob("*") if path.is_file()] == []
