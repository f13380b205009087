"""A run that version 0.1 stored (taq=ema, settings under their old names): its networks load, and are each other's."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from qdm_lightning import load_student
from qdm_lightning.cli.build import build
from qdm_lightning.cli.schema import TrainConfig
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.quantization import timesteps
from qdm_lightning.reporting.records import read_settings as read_run_settings
from qdm_lightning.runs.formats import upgraded
from qdm_lightning.training.restore import restore_student, restore_teacher
from qdm_lightning.training.student_files import read_student

RUN = Path(__file__).parents[2] / "assets" / "stored_run_0_1"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def experiment():
    """That of the stored run, as the command line reads it."""
    cfg = OmegaConf.merge(
        OmegaConf.structured(TrainConfig), upgraded(OmegaConf.to_container(OmegaConf.load(RUN / "config.yaml")))
    )
    cfg.run = str(RUN)
    return build(cfg)


def estimate(network: torch.nn.Module) -> torch.Tensor:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    with torch.no_grad(), timesteps(t):
        return network(x, t).sample


def test_the_settings_have_the_names_of_today():
    settings = read_student(RUN).settings
    assert settings["quant"]["first_last_bits"] == 7
    assert settings["taq"]["_target_"].endswith("EMANormalizedActivation")
    assert settings["taq"]["scope"] == "qkv"  # which was called attention
    assert settings["quant"]["act_quantizer"]["_target_"].endswith("LSQActivation")


def test_a_report_knows_how_it_behaved_where_a_setting_came_later():
    settings = read_run_settings(RUN / "config.yaml")
    assert settings["trial"] is False
    assert settings["teacher.retrain"] is False


def test_the_student_of_the_folder_is_that_of_the_checkpoint(experiment):
    with pytest.warns(UserWarning, match=r"model\.safetensors does not say of which bits, TaQ and schedule its weights are"):
        loaded = load_student(RUN)
    restored = restore_student(experiment, CPU)
    assert "best.ckpt does not say of which bits, TaQ and schedule" in restored.origin["warning"]
    assert restored.origin["step"] > 0
    assert loaded.conv_in.input_quantizer.bits == 7
    assert torch.equal(estimate(loaded), estimate(restored.network.unet))
    assert not torch.equal(estimate(loaded), estimate(load_unet(RUN / "teacher")))


def test_the_teacher(experiment):
    restored = restore_teacher(experiment, CPU).network.unet.state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in load_unet(RUN / "teacher").state_dict().items())
