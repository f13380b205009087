"""Training ends at the first value that is not finite, whatever it is, and leaves what makes the step again."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qdm_lightning.base.checks import UserError
from qdm_lightning.diffusion.sampling import sample
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig, SamplerConfig
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.models.diffusers_io import load_unet, save_pipeline
from qdm_lightning.models.unet import build_unet
from qdm_lightning.quantization import MinMax, QuantConfig, calibrate, prepare
from qdm_lightning.training.checkpoint_io import fill, load_checkpoint
from qdm_lightning.training.module import DiffusionModule, step_generator
from qdm_lightning.training.network_settings import network_settings
from qdm_lightning.training.spec import OptimizerConfig
from qdm_lightning.training.validation_set import ValidationSet

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
NAN, INF = float("nan"), float("inf")
QUERY = "down_blocks.1.attentions.0.processor.query"


@torch.no_grad()
def put(value, tensor_of):
    """Writes a value into a tensor of the module before the last step."""

    def inject(module):
        tensor_of(module).detach().view(-1)[1] = value

    return inject


def in_layer(name, sample_index, value, backward=False):
    """A layer's output, or its gradient, is not finite for one sample of the batch."""

    def spoil(tensor):
        mask = torch.zeros_like(tensor)
        mask[sample_index] = value
        return tensor + mask

    def inject(module):
        def hook(layer, args, output):
            if backward and output.requires_grad:
                output.register_hook(spoil)
            return None if backward else spoil(output)

        module.student.unet.get_submodule(name).register_forward_hook(hook)

    return inject


def timesteps():
    """Timesteps of step 4, by index of the sample."""
    generator = step_generator(3, 3)
    torch.randint(2**31, (1,), generator=generator)
    return torch.randint(1000, (8,), generator=generator)


def query(module):
    return module.student.unet.get_submodule(QUERY)


CASES = {
    "weight that the grid would clip": (
        put(-INF, lambda m: m.student.unet.conv_in.weight),
        r"in step 4 the weight student\.unet\.conv_in\.weight\[1\] is -inf at every timestep",
    ),
    "scale": (
        put(200.0, lambda m: m.student.unet.conv_in.weight_quantizer.log_scale),
        r"in step 4 the scale student\.unet\.conv_in\.weight_quantizer\.log_scale\[1\] is inf at every timestep",
    ),
    "scale of zero": (
        put(-200.0, lambda m: m.student.unet.conv_in.weight_quantizer.log_scale),
        r"the scale student\.unet\.conv_in\.weight_quantizer\.log_scale\[1\] is 0 at every timestep",
    ),
    "averaged weight": (
        put(NAN, lambda m: m.ema_student.unet.conv_out.weight),
        r"the averaged weight ema\.module\.unet\.conv_out\.weight\[1\] is nan",
    ),
    "TaQ statistic": (
        put(INF, lambda m: query(m).std),
        r"the TaQ statistic student\.unet\." + re.escape(QUERY) + r"\.std\[1\] is inf at timesteps 250 to 499",
    ),
    "the teacher": (
        put(NAN, lambda m: m.teacher.unet.conv_in.weight),
        r"in step 4 train/loss is nan, first in teacher\.unet\.conv_in at timesteps ",
    ),
    "an output": (
        in_layer("down_blocks.1.resnets.0.conv1", 5, NAN),
        r"in step 4 train/loss is nan, first in student\.unet\.down_blocks\.1\.resnets\.0\.conv1 at timestep {t5}:",
    ),
    "a gradient": (
        in_layer("down_blocks.1.resnets.0.conv2", 2, INF, backward=True),
        r"gradient is not finite, backwards first in student\.unet\.down_blocks\.1\.resnets\.0\.\S+ at timestep {t2}:",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_value_that_is_not_finite_ends_training_before_the_step(case, student, train, tmp_path):
    """Named with step, layer and timestep, in time for every checkpoint; from what is left the same step finds the same."""
    inject, expected = CASES[case]

    class Injecting(DiffusionModule):
        def on_train_start(self):
            super().on_train_start()
            if self.global_step == 3:
                inject(self)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            if self.global_step == 3:
                inject(self)

    module = student(Injecting)
    t = timesteps()
    with pytest.raises(UserError, match=expected.format(t2=int(t[2]), t5=int(t[5]))) as first:
        train(module, tmp_path)
    last, diverged = (load_checkpoint(tmp_path / f"{name}.ckpt") for name in ("last", "diverged"))
    assert (last["global_step"], diverged["global_step"]) == (2, 3)
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    (tmp_path / "diverged.ckpt").rename(tmp_path / "last.ckpt")
    with pytest.raises(UserError) as second:
        train(student(Injecting), tmp_path)
    assert str(second.value) == str(first.value)
    made_again = load_checkpoint(tmp_path / "diverged.ckpt")["state_dict"]
    assert all(
        torch.equal(value, made_again[name]) or not value.isfinite().all() for name, value in diverged["state_dict"].items()
    )


def test_what_the_validation_finds(student, train, tmp_path):
    """A loss of the averaged student: infinite for one image, whose timestep is told; no checkpoint is made of it."""
    module = student()
    in_layer("conv_out", 5, INF)(SimpleNamespace(student=module.ema_student))
    t = ValidationSet.from_images(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 1000, 16).t
    where = rf"ema\.module\.unet\.conv_out at timestep {int(t[5])}:"
    with pytest.raises(UserError, match=rf"after step 2 val/loss is (inf|nan), first in {where} .* lower optimizer\.lr=0\.001"):
        train(module, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"diverged.ckpt", ".diverged.ckpt.sha256"}


def test_a_loss_that_diverges_by_itself_does_so_again(train, tmp_path):
    """The draws of a step are a function of (seed, step): `diverged.ckpt` leads to the very value."""
    absurd = {"lr": 1e12, "warmup_steps": 0, "gradient_clip": 1e9, "schedule": "constant"}

    def teacher():
        torch.manual_seed(0)
        return DiffusionModule(
            build_unet(**TINY),
            None,
            settings=network_settings({}, DiffusionConfig()),
            diffusion=DiffusionConfig(),
            nem=NeMConfig(mode="off"),
            optimizer=OptimizerConfig(**absurd),
            max_steps=4,
            seed=3,
            flip=True,
            prefix="teacher/",
        )

    found = []
    for _ in range(2):
        with pytest.raises(UserError, match=r"in step \d .* lower teacher\.lr=1e\+12") as error:
            train(teacher(), tmp_path)
        found.append(str(error.value))
        shutil.copy(tmp_path / "diverged.ckpt", tmp_path / "last.ckpt")
    assert found[0] == found[1]


def test_a_gradient_that_the_scaler_skips_is_excepted_until_its_scale_falls_below_1(student, train, tmp_path):
    """float16 on the CPU: the first steps overflow, are left out, and halve the scale, down to the last one that may."""
    scales = []

    class Scaled(DiffusionModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            scales.append(self.trainer.precision_plugin.scaler.get_scale())

        def on_train_start(self):
            super().on_train_start()
            scaler = self.trainer.precision_plugin.scaler
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0})
            in_layer("conv_out", 0, INF, backward=True)(self)

    module = student(Scaled)
    before = {name: value.clone() for name, value in module.student.named_parameters()}
    with pytest.raises(UserError, match=r"in step 3 the norm of the network gradient is not finite"):
        train(module, tmp_path, precision="16-mixed")
    assert scales == [1.0, 0.5]
    assert all(torch.equal(value, before[name]) for name, value in module.student.named_parameters())


def test_no_image_is_drawn_with_an_estimate_that_is_not_finite():
    """Clipping of x_0 would make -1 or 1 of an infinite estimate; the message names timestep, seeds and layer."""
    torch.manual_seed(0)
    network = Denoiser(build_unet(**TINY)).eval()
    network.unet.get_submodule("down_blocks.1.resnets.0.conv1").bias.data[0] = INF
    expected = r"seeds 3 to 4 is not finite, first in unet\.down_blocks\.1\.resnets\.0\.conv1 at timestep 500: no image"
    with pytest.raises(UserError, match=expected):
        sample(network, SamplerConfig(steps=2, batch_size=4), DiffusionConfig(), shape=(1, 8, 8), seeds=[3, 4])


def test_nothing_is_calibrated_on_values_that_are_not_finite():
    torch.manual_seed(0)
    for spoil, what in (
        (False, r"the input of down_blocks\.1\.\S+ is not finite at timestep 21"),
        (True, r"the weight of conv_out"),
    ):
        network = build_unet(**TINY)
        prepare(network, QuantConfig(weight_bits=4, act_bits=4))
        if spoil:
            network.conv_out.weight.data[0] = NAN
        else:
            network.down_blocks[1].resnets[0].register_forward_pre_hook(
                lambda m, args: (args[0].index_fill(0, torch.tensor(2), INF), *args[1:])
            )
        t = torch.tensor([0, 10, 21, 30])
        with pytest.raises(UserError, match=f"^calibration: {what}"):
            calibrate(network, lambda net=network, t=t: Denoiser(net)(torch.randn(4, 1, 8, 8), t), MinMax())


def test_networks_whose_weights_are_not_finite_are_refused(tmp_path):
    network = build_unet(**TINY)
    network.conv_out.bias.data[0] = NAN
    save_pipeline(network, DiffusionConfig(), tmp_path)
    with pytest.raises(ValueError, match=r"the weight conv_out\.bias is not finite"):
        load_unet(tmp_path)
    with pytest.raises(ValueError, match=r"^a\.ckpt: conv_out\.bias is not finite"):
        fill(build_unet(**TINY), network.state_dict(), Path("a.ckpt"))
