import numpy as np
import torch

from qdm_lightning.diffusion.sampling import spread
from qdm_lightning.evaluation.subject import Subject
from qdm_lightning.evaluation.trajectory import follow
from qdm_lightning.sample import sample


def test_a_trajectory_ends_in_the_image(tiny_run):
    subject = Subject.restored(*sample.check(sample.compose(tiny_run)))
    trajectory = follow(subject.image_sampler, [5, 6], points=3)
    assert trajectory.t == [750, 250, 0]
    assert trajectory.x.shape == trajectory.x0.shape == (3, 2, 1, 8, 8)
    assert torch.equal(trajectory.images, subject.image_sampler.draw([5, 6]))
    torch.testing.assert_close(
        trajectory.x0[-1].clamp(-1, 1), trajectory.images, atol=1e-5, rtol=0
    )  # DDIM's last step is its prediction
    start = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(trajectory.x[0, 1], start)


def test_spread():
    assert spread(list(range(5)), 5) == [0, 1, 2, 3, 4]
    assert spread(list(range(100)), 4) == [0, 33, 66, 99]
    assert np.diff(spread(list(range(1000)), 50)).max() <= 21
