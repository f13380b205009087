"""Class-conditional networks: against diffusers, and a run of one from teacher to student."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from qdm_lightning import draw_images, load_student
from qdm_lightning.data.digits import DigitsData
from qdm_lightning.diagnose import diagnose
from qdm_lightning.diffusion.sampling import image_seeds
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig, SamplerConfig
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.evaluation.sample import read_picture
from qdm_lightning.export import export
from qdm_lightning.integer import to_integer
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.diffusers_io import load_unet
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.models.unet import build_unet
from qdm_lightning.quantization import QuantConfig, compiled, prepare
from qdm_lightning.quantization.calibration import MSESearch
from qdm_lightning.sample import sample
from qdm_lightning.train import train
from qdm_lightning.training.on_policy import FIRST_SEED, TrajectoryBuffer

DROPPED = DiffusionConfig(label_dropout=0.1)
SHAPE = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
TINY = """
    model.block_out_channels=[8,16] model.norm_num_groups=4 model.num_class_embeds=11 diffusion.label_dropout=0.3
    data.batch_size=8 teacher.max_steps=2 trainer.max_steps=2 trainer.val_images=16 trainer.accelerator=cpu trainer.compile=off
    trainer.threads=1 quant.calibration_batches=1 quant.calibrator.steps=2 sampler.steps=2 sampler.batch_size=8
    sampler.guidance=2 num_samples=8 logger=none
"""


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(num_class_embeds=11, attention_head_dim=None, **SHAPE).eval()


@pytest.fixture
def ours(unet, tmp_path):
    """The network as we read it from diffusers' folder, prepared at 32 bits."""
    unet.save_pretrained(tmp_path / "unet")
    network = load_unet(tmp_path)
    prepare(network, QuantConfig(weight_bits=32, act_bits=32, probs_bits=32, first_last_bits=32))
    return network


def test_read_and_built_it_is_the_network_of_diffusers(unet, ours):
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 300, 700, 999]), torch.tensor([0, 3, 3, 10])
    with torch.no_grad():
        assert torch.equal(Denoiser(ours)(x, t, y), unet(x, t, class_labels=y).sample)
        assert not torch.equal(Denoiser(ours)(x, t, y), Denoiser(ours)(x, t, y.flip(0)))
    with pytest.raises(ValueError, match="class_labels should be provided"):
        Denoiser(ours)(x, t)
    built = build_unet(num_class_embeds=11, **SHAPE)
    assert built.state_dict().keys() == unet.state_dict().keys()


@torch.no_grad()
def theirs(unet, scheduler, steps, seeds, labels, guidance=1.0, **options):
    """A loop over diffusers' scheduler as their pipelines write it, guided as their examples do."""
    generators, labels = [torch.Generator().manual_seed(seed) for seed in seeds], torch.tensor(labels)
    x = randn_tensor((len(seeds), 1, 8, 8), generators)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        eps = unet(x, t, class_labels=labels).sample
        if guidance != 1:
            null = unet(x, t, class_labels=torch.full_like(labels, 10)).sample
            eps = null + guidance * (eps - null)
        x = scheduler.step(eps, t, x, generator=generators, **options).prev_sample
    return x.clamp(-1, 1)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_it_draws_what_a_loop_of_diffusers_draws(unet, ours, guidance):
    ddpm = SamplerConfig(kind="ddpm", steps=10, batch_size=3, guidance=guidance)
    found = draw_images(ours, [12, 13, 4], ddpm, DROPPED)
    expected = theirs(unet, DDPMScheduler(variance_type="fixed_large", clip_sample=True), 10, [12, 13, 4], [2, 3, 4], guidance)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    found = draw_images(ours, [12, 13], SamplerConfig(steps=10, batch_size=2, guidance=guidance), DROPPED, class_labels=7)
    implicit = DDIMScheduler(clip_sample=True, timestep_spacing="leading")
    expected = theirs(unet, implicit, 10, [12, 13], [7, 7], guidance, use_clipped_model_output=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_an_image_depends_on_its_seed_alone(unet):
    sampler = SamplerConfig(steps=2, batch_size=4, guidance=2.0)
    together = draw_images(unet, [3, 10, 25, 7, 9], sampler, DROPPED)
    for place, seed in enumerate([3, 10, 25, 7, 9]):
        assert torch.equal(draw_images(unet, [seed], sampler, DROPPED)[0], together[place])
    assert not torch.equal(draw_images(unet, [3], sampler, DROPPED, class_labels=4)[0], together[0])


def test_labels_are_those_of_the_classes_in_turn(unet):
    def made(diffusion, **options):
        network = Denoiser(unet, diffusion)
        return ImageSampler(
            network=network,
            sampler=SamplerConfig(),
            diffusion=diffusion,
            shape=(1, 8, 8),
            device=torch.device("cpu"),
            **options,
        )

    assert made(DROPPED).labels(range(8, 13)) == [8, 9, 0, 1, 2]  # the eleventh label stands for no class
    assert made(DiffusionConfig()).labels(range(8, 13)) == [8, 9, 10, 0, 1]
    assert made(DROPPED, class_labels=[5, 2]).labels([4, 7, 7]) == [5, 2, 2]
    with pytest.raises(ValueError, match=r"class_labels=\[10\] is not allowed: give one or several of 0..9"):
        made(DROPPED, class_labels=[10])
    with pytest.raises(ValueError, match=r"sampler.guidance=2 needs a network that was trained with dropped labels"):
        draw_images(unet, [0], SamplerConfig(guidance=2.0), DiffusionConfig())
    with pytest.raises(ValueError, match="nothing says which classes it has: give class_labels="):
        draw_images(unet, [0])
    plain = build_unet(**SHAPE).eval()
    with pytest.raises(ValueError, match=r"class_labels=\[1\]: the network takes no class labels"):
        draw_images(plain, [0], class_labels=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.num_class_embeds=9"], "the network takes 9 class labels .* the data have 10: type model.num_class_embeds=10"),
        (["model.num_class_embeds=11"], r"data have 10: type model.num_class_embeds=10, or diffusion.label_dropout=0.1 where"),
        (["diffusion.label_dropout=0.1"], "this network takes none: type model.num_class_embeds=11, or leave it out"),
        (["model.num_class_embeds=10", "diffusion.label_dropout=0.1"], "and a null label .*: type model.num_class_embeds=11"),
        (["sampler.guidance=2"], "sampler.guidance=2 needs a network that was trained with dropped labels"),
        (
            ["data=images", "data.path=.", "data.channels=1", "model.num_class_embeds=10"],
            "and the data have none: take data=digits",
        ),
    ],
)
def test_classes_that_do_not_fit_are_told_before_a_run(composed, words, message):
    with pytest.raises(ValueError, match=message):
        train(composed(*words), Progress("silent"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from hydra import compose, initialize_config_dir

    from qdm_lightning.cli.schema import CONF_DIR

    compiled.set_mode("off")
    root = tmp_path_factory.mktemp("classes")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", [*TINY.split(), f"paths.cache={root / 'cache'}", f"paths.output={root / 'runs'}"])
    return train(cfg, Progress("silent"))


def test_a_run_gives_a_student_that_carries_its_classes(run):
    assert "class_embedding" in (run.run_dir / "quantization.txt").read_text()
    assert json.loads((run.run_dir / "data.json").read_text())["labels"]
    config = json.loads((run.run_dir / "student" / "unet" / "config.json").read_text())
    assert (config["num_class_embeds"], config["quantization_config"]["label_dropout"]) == (11, 0.3)
    student, sampler = load_student(run.run_dir), SamplerConfig(steps=2, batch_size=8, guidance=2.0)
    drawn = draw_images(student, range(8), sampler)  # classes and null label by its files alone
    again = UNet2DModel.from_pretrained(run.run_dir / "student", subfolder="unet")
    assert torch.equal(draw_images(again, range(8), sampler), drawn)
    embedding = next(row for row in to_integer(student)[1].rows if row.name == "class_embedding")
    assert (embedding.kernel, embedding.weight_bits) == ("float", 32)
    integer = draw_images(load_student(run.run_dir, execution="integer"), range(8), sampler, DiffusionConfig(label_dropout=0.3))
    assert (integer - drawn).abs().max() < 0.1


def test_commands_about_the_run_take_class_labels(run, tmp_path, monkeypatch):
    pictures = sample(run.run_dir, ["seeds=4-6", "class_labels=[2,3]", f"out={tmp_path / 'out'}"], Progress("silent"))
    about = [read_picture(pictures.folder / f"{seed}.png")[1] for seed in (4, 5, 6)]
    assert [record["class_label"] for record in about] == [2, 3, 2]
    assert about[0]["class_labels"] == [2, 3]
    assert about[0]["sampler"]["guidance"] == 2
    with pytest.raises(ValueError, match="is a picture of another making"):
        sample(run.run_dir, ["seeds=4", f"out={tmp_path / 'out'}"], Progress("silent"))
    record = evaluate(run.run_dir, ["num_samples=8", "scores=fd", "class_labels=3"], Progress("silent")).record
    assert record["protocol"]["class_labels"] == [3]  # is in no table with all classes
    monkeypatch.setattr("qdm_lightning.diagnosis.diagnose.save_png", lambda *drawn: None)
    monkeypatch.setattr("qdm_lightning.diagnosis.gains.SAMPLES", 8)
    monkeypatch.setattr("qdm_lightning.diagnosis.gains.SEARCH", MSESearch(steps=1))
    found = diagnose(run.run_dir, ["num_images=8", "timesteps=2", "points=2", "layers=conv_out"], Progress("silent"))
    assert found.gains
    with pytest.raises(ValueError, match="a class-conditional network is not exported"):
        export(run.run_dir, [], Progress("silent"))


def test_the_teacher_learns_with_labels_and_without(run):
    data = DigitsData()
    data.setup()
    data.labelled = True
    images, labels = next(iter(data.train_dataloader()))
    place = next(index for index, image in enumerate(data.train_images) if torch.equal(image, images[0]))
    assert data.train_labels[place] == labels[0]
    trained, started = (unet.class_embedding.weight for unet in (run.teacher.unet, _started()))
    moved = (trained != started).any(1)
    assert moved[10]  # the null label, which no image has


def test_states_on_policy_keep_the_class_of_their_image(unet):
    nem = NeMConfig(on_policy_fraction=0.5, on_policy_buffer=40)
    buffer, network = TrajectoryBuffer(nem, DROPPED, seed=3), Denoiser(unet, DROPPED)
    x, t, labels = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), torch.full((8,), 10)
    mixed, _, classes = buffer.mix(x, t, torch.Generator().manual_seed(0), 0, network, labels=labels)
    first, second = (seed % 10 for seed in image_seeds(3, 2, start=FIRST_SEED))
    assert buffer.labels.tolist() == [first, second] * 20  # both images at each of the 20 steps
    for state, label in zip(mixed[:4], classes[:4], strict=True):
        place = next(k for k, kept in enumerate(buffer.x) if torch.equal(kept, state))
        assert label == buffer.labels[place]
    assert torch.equal(classes[4:], labels[4:])
    again = TrajectoryBuffer(nem, DROPPED, seed=3)
    again.load(buffer.state())
    assert torch.equal(again.labels, buffer.labels)


def _started():
    torch.manual_seed(0)
    return build_unet(num_class_embeds=11, **SHAPE)
