"""The LightningModule: what a training step computes, and what a checkpoint holds."""

import pytest
import torch

from qdm_lightning import training
from qdm_lightning.diffusion.images import to_float
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig
from qdm_lightning.models.unet import build_unet
from qdm_lightning.training.module import DiffusionModule, step_generator
from qdm_lightning.training.spec import OptimizerConfig
from qdm_lightning.training.validation_set import BUCKETS, ValidationSet

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

SETTINGS = {"format": 2, "taq": {}, "quant": {"weight_bits": 4, "channel_scales": "off"}, "diffusion": {}, "unet": {}}


def module(mode="replace", teacher=True, flip=False, dropout=0.0, settings=SETTINGS, weights=None, **nem):
    torch.manual_seed(0)
    network, frozen = build_unet(**TINY, dropout=dropout), build_unet(**TINY, dropout=0.5)
    return DiffusionModule(
        network,
        frozen if teacher else None,
        settings=settings,
        diffusion=DiffusionConfig(),
        nem=NeMConfig(mode=mode, **nem),
        optimizer=OptimizerConfig(),
        max_steps=10,
        seed=3,
        flip=flip,
        weights=weights,
    )


def images(count=6):
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def noisy(m, batch):
    """x_t, t, eps of step 0, written out."""
    generator = step_generator(3, 0)
    torch.randint(2**31, (1,), generator=generator)
    t = torch.randint(1000, (len(batch),), generator=generator)
    eps = torch.randn(batch.shape, generator=generator)
    betas = torch.linspace(1e-4, 0.02, 1000)
    bar = torch.cumprod(1 - betas, 0)[t][:, None, None, None]
    return bar.sqrt() * (batch / 127.5 - 1) + (1 - bar).sqrt() * eps, t, eps


def test_the_teacher_in_bfloat16():
    """Float32 again outside, near the exact estimate and not equal to it; a validation uses the exact one."""
    m = module()
    x, t, _ = noisy(m, images())
    exact = m._teacher_noise(x, t)
    m.teacher_bf16 = True
    found = m._teacher_noise(x, t)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_share_of_a_step_draws_what_the_whole_batch_draws(rank, monkeypatch):
    """Flip, t, eps, states of the trajectory (4 of 6 samples) and dropout belong to a sample's place in the whole batch."""
    m = module(on_policy_fraction=0.7, on_policy_buffer=40, flip=True, dropout=0.3).train()
    whole, t = m.errors(images())
    for place in (training.module, training.dropout):
        monkeypatch.setattr(place, "training_rank", lambda: (rank, 2))
    own = slice(3 * rank, 3 * rank + 3)
    share, own_t = m.errors(images()[own])
    assert torch.equal(own_t, t[own])
    torch.testing.assert_close(share, whole[own], rtol=1e-5, atol=1e-6)


def test_the_loss_of_each_mode(monkeypatch):
    batch = images()
    for mode in ("off", "replace", "add"):
        m = module(mode, weight=0.5).train()
        monkeypatch.setattr(DiffusionModule, "log", lambda *a, **k: None)
        monkeypatch.setattr(DiffusionModule, "global_rank", 0)
        x, t, eps = noisy(m, batch)
        loss = m.training_step(batch, 0)
        with torch.no_grad():
            student = m.student.unet(x, t).sample
            teacher = m.teacher.unet.eval()(x, t).sample
        simple, nem = (eps - student).square().mean(), (teacher - student).square().mean()
        expected = {"off": simple, "replace": nem, "add": simple + 0.5 * nem}[mode]
        torch.testing.assert_close(loss.detach(), expected)


def test_the_teacher_stays_in_eval_and_out_of_the_gradient(monkeypatch):
    monkeypatch.setattr(DiffusionModule, "log", lambda *a, **k: None)
    m = module().train()
    assert m.student.training
    assert not m.teacher.training
    assert not any(sub.training for sub in m.teacher.modules())
    m.training_step(images(), 0).backward()
    assert all(p.grad is None for p in m.teacher.parameters())
    assert all(p.grad is not None for p in m.student.parameters())
    assert all(p.grad is None for p in m.ema.parameters())


def test_a_step_is_a_function_of_seed_and_step(monkeypatch):
    monkeypatch.setattr(DiffusionModule, "log", lambda *a, **k: None)
    first = module(flip=True).training_step(images(), 0)
    torch.rand(7)  # whatever else drew random numbers
    assert torch.equal(first, module(flip=True).training_step(images(), 0))


def test_checkpoints_leave_the_teacher_out_and_load_without_it():
    m = module()
    checkpoint = {"state_dict": m.state_dict()}
    m.on_save_checkpoint(checkpoint)
    assert not any(k.startswith("teacher.") for k in checkpoint["state_dict"])
    other = module()
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])


def test_on_policy_replaces_a_share_of_the_batch(monkeypatch):
    monkeypatch.setattr(DiffusionModule, "log", lambda *a, **k: None)
    m = module(on_policy_fraction=0.5, on_policy_buffer=40, on_policy_refresh=5)
    seen = []
    monkeypatch.setattr(m.student, "forward", lambda x, t: seen.append((x, t)) or x * 1.0)
    m.training_step(images(), 0)
    x, t = seen[-1]
    plain_x, plain_t, _ = noisy(m, images())
    torch.testing.assert_close(x[3:], plain_x[3:])
    assert torch.equal(t[3:], plain_t[3:])
    stored = {(int(time), float(state.sum())) for time, state in zip(m.buffer.t, m.buffer.x, strict=True)}
    assert len(m.buffer.x) == 40
    assert all((int(time), float(state.sum())) in stored for time, state in zip(t[:3], x[:3], strict=True))


def test_the_held_out_set_is_fixed_and_covers_all_timesteps():
    one, two = (ValidationSet.from_images(images(10), 1000) for _ in range(2))
    assert torch.equal(one.eps, two.eps)
    assert torch.equal(one.t, two.t)
    assert one.t.min() < 5
    assert one.t.max() >= 995
    assert one.by_bucket(one.t.double()) == sorted(one.by_bucket(one.t.double()))
    assert len(one.by_bucket(one.t.double())) == BUCKETS
    assert torch.equal(to_float(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1.0]))


def test_weights_multiply_the_mimicking_error_of_each_sample_alone():
    """In training and in validation; `add` leaves L_simple as it is."""
    weights = torch.rand(1000) + 0.5
    for mode in ("replace", "add"):
        m = module(mode, weights=weights, **({"weight": 2.0} if mode == "add" else {}))
        x, t, eps = noisy(m, images())
        with torch.no_grad():
            eps_q, eps_fp = m.student(x, t), m.teacher(x, t)
            mimicking = weights[t] * (eps_fp - eps_q).square().mean((1, 2, 3))
            simple = (eps - eps_q).square().mean((1, 2, 3))
        expected = mimicking if mode == "replace" else simple + 2 * mimicking
        logged = {}
        m.log_dict = lambda values, logged=logged, **options: logged.update(values)
        m.validation_step((to_float(images()), t, eps), 0)
        torch.testing.assert_close(logged["val/loss"], expected.mean())
        torch.testing.assert_close(logged["val/nem"], (eps_fp - eps_q).square().mean())
