"""Networks that estimate their variance, in the layout of openai's code: converted, against diffusers, and a run of one."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from qdm_lightning import convert, draw_images, load_student
from qdm_lightning.diffusion.propagation import error_propagation
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.display.progress import Progress
from qdm_lightning.models.denoiser import Denoiser, Guided, LearnedVarianceDenoiser, WithVariance, denoiser
from qdm_lightning.models.diffusers_io import load_diffusion, load_unet
from qdm_lightning.models.guided_checkpoint import Heads, unet_from_guided
from qdm_lightning.quantization import QuantConfig, compiled, prepare
from qdm_lightning.train import train

LEARNED = DiffusionConfig(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
TINY = """
    data.batch_size=4 trainer.max_steps=2 trainer.val_images=16 trainer.accelerator=cpu trainer.compile=off trainer.threads=1
    quant.calibration_batches=1 quant.calibrator.steps=2 sampler.steps=4 sampler.batch_size=4 num_samples=4 logger=none
    sampler=ddpm sampler.variance=learned_range diffusion.beta_schedule=squaredcos_cap_v2
"""


class Residual(nn.Module):
    def __init__(self, ins, outs, emb, shifts, resize=None):
        super().__init__()
        self.shifts, self.resize = shifts, resize
        self.in_layers = nn.Sequential(nn.GroupNorm(32, ins), nn.SiLU(), nn.Conv2d(ins, outs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, (1 + shifts) * outs))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outs), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(outs, outs, 3, padding=1))
        self.skip_connection = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def forward(self, x, emb):
        resize = self.resize or (lambda values: values)
        h = self.in_layers[2](resize(self.in_layers[:2](x)))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.shifts:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(resize(x)) + h


class Attends(nn.Module):
    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb):
        flat = x.flatten(2)
        qkv, batch, length = self.qkv(self.norm(flat)), len(x), flat.shape[2]
        if self.new_order:
            q, k, v = (part.reshape(batch * self.heads, -1, length) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(batch * self.heads, -1, length).chunk(3, dim=1)
        weights = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(q.shape[1])).softmax(-1)
        h = torch.einsum("bts,bcs->bct", weights, v).reshape(batch, -1, length)
        return x + self.proj_out(h).reshape(x.shape)


class Plain(nn.Module):
    """A convolution that halves or doubles, under its name there."""

    def __init__(self, name, layer, before=None):
        super().__init__()
        self.add_module(name, layer)
        self.layer, self.before = [layer], before

    def forward(self, x, emb):
        return self.layer[0](x if self.before is None else self.before(x))


def double(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def halve(x):
    return F.avg_pool2d(x, 2)


class OpenaiUNet(nn.Module):
    def __init__(self, ch, multipliers, blocks, attention_levels, channels, out, classes, heads, head_channels, **flags):
        super().__init__()
        emb, shifts, resnet = 4 * ch, flags["shifts"], flags["resnet"]

        def attention(width):
            return Attends(width, heads or width // head_channels, flags["new_order"])

        self.ch = ch
        self.time_embed = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        if classes:
            self.label_emb = nn.Embedding(classes, emb)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, ch, 3, padding=1)])])
        self.output_blocks, last, skips = nn.ModuleList(), ch, [ch]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                layers = [Residual(last, multiplier * ch, emb, shifts)]
                last = multiplier * ch
                self.input_blocks.append(nn.ModuleList(layers + [attention(last)] * (level in attention_levels)))
                skips.append(last)
            if level < len(multipliers) - 1:
                half = Residual(last, last, emb, shifts, halve) if resnet else Plain("op", nn.Conv2d(last, last, 3, 2, 1))
                self.input_blocks.append(nn.ModuleList([half]))
                skips.append(last)
        middle = [Residual(last, last, emb, shifts), attention(last), Residual(last, last, emb, shifts)]
        self.middle_block = nn.ModuleList(middle)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(blocks + 1):
                layers = [Residual(last + skips.pop(), multiplier * ch, emb, shifts)]
                last = multiplier * ch
                layers += [attention(last)] * (level in attention_levels)
                if level and i == blocks:
                    twice = Plain("conv", nn.Conv2d(last, last, 3, padding=1), double)
                    layers.append(Residual(last, last, emb, shifts, double) if resnet else twice)
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, last), nn.SiLU(), nn.Conv2d(last, out, 3, padding=1))

    def forward(self, x, t, y=None):
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(self.ch // 2) / (self.ch // 2))
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = self.input_blocks[0][0](x)
        skips = [h]
        for block in self.input_blocks[1:]:
            for layer in block:
                h = layer(h, emb)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, emb)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in block:
                h = layer(h, emb)
        return self.out(h)


def openai(**settings):
    usual = {"ch": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "channels": 1, "out": 2, "classes": None}
    usual |= {"heads": 4, "head_channels": None, "shifts": True, "resnet": False, "new_order": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = OpenaiUNet(**{**usual, **settings})
        for name, parameter in network.named_parameters():  # defaults would leave norms alike and hide a swap
            if name.endswith(("norm.weight", "layers.0.weight")) and parameter.ndim == 1:
                nn.init.normal_(parameter, mean=1.0, std=0.3)
        return network.eval()


LAYOUTS = {
    "improved-diffusion, ImageNet-64's kind": ({"classes": 10, "channels": 3, "out": 6}, Heads(count=4)),
    "guided-diffusion, ImageNet-64's kind": (
        {
            "classes": 10,
            "attention_levels": (0, 1),
            "heads": None,
            "head_channels": 16,
            "blocks": 2,
            "resnet": True,
            "new_order": True,
            "multipliers": (1, 1),
        },
        Heads(channels=16, new_order=True),
    ),
    "one head, no classes, no variance": ({"out": 1, "heads": 1, "shifts": False, "attention_levels": (0, 1)}, Heads(count=1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_converted_network_gives_the_same_output(name):
    settings, heads = LAYOUTS[name]
    network = openai(**settings)
    unet = unet_from_guided(network.state_dict(), 8, heads)
    x = torch.randn(2, settings.get("channels", 1), 8, 8, generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([3, 977]), [torch.tensor([9, 4])] if settings.get("classes") else []
    torch.testing.assert_close(unet(x, t, *labels).sample, network(x, t, *labels), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "size", "message"),
    [
        (Heads(count=4), 8, "heads of 8 and 16 channels in one network are not supported: UNet2DModel has heads of one width"),
        (Heads(), 8, "give --num-heads or --num-head-channels"),
        (Heads(channels=24), 8, r"heads of 24 channels do not divide attentions of \[32, 64\]"),
        (Heads(count=1), None, "give --image-size"),
    ],
)
def test_what_the_file_does_not_say_is_asked_for(heads, size, message):
    with pytest.raises(ValueError, match=message):
        unet_from_guided(openai(attention_levels=(0, 1)).state_dict(), size, heads)


def test_missing_and_foreign_keys_are_told():
    state = openai().state_dict()
    del state["output_blocks.1.0.out_layers.0.bias"]
    with pytest.raises(
        ValueError, match=r"guided-diffusion code's U-Net: 1 missing keys: output_blocks.1.0.out_layers.0.bias; 1 unk"
    ):
        unet_from_guided(state | {"extra": torch.zeros(1)}, 8, Heads(count=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted network without classes, of 8x8 digits, with a learned variance."""
    root = tmp_path_factory.mktemp("openai")
    torch.save(openai().state_dict(), root / "ema.pt")
    flags = "--image-size 8 --diffusion-steps 1000 --noise-schedule cosine --num-heads 4"
    assert convert.main([str(root / "ema.pt"), str(root / "teacher"), *flags.split()]) == 0
    return root / "teacher"


def test_convert_says_what_it_needs(folder, capsys):
    checkpoint = str(folder.parent / "ema.pt")
    assert convert.main([checkpoint, str(folder.parent / "x"), "--image-size", "8"]) == 2
    assert "give --diffusion-steps and --noise-schedule" in capsys.readouterr().err
    torch.save({"conv_in.weight": torch.zeros(1)}, folder.parent / "ddim.ckpt")
    assert convert.main([str(folder.parent / "ddim.ckpt"), str(folder.parent / "x"), "--num-heads", "4"]) == 2
    assert "--num-heads is for networks of openai's code" in capsys.readouterr().err
    flags = ["--image-size", "8", "--diffusion-steps", "4000", "--noise-schedule", "cosine", "--num-heads", "4"]
    assert convert.main([checkpoint, str(folder.parent / "x"), *flags]) == 2
    assert "give --rescale-timesteps False where it was" in capsys.readouterr().err
    assert convert.main([checkpoint, str(folder.parent / "long"), *flags, "--rescale-timesteps", "False"]) == 0
    assert load_diffusion(folder.parent / "long")["num_train_timesteps"] == 4000
    linear = convert._process(4000, "linear")
    assert (linear.beta_start, linear.beta_end) == (0.25e-4, 0.005)
    assert load_diffusion(folder) == {**LEARNED.settings(), "prediction_type": "epsilon"}
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["variance_type"] == "learned_range"


@torch.no_grad()
def theirs(unet, scheduler, steps, seeds, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = randn_tensor((len(seeds), 1, 8, 8), generators)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        estimate = unet(x, t).sample
        estimate = estimate if scheduler.config.get("variance_type") == "learned_range" else estimate[:, :1]
        x = scheduler.step(estimate, t, x, generator=generators, **options).prev_sample
    return x.clamp(-1, 1)


def test_prepared_at_32_bits_it_draws_what_a_loop_of_diffusers_draws(folder):
    unet, ours = load_unet(folder), load_unet(folder)
    prepare(ours, QuantConfig(weight_bits=32, act_bits=32, probs_bits=32, first_last_bits=32))
    settings = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
    ddpm = SamplerConfig(kind="ddpm", steps=10, batch_size=2, variance="learned_range")
    expected = theirs(unet, DDPMScheduler(variance_type="learned_range", **settings), 10, [5, 6])
    found = draw_images(ours, [5, 6], ddpm, LEARNED)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    other = theirs(unet, DDPMScheduler(variance_type="fixed_large", **settings), 10, [5, 6])
    assert (other - expected).abs().max() > 0.05  # the variance makes a difference
    expected = theirs(unet, DDIMScheduler(timestep_spacing="leading", **settings), 10, [5, 6], use_clipped_model_output=True)
    torch.testing.assert_close(
        draw_images(ours, [5, 6], SamplerConfig(steps=10, batch_size=2), LEARNED), expected, rtol=0, atol=2e-5
    )


@torch.no_grad()
def test_adapters_give_the_noise_and_the_variance_apart(folder):
    unet = load_unet(folder)
    network = denoiser(unet, LEARNED)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
    both = unet(x, t).sample
    assert isinstance(network, LearnedVarianceDenoiser)
    assert torch.equal(network(x, t), both[:, :1])
    assert torch.equal(WithVariance(network)(x, t), both)
    ddpm = SamplerConfig(kind="ddpm", steps=3, batch_size=2, variance="learned_range")
    travels = error_propagation(WithVariance(network), ddpm, LEARNED, shape=(1, 8, 8), seeds=[0, 1], points=2)
    assert all(value > 0 for value in travels.values())

    class Labelled(nn.Module):
        def forward(self, x, t, labels):
            return torch.cat([x * labels[:, None, None, None], x + labels[:, None, None, None]], dim=1)

    guided = Guided(Labelled(), 10, 3.0)(x, t, torch.tensor([1, 2, 3]))
    factor = 10 + 3 * (torch.tensor([1.0, 2.0, 3.0])[:, None, None, None] - 10)
    torch.testing.assert_close(guided[:, :1], x * factor)
    assert torch.equal(guided[:, 1:], x + torch.tensor([1, 2, 3])[:, None, None, None])  # the label's own variance


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"2 channels out, for 1 of an image: .* type diffusion\.variance_type=learned_range"),
        (["diffusion.variance_type=learned_range", "sampler.variance=fixed_small"], "type sampler.variance=learned_range"),
        (
            ["diffusion.variance_type=learned_range", "diffusion.prediction_type=v_prediction"],
            "that estimate the noise: leave out",
        ),
        (
            ["diffusion.variance_type=learned_range", "diffusion.beta_schedule=linear"],
            "type diffusion.beta_schedule=squaredcos",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told_before_a_run(folder, composed, tmp_path, words, message):
    teacher = ["teacher=pretrained", f"teacher.path={folder}", f"paths.output={tmp_path}", f"paths.cache={tmp_path}"]
    with pytest.raises(ValueError, match=message):
        train(
            composed(*TINY.split(), *teacher, *(["sampler.variance=fixed_large"] if not words else []), *words),
            Progress("silent"),
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["diffusion.variance_type=learned_range"],
            "needs a trained teacher, L_vlb is not trained here: type teacher=pretrained",
        ),
        (["model.out_channels=2"], "it estimates its variance too, type diffusion.variance_type=learned_range"),
        (["sampler=ddpm", "sampler.variance=learned_range"], "needs a network that estimates it"),
        (["sampler.variance=learned_range"], "belongs to DDPM: type sampler=ddpm"),
    ],
)
def test_networks_without_a_learned_variance_have_no_use_of_it(composed, words, message):
    with pytest.raises(ValueError, match=message):
        train(composed(*words), Progress("silent"))
    with pytest.raises(ValueError, match="estimates no variance, leave out"):
        denoiser(load_unet_of(1), LEARNED)


def load_unet_of(out):
    return unet_from_guided(openai(out=out).state_dict(), 8, Heads(count=4))


def test_a_student_mimics_the_noise_and_keeps_the_variance(folder, composed, tmp_path):
    compiled.set_mode("off")
    places = [f"paths.cache={tmp_path / 'cache'}", f"paths.output={tmp_path / 'runs'}"]
    words = ["diffusion.variance_type=learned_range", "teacher=pretrained", f"teacher.path={folder}", *places]
    result = train(composed(*TINY.split(), *words), Progress("silent"))
    teacher, student = load_unet(result.run_dir / "teacher"), result.student
    assert isinstance(student, LearnedVarianceDenoiser)
    moved = (student.unet.conv_out.weight != teacher.conv_out.weight).flatten(1).any(1)
    assert moved.tolist() == [True, False]
    loaded = load_student(result.run_dir)
    sampler = SamplerConfig(kind="ddpm", steps=4, batch_size=2, variance="learned_range")
    drawn = draw_images(loaded, [5, 6], sampler)
    pipeline = DDPMPipeline.from_pretrained(result.run_dir / "student")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    images = pipeline(batch_size=2, generator=generators, num_inference_steps=4, output_type="np").images
    assert (torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1 - drawn).abs().max() < 2 / 255
    integer = draw_images(load_student(result.run_dir, execution="integer"), [5, 6], sampler, LEARNED)
    assert (integer - drawn).abs().max() < 0.1
    assert type(denoiser(load_unet_of(1), DiffusionConfig())) is Denoiser
