"""What a run still takes is said once, from its own seconds."""

from types import SimpleNamespace

import pytest
import torch

from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.models.image_sampler import ImageSampler
from qdm_lightning.training import plan
from qdm_lightning.training.plan import PlanOfRun


@pytest.fixture
def said(monkeypatch):
    """`said(steps, seconds, calls, call)`: what a plan says while a training of `steps` steps of `seconds` each goes on."""

    def train(steps, seconds, calls, call):
        lines, clock = [], iter(x for i in range(steps) for x in (100.0 * i, 100.0 * i + seconds))
        monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
        shown = PlanOfRun(lines.append, calls, lambda: call)
        for step in range(steps):
            shown.on_train_batch_start(None, None, None, step)
            trainer = SimpleNamespace(global_step=step + 1, is_global_zero=True)
            shown.on_train_batch_end(trainer, SimpleNamespace(max_steps=steps), None, None, step)
        return lines

    return train


def test_a_long_run_says_what_it_takes(said):
    assert said(620, 0.5, 800, 0.25) == ["plan: 600 steps at 0.5 s (5:00), 800 calls for images at 0.25 s (3:20)"]


def test_a_short_one_says_nothing(said):
    assert said(30, 0.1, 10, 0.1) == said(10, 60, 800, 0.25) == []


def test_a_call_is_measured_at_the_size_of_the_drawing():
    shapes = []

    class Network(torch.nn.Module):
        def forward(self, x, t):
            shapes.append((tuple(x.shape), tuple(t.shape)))
            return x

    drawn_by = ImageSampler(
        network=Network(),
        sampler=SamplerConfig(batch_size=3),
        diffusion=DiffusionConfig(),
        shape=(1, 4, 4),
        device=torch.device("cpu"),
    )
    assert drawn_by.call_seconds() > 0
    assert shapes == [((3, 1, 4, 4), (3,))] * 2
