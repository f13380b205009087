import pytest
import torch

from qdm_lightning.diffusion.losses import nem_loss, per_sample_mse, simple_loss, student_errors, student_loss
from qdm_lightning.diffusion.spec import NeMConfig


@pytest.fixture
def noises():
    return torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()


def test_modes_are_the_stated_sums(noises):
    eps, eps_fp, eps_q = noises
    simple, nem = (eps - eps_q).square().mean(), (eps_fp - eps_q).square().mean()
    torch.testing.assert_close(simple_loss(eps, eps_q), simple)
    torch.testing.assert_close(nem_loss(eps_fp, eps_q), nem)
    torch.testing.assert_close(student_loss(NeMConfig(mode="off"), eps, None, eps_q), simple)
    torch.testing.assert_close(student_loss(NeMConfig(mode="replace"), None, eps_fp, eps_q), nem)
    torch.testing.assert_close(student_loss(NeMConfig(mode="add", weight=0.3), eps, eps_fp, eps_q), simple + 0.3 * nem)


def test_errors_by_sample_average_to_the_loss(noises):
    eps, eps_fp, eps_q = noises
    errors = student_errors(NeMConfig(mode="add"), eps, eps_fp, eps_q)
    assert errors.shape == (4,)
    torch.testing.assert_close(errors.mean(), student_loss(NeMConfig(mode="add"), eps, eps_fp, eps_q))
    torch.testing.assert_close(per_sample_mse(eps, eps_q)[2], (eps[2] - eps_q[2]).square().mean())


def test_gradient_reaches_the_student_alone(noises):
    _, eps_fp, eps_q = (noise.clone().requires_grad_() for noise in noises)
    nem_loss(eps_fp, eps_q).backward()
    assert eps_fp.grad is None
    torch.testing.assert_close(eps_q.grad, 2 * (eps_q - eps_fp).detach() / eps_q.numel())


def test_error_is_taken_in_float32():
    low = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16)
    assert simple_loss(torch.full((1, 1, 1, 1), 1.001), low).item() == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize(("mode", "missing"), [("off", "eps"), ("add", "eps"), ("replace", "eps_fp")])
def test_missing_target_is_named(noises, mode, missing):
    eps_q = noises[2]
    with pytest.raises(ValueError, match=f"nem.mode={mode} needs {missing}, which is None"):
        student_loss(NeMConfig(mode=mode), None, None if missing == "eps_fp" else eps_q, eps_q)
