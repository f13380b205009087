import pytest
import torch

from qdm_lightning.diffusion.losses import per_sample_mse, student_errors
from qdm_lightning.diffusion.spec import NeMConfig


@pytest.fixture
def noises():
    return torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()


def test_modes_are_the_stated_sums(noises):
    eps, eps_fp, eps_q = noises
    simple, nem = (eps - eps_q).square().mean((1, 2, 3)), (eps_fp - eps_q).square().mean((1, 2, 3))
    torch.testing.assert_close(per_sample_mse(eps, eps_q), simple)
    torch.testing.assert_close(student_errors(NeMConfig(mode="off"), eps, None, eps_q), simple)
    torch.testing.assert_close(student_errors(NeMConfig(mode="replace"), eps, eps_fp, eps_q), nem)
    torch.testing.assert_close(student_errors(NeMConfig(mode="add", weight=0.3), eps, eps_fp, eps_q), simple + 0.3 * nem)


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_gradient_reaches_the_student_alone(noises, mode):
    eps, eps_fp, eps_q = (noise.clone().requires_grad_() for noise in noises)
    student_errors(NeMConfig(mode=mode), eps.detach(), eps_fp, eps_q).mean().backward()
    assert eps_fp.grad is None
    error = eps_q - eps_fp if mode == "replace" else 2 * eps_q - eps_fp - eps
    torch.testing.assert_close(eps_q.grad, 2 * error.detach() / eps_q.numel())


def test_error_is_taken_in_float32():
    low = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16)
    assert per_sample_mse(torch.full((1, 1, 1, 1), 1.001), low).item() == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_missing_teacher_is_named(noises, mode):
    with pytest.raises(ValueError, match=f"nem.mode={mode} needs eps_fp, which is None"):
        student_errors(NeMConfig(mode=mode), noises[0], None, noises[2])
