"""A teacher from a diffusers folder: networks of several builds become students; a folder of another process is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hydra import compose, initialize_config_dir

from qdm_lightning import load_student
from qdm_lightning.cli.schema import CONF_DIR
from qdm_lightning.display.progress import Progress
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.quantization import QuantConfig, prepare, timesteps
from qdm_lightning.train import train

BUILDS = {
    "ddpm": {"downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False, "attention_head_dim": None, "dropout": 0.1},
    "gray, resnet sampling": {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
    },
    "skip, no attention": {
        "down_block_types": ("SkipDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 64),
        "add_attention": False,
    },
    "four channels, heads": {"in_channels": 4, "out_channels": 4, "attention_head_dim": 4, "attn_norm_num_groups": 4},
}
TRIAL = """
    taq.scope=all metrics=custom trainer.max_steps=2 trainer.val_images=32
    trainer.accelerator=cpu trainer.compile=off data.batch_size=4
    quant.calibration_batches=1 quant.calibrator.steps=2 sampler.steps=2 sampler.batch_size=4 num_samples=4 logger=none
"""


class Means(torch.nn.Module):
    name, dim = "means", 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 2).flatten(1)


def unet_of(build: str) -> UNet2DModel:
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**settings | BUILDS[build]).eval()


def estimate(unet: torch.nn.Module, channels: int) -> torch.Tensor:
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([1, 500])
    with torch.no_grad(), timesteps(t):
        return unet(x, t).sample


def run(teacher: Path, tmp_path: Path, channels: int, *overrides: str):
    pictures = tmp_path / "pictures.npz"
    np.savez(pictures, images=np.random.default_rng(0).integers(0, 256, (20, 8, 8, channels), dtype=np.uint8))
    typed = [
        *TRIAL.split(),
        f"metrics._target_={__name__}.Means",
        "teacher=pretrained",
        f"teacher.path={teacher}",
        "data=images",
        f"data.path={pictures}",
        f"data.channels={channels}",
        f"paths.cache={tmp_path / 'cache'}",
        f"paths.output={tmp_path / 'runs'}",
        *overrides,
    ]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return train(compose("train", typed), Progress("silent"))


@pytest.mark.parametrize("build", BUILDS)
def test_prepared_at_32_bits_it_is_diffusers_own(build, tmp_path):
    theirs = unet_of(build)
    theirs.save_pretrained(tmp_path / "folder")
    ours = load_unet(tmp_path / "folder")
    assert prepare(ours, QuantConfig(weight_bits=32, act_bits=32, probs_bits=32, first_last_bits=32)).quantized == []
    channels = theirs.config.in_channels
    assert torch.equal(estimate(ours, channels), estimate(theirs, channels))


@pytest.mark.parametrize("build", [name for name in BUILDS if "four" not in name])
def test_a_folder_becomes_a_student(build, tmp_path):
    theirs = unet_of(build)
    theirs.save_pretrained(tmp_path / "folder")
    channels = theirs.config.in_channels
    result = run(tmp_path / "folder", tmp_path, channels)
    origin = json.loads((result.run_dir / "metrics.json").read_text())["teacher_origin"]
    assert origin["source"] == "pretrained"
    assert (
        "has no scheduler beside it: its noise schedule was taken to be diffusion.num_train_timesteps=1000" in origin["warning"]
    )
    kept = UNet2DModel.from_pretrained(result.run_dir / "teacher" / "unet", low_cpu_mem_usage=False)
    assert torch.equal(estimate(kept, channels), estimate(theirs, channels))
    student = load_student(result.run_dir)
    assert torch.equal(estimate(student, channels), estimate(result.student.unet, channels))
    assert not torch.equal(estimate(student, channels), estimate(theirs, channels))


def test_another_noise_schedule_is_refused_until_it_is_typed(tmp_path):
    schedule = DDPMScheduler(num_train_timesteps=500, beta_start=1e-3, beta_end=0.03)
    DDPMPipeline(unet=unet_of("ddpm"), scheduler=schedule).save_pretrained(tmp_path / "folder")
    wanted = ["diffusion.num_train_timesteps=500", "diffusion.beta_start=0.001", "diffusion.beta_end=0.03"]
    with pytest.raises(ValueError, match=r"trained on another noise schedule: type " + " ".join(wanted)):
        run(tmp_path / "folder", tmp_path, 3)
    left = {file.name for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    assert left == {"config.yaml", ".config.yaml.sha256", ".lock"}  # the command removes them
    result = run(tmp_path / "folder", tmp_path, 3, *wanted)
    assert DDPMScheduler.from_pretrained(result.run_dir / "teacher" / "scheduler").config.beta_end == 0.03
    again = run(
        result.run_dir, tmp_path, 3, *wanted, "teacher=checkpoint", "model=pretrained", f"model.path={tmp_path / 'folder'}"
    )
    assert again.metrics["teacher"] == result.metrics["teacher"]
    assert "warning" not in again.metrics["teacher_origin"]
