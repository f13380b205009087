"""`cli.build`: the experiment is exactly what the configuration says."""

from functools import partial

import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.build import build
from qdm_lightning.cli.compose import stored
from qdm_lightning.cli.schema import plain
from qdm_lightning.cli.validate import validate
from qdm_lightning.data.digits import DigitsData
from qdm_lightning.loggers import wandb_logger
from qdm_lightning.metrics.digits import DigitsFeatures
from qdm_lightning.models.unet import build_unet
from qdm_lightning.quantization.calibration import MSESearch
from qdm_lightning.quantization.quantizer import LSQActivation, LSQWeight
from qdm_lightning.quantization.taq import EMANormalizedActivation, GroupedActivation, NormalizedActivation
from qdm_lightning.train import train


def test_main_job(composed):
    e = build(composed("data.batch_size=32", "paths.output=/somewhere"))
    assert isinstance(e.data, DigitsData)
    assert e.data.batch_size == 32
    assert isinstance(e.feature_network, DigitsFeatures)
    assert e.build_model.func is build_unet
    assert e.build_model.keywords["block_out_channels"] == [32, 48]
    assert type(e.build_model.keywords["block_out_channels"]) is list
    factories = (e.quantizers.weight, e.quantizers.activation, e.quantizers.of("a.query", "attention"), e.calibrator)
    assert [factory.func for factory in factories] == [LSQWeight, LSQActivation, GroupedActivation, MSESearch]
    assert [logger.func for logger in e.loggers] == [wandb_logger]
    assert (e.callbacks, e.resume) == ([], False)
    assert str(e.run_dir.parent) == "/somewhere"
    assert all(type(factory) is partial for factory in factories)


@pytest.mark.parametrize(
    ("taq", "quantizer", "settings"),
    [
        ("off", LSQActivation, {}),
        ("normalize", NormalizedActivation, {"psi"}),
        ("ema", EMANormalizedActivation, {"psi", "groups", "momentum"}),
        ("scale", GroupedActivation, {"groups"}),
    ],
)
def test_taq_gives_its_settings_without_the_scope(taq, quantizer, settings, composed):
    quantizers = build(composed(f"taq={taq}", "taq.scope=all")).quantizers
    factory = quantizers.of("a.query", "attention")
    assert quantizers.of("conv", "activation") is factory
    assert factory.func is quantizer
    assert set(factory.keywords) >= set(settings)
    assert "scope" not in factory.keywords


def test_settings_reach_the_factories(composed):
    e = build(
        composed("taq.groups=5", "callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor", "logger.project=p")
    )
    assert e.quantizers.taq.keywords == {"groups": 5, "num_train_timesteps": 1000}
    assert [type(callback) for callback in e.callbacks] == [LearningRateMonitor]
    assert e.loggers[0].keywords["project"] == "p"


def test_a_run_at_32_bits_trains_the_teacher_that_students_share(composed):
    teacher, student = build(composed("quant=fp32")), build(composed())
    assert teacher.quant.is_float
    assert teacher.teacher == student.teacher


def test_a_run_at_32_bits_follows_its_own_settings(composed):
    e = build(composed("quant=fp32", "trainer.max_steps=100", "seed=3", "optimizer.lr=0.5"))
    assert (e.teacher.max_steps, e.teacher.seed, e.teacher.lr) == (100, 3, 0.5)
    assert validate(composed("quant=fp32", "teacher.max_steps=7")).trainer.max_steps == 7


def test_pretrained_teacher_brings_its_network(composed):
    settings = validate(composed("teacher=pretrained", "teacher.path=google/ddpm-cifar10-32", "data=cifar10"))
    assert settings.model.path == settings.teacher.path == "google/ddpm-cifar10-32"


def test_stored_settings_build_the_same(composed, tmp_path):
    cfg = composed("taq=ema", "nem=add")
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    again = stored(tmp_path)
    assert plain(again) == plain(cfg) | {"run": str(tmp_path)}
    assert validate(again).taq == validate(cfg).taq
    assert build(again).resume


def test_going_on_with_other_settings_is_refused(composed, tmp_path):
    OmegaConf.save(composed(), tmp_path / "config.yaml", resolve=True)
    with pytest.raises(UserError, match=r"another configuration \(seed=0, not 1\)"):
        train(composed("seed=1", f"run={tmp_path}"))
