"""The adapters against diffusers' own v-prediction, and a run of such a teacher."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from qdm_lightning import draw_images, load_student
from qdm_lightning.diffusion.process import add_noise, noise_scheduler
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.display.progress import Progress
from qdm_lightning.models.denoiser import Denoiser, VelocityDenoiser, denoiser
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.quantization import QuantConfig, compiled, prepare
from qdm_lightning.train import train

VELOCITY = DiffusionConfig(prediction_type="v_prediction")
TINY = """
    data.batch_size=4 trainer.max_steps=2 trainer.val_images=32 trainer.accelerator=cpu trainer.compile=off trainer.threads=1
    quant.calibration_batches=1 quant.calibrator.steps=2 sampler.steps=2 sampler.batch_size=4 num_samples=4 logger=none
"""


@pytest.fixture(scope="module")
def unet():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    settings = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, **blocks}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **settings).eval()


def test_the_noise_of_the_true_v_is_the_noise():
    x0, eps = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    t, scheduler = torch.tensor([0, 300, 999]), noise_scheduler(VELOCITY)

    class True_(torch.nn.Module):
        def forward(self, x, timestep, return_dict=True):
            return (scheduler.get_velocity(x0, eps, timestep),)

    found = VelocityDenoiser(True_(), VELOCITY)(add_noise(scheduler, x0, eps, t), t)
    torch.testing.assert_close(found, eps, rtol=0, atol=1e-6)


def test_the_adapter_is_chosen_and_keeps_no_state(unet):
    assert type(denoiser(unet, DiffusionConfig())) is Denoiser
    assert denoiser(unet, VELOCITY).state_dict().keys() == Denoiser(unet).state_dict().keys()
    assert DiffusionConfig().settings().keys() == {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"}
    assert DiffusionConfig(**VELOCITY.settings()) == VELOCITY
    with pytest.raises(ValueError, match=r"diffusion\.prediction_type=sample is not allowed: choose one of epsilon, v_pred"):
        DiffusionConfig(prediction_type="sample")


def theirs(pipeline, steps, **options):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    images = pipeline(batch_size=2, generator=generators, num_inference_steps=steps, output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def test_prepared_at_32_bits_it_draws_the_images_of_diffusers(unet, tmp_path):
    DDPMPipeline(unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path)
    ours = load_unet(tmp_path)
    prepare(ours, QuantConfig(weight_bits=32, act_bits=32, probs_bits=32, first_last_bits=32))
    ancestral = DDPMScheduler(prediction_type="v_prediction", variance_type="fixed_large", clip_sample=True)
    drawn = draw_images(ours, [5, 6], SamplerConfig(kind="ddpm", steps=20, batch_size=2), VELOCITY)
    torch.testing.assert_close(drawn, theirs(DDPMPipeline(unet, ancestral), 20), rtol=0, atol=2e-4)
    implicit = DDIMScheduler(prediction_type="v_prediction", clip_sample=True, timestep_spacing="leading")
    drawn = draw_images(ours, [5, 6], SamplerConfig(steps=20, batch_size=2), VELOCITY)
    torch.testing.assert_close(
        drawn, theirs(DDIMPipeline(unet, implicit), 20, use_clipped_model_output=True), rtol=0, atol=2e-4
    )


def test_a_teacher_that_estimates_v_becomes_a_student_that_diffusers_samples(unet, tmp_path, composed):
    compiled.set_mode("off")
    DDPMPipeline(unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "teacher")
    np.savez(tmp_path / "p.npz", images=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))
    words = ["teacher=pretrained", f"teacher.path={tmp_path / 'teacher'}", "data=images", f"data.path={tmp_path / 'p.npz'}"]
    words += ["data.channels=1", f"paths.cache={tmp_path / 'cache'}", f"paths.output={tmp_path / 'runs'}"]
    with pytest.raises(
        ValueError, match=r"was trained on another noise schedule: type diffusion\.prediction_type=v_prediction"
    ):
        train(composed(*TINY.split(), *words), Progress("silent"))
    result = train(composed(*TINY.split(), *words, "diffusion.prediction_type=v_prediction"), Progress("silent"))
    assert isinstance(result.student, VelocityDenoiser)
    pipeline = DDPMPipeline.from_pretrained(result.run_dir / "student")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    drawn = draw_images(load_student(result.run_dir), [5, 6], SamplerConfig(kind="ddpm", steps=10, batch_size=2))
    assert (drawn - theirs(pipeline, 10)).abs().max() < 2 / 255
