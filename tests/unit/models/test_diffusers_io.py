import itertools
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.models.diffusers_io import load_diffusion, load_unet, save_pipeline

PROCESS = DiffusionConfig(num_train_timesteps=20, beta_start=1e-3, beta_end=0.3, beta_schedule="scaled_linear")
SCHEDULE = {name: value for name, value in asdict(PROCESS).items() if name not in ("label_dropout", "variance_type")}
"""What a scheduler says of it."""
FIXED = {"variance_type": "fixed"}
"""What the channels of the U-Net say."""
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

ARCHITECTURES = {
    "one channel": {"in_channels": 1, "out_channels": 1},
    "four channels, heads": {"in_channels": 4, "out_channels": 4, "attention_head_dim": 8},
    "ddpm": {"downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False, "attention_head_dim": None},
    "resnet sampling, scale shift": {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 32,
    },
    "skip": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 64),
    },
    "learned embedding, pooled": {
        "time_embedding_type": "learned",
        "num_train_timesteps": 20,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
}


def unet_of(**changes):
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**settings | changes).eval()


def estimate(unet):
    x = torch.randn(2, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return unet(x, torch.tensor([1, 15])).sample


def without_checksums(folder):
    """For files that are changed."""
    for checksum in folder.rglob(".*.sha256"):
        checksum.unlink()
    return folder


@pytest.fixture
def folder(tmp_path):
    return without_checksums(save_pipeline(unet_of(), PROCESS, tmp_path / "teacher"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folder_goes_in_and_comes_out_with_the_same_output(tmp_path, name):
    theirs = unet_of(**ARCHITECTURES[name])
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_unet(tmp_path / "theirs")
    assert torch.equal(estimate(read), estimate(theirs))
    ours = save_pipeline(read, PROCESS, tmp_path / "ours")
    assert torch.equal(estimate(UNet2DModel.from_pretrained(ours / "unet", low_cpu_mem_usage=False)), estimate(theirs))
    assert torch.equal(estimate(load_unet(ours)), estimate(theirs))


def test_pipeline_reads_and_samples_identically(folder):
    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline(batch_size=2, generator=generator, num_inference_steps=20, output_type="np").images

    scheduler = DDPMScheduler(**SCHEDULE, variance_type="fixed_large", clip_sample=True)
    read = DDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert (draw(read) == draw(DDPMPipeline(unet=unet_of(), scheduler=scheduler))).all()
    assert load_diffusion(folder) == SCHEDULE | FIXED


def test_saving_changes_neither_network_nor_its_values(tmp_path):
    unet = unet_of().to(memory_format=torch.channels_last)
    save_pipeline(unet, PROCESS, tmp_path / "a")
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in load_unet(tmp_path / "a").state_dict().items():
        assert torch.equal(value, unet.state_dict()[name])


def test_loaded_network_is_float32_and_in_eval_mode(tmp_path):
    unet_of(dropout=0.5).half().save_pretrained(tmp_path)
    unet = load_unet(tmp_path)
    assert not unet.training
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


def test_old_attention_names_are_read(folder):
    """Checkpoints from before 2023, google/ddpm-cifar10-32 among them, call the attention's layers otherwise."""
    expected = estimate(load_unet(folder))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / WEIGHTS)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(estimate(load_unet(folder)), expected)


def test_process_is_found_beside_the_network(folder, tmp_path):
    assert load_diffusion(folder / "unet") == SCHEDULE | FIXED
    flat = tmp_path / "flat"  # as google/ddpm-cifar10-32 lies on the hub
    shutil.copytree(folder / "unet", flat)
    assert load_diffusion(flat) is None
    (flat / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler", "beta_end": 0.01}')
    assert load_diffusion(flat) == {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.01,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "variance_type": "fixed",
    }


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler]
)
def test_other_samplers_of_the_same_process_are_read(folder, scheduler):
    scheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    assert load_diffusion(folder) == SCHEDULE | FIXED
    assert torch.equal(estimate(load_unet(folder)), estimate(unet_of()))
    defaults = dict(DDPMScheduler().config)
    assert {name: scheduler().config[name] for name in SCHEDULE} == {name: defaults[name] for name in SCHEDULE}


def in_scheduler(**entries):
    """Changed entries of the scheduler's file."""

    def edit(folder):
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return edit


def in_index(**entries):
    def edit(folder):
        index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "X"]}
        (folder / "model_index.json").write_text(json.dumps(index | entries))

    return edit


OTHER_PROCESSES = {
    "score SDE": (in_scheduler(_class_name="ScoreSdeVeScheduler"), "_class_name=ScoreSdeVeScheduler"),
    "Karras": (in_scheduler(_class_name="KarrasVeScheduler"), "_class_name=KarrasVeScheduler"),
    "EDM": (in_scheduler(_class_name="EDMEulerScheduler"), "_class_name=EDMEulerScheduler"),
    "VQ": (in_scheduler(_class_name="VQDiffusionScheduler"), "_class_name=VQDiffusionScheduler"),
    "flow": (in_scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), "_class_name=FlowMatchEulerDiscreteScheduler"),
    "no class": (in_scheduler(_class_name=None), "_class_name=None"),
    "sigmoid betas": (in_scheduler(beta_schedule="sigmoid"), "beta_schedule=sigmoid"),
    "sample": (in_scheduler(prediction_type="sample"), "prediction_type=sample"),
    "own betas": (in_scheduler(trained_betas=[0.1]), "trained_betas="),
    "zero SNR": (in_scheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True"),
    "flow in a solver": (in_scheduler(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas=True"),
    "learned variance": (in_scheduler(variance_type="learned_range"), "variance_type=learned_range"),
    "latents": (
        in_index(_class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]),
        "has a vqvae, so its U-Net works on latents",
    ),
    "latents, no index": (lambda folder: (folder / "vae").mkdir(), "has a vae, so its U-Net works on latents"),
    "another pipeline": (in_index(_class_name="ScoreSdeVePipeline"), "is of another process: ScoreSdeVePipeline"),
    "another part": (in_index(text_encoder=["transformers", "CLIPTextModel"]), "DDPMPipeline of unet, scheduler, text_encoder"),
}


@pytest.mark.parametrize("name", OTHER_PROCESSES)
def test_a_network_of_another_process_is_refused(folder, name):
    """By the folder and by its U-Net's own; the message names what is supported, and no way around."""
    change, message = OTHER_PROCESSES[name]
    change(folder)
    for place, read in itertools.product((folder, folder / "unet"), (load_unet, load_diffusion)):
        with pytest.raises(ValueError, match=message) as raised:
            read(place)
        assert "supported are UNet2DModels, class-conditional or not, that estimate the noise of pixels" in str(raised.value)
        assert "type " not in str(raised.value)
        assert "\n" not in str(raised.value)


def test_betas_that_no_run_has_are_refused(folder):
    in_scheduler(beta_start=0.0)(folder)
    with pytest.raises(ValueError, match=r"is of another process: num_train_timesteps=20, beta_start=0\.0, "):
        load_diffusion(folder)


def test_the_schedule_of_a_network_in_a_training_folder(tmp_path):
    """As diffusers' own training leaves it: the scheduler lies beside `unet`, its average and its checkpoints."""
    whole = without_checksums(save_pipeline(unet_of(), PROCESS, tmp_path / "out"))
    copies = ("unet_ema", "checkpoint-20/unet", "checkpoint-20/unet_ema")
    for copy in copies:
        shutil.copytree(whole / "unet", whole / copy)
    assert all(load_diffusion(whole / copy) == SCHEDULE | FIXED for copy in ("", "unet", "checkpoint-20", *copies))
    in_scheduler(prediction_type="sample")(whole)
    for copy in copies:
        with pytest.raises(ValueError, match="prediction_type=sample"):
            load_unet(whole / copy)
    shutil.copytree(whole / "unet", whole / "other" / "unet")
    assert load_diffusion(whole / "other") is None


def test_pipeline_is_replaced_and_nothing_else(folder, tmp_path):
    other = unet_of(in_channels=1, out_channels=1)
    save_pipeline(other, PROCESS, folder)
    assert torch.equal(estimate(load_unet(folder)), estimate(other))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(ValueError, match="exists and is not a pipeline"):
        save_pipeline(other, PROCESS, tmp_path / "thesis")


def test_interrupted_saving_leaves_the_old_folder(folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    before = estimate(load_unet(folder))
    monkeypatch.setattr(DDPMPipeline, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        save_pipeline(unet_of(dropout=0.1), PROCESS, folder)
    assert torch.equal(estimate(load_unet(folder)), before)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def drop_weights(folder):
    (folder / WEIGHTS).unlink()


def call_them(name):
    def rename(folder):
        (folder / WEIGHTS).rename(folder / "unet" / name)

    return rename


def point_to_weights(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def truncate_weights(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def drop_a_layer(folder):
    state = load_file(folder / WEIGHTS)
    del state["conv_in.weight"]
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(**changes):
    def edit(folder):
        file = folder / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop_weights, FileNotFoundError, r"has a config\.json but no weights"),
        (
            call_them("diffusion_pytorch_model.ema.safetensors"),
            FileNotFoundError,
            r"; rename diffusion_pytorch_model\.ema\.safetensors to diffusion_pytorch_model\.safetensors if it is what you",
        ),
        (
            call_them("diffusion_pytorch_model.fp16.bin"),
            FileNotFoundError,
            r"; rename diffusion_pytorch_model\.fp16\.bin to diffusion_pytorch_model\.bin if",
        ),
        (point_to_weights, ValueError, r"is a pointer of Git LFS, not the weights: git lfs pull fetches them"),
        (truncate_weights, ValueError, "cannot be read as a U-Net"),
        (drop_a_layer, ValueError, r"weights do not fit config\.json: 1 missing keys: conv_in\.weight"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), ValueError, r"config\.json is damaged"),
        (lambda folder: (folder / "unet" / "config.json").unlink(), FileNotFoundError, "holds no U-Net"),
        (edit_config(block_out_channels=[16, 64]), ValueError, "cannot be read as a U-Net: .*size mismatch for down_blocks"),
        (edit_config(_class_name="UNet2DConditionModel"), ValueError, "is of a UNet2DConditionModel: supported are"),
        (edit_config(class_embed_type="timestep"), ValueError, "of another kind: class_embed_type=timestep; supported are"),
        (
            edit_config(num_class_embeds=10),
            ValueError,
            "weights do not fit config.json: 1 missing keys: class_embedding.weight",
        ),
        (
            edit_config(time_embedding_type="fourier"),
            ValueError,
            "of another kind: time_embedding_type=fourier, so it estimates a sc",
        ),
        (edit_config(center_input_sample=True), ValueError, "of another kind: center_input_sample=True; supported are"),
        (edit_config(out_channels=4), ValueError, "3 channels in and 4 out"),
    ],
)
def test_bad_folder_has_one_clear_line(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as raised:
        load_unet(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_missing_folder_and_file_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: give a diffusers folder"):
        load_unet(tmp_path / "none")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"is a file: .*python -m qdm_lightning\.convert"):
        load_unet(tmp_path / "model.ckpt")


def test_hub_id_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match="no/such does not exist: give a diffusers folder, or a hub id that can be reached"
    ):
        load_unet("no/such")
