"""Schedule, EMA warm-up and parameter groups, against closed forms."""

import math
from functools import partial

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from qdm_lightning.quantization import QuantConfig, prepare
from qdm_lightning.training.optimizer import (
    average,
    build_optimizer,
    learning_rate_factor,
    split_parameters,
)
from qdm_lightning.training.spec import OptimizerConfig


def test_schedule_rises_to_one_and_falls_to_zero():
    factor = partial(learning_rate_factor, OptimizerConfig(schedule="cosine", warmup_steps=10), 110)
    assert factor(0) == 0.1
    assert factor(9) == factor(10) == 1.0
    assert math.isclose(factor(60), 0.5)
    assert factor(110) == 0.0


def test_the_constant_schedule_stays_after_its_warm_up():
    factor = partial(learning_rate_factor, OptimizerConfig(schedule="constant", warmup_steps=4), 8)
    assert [factor(step) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert learning_rate_factor(OptimizerConfig(schedule="constant", warmup_steps=0), 8, 0) == 1


def test_ema_follows_its_warm_up():
    model = nn.Linear(1, 1, bias=False)
    averaged = AveragedModel(model, multi_avg_fn=partial(average, 0.9))
    expected = None
    for n in range(30):
        value = float(n * n)
        nn.init.constant_(model.weight, value)
        averaged.update_parameters(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert math.isclose(averaged.module.weight.item(), expected, rel_tol=1e-5)


def test_quantizers_form_a_group_of_their_own():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 1, 3))
    floats = {id(p) for p in model.parameters()}
    prepare(model, QuantConfig())
    network, quantizers = split_parameters(model)
    assert {id(p) for p in network} == floats
    assert len(quantizers) == 3 * 3  # scale of the weight, scale and zero point of the input
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, quantizer_lr=0.2))
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_adam_is_torchs_where_no_row_moves_alone():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    mine = build_optimizer(ours, OptimizerConfig(lr=0.01))
    reference = torch.optim.Adam(theirs.parameters(), lr=0.01, betas=(0.9, 0.999), fused=True)
    x = torch.randn(5, 3)
    for _ in range(4):
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
