"""What a run computes in: bfloat16 and float16 autocast, float32 within the quantizers, the same bits on demand."""

import numpy as np
import pytest
import torch

from qdm_lightning.base.checks import UserError
from qdm_lightning.quantization import compiled
from qdm_lightning.quantization.quantizer import LSQActivation, LSQWeight
from qdm_lightning.quantization.taq import NormalizedActivation
from qdm_lightning.training.devices import deterministic_or_one_line, set_up
from qdm_lightning.training.spec import TrainerConfig

LOWER = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@pytest.mark.parametrize("precision", LOWER)
def test_a_student_trains_under_autocast(precision, student, train, tmp_path, monkeypatch):
    """Convolutions run in the lower type, weights, scales, zero points and TaQ's statistics stay float32."""
    seen, outputs, forward = set(), set(), compiled.forward

    def recorded(x, scale, zero_point, *args):
        seen.update({scale.dtype, zero_point.dtype, forward(x, scale, zero_point, *args)[1].dtype})
        return forward(x, scale, zero_point, *args)

    monkeypatch.setattr(compiled, "forward", recorded)
    module = student()
    module.student.unet.conv_in.register_forward_hook(lambda layer, args, output: outputs.add(output.dtype))
    before = {name: value.clone() for name, value in module.student.state_dict().items()}
    assert np.isfinite(train(module, tmp_path, precision=precision)["val_loss"])
    assert (seen, outputs) == ({torch.float32}, {LOWER[precision]})
    state = module.student.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.bool}
    changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert {"unet.conv_in.weight", "unet.conv_in.weight_quantizer.log_scale"} <= changed


@pytest.mark.parametrize("dtype", LOWER.values())
def test_codes_are_computed_in_float32_inside_autocast(dtype):
    """Against float64 in numpy: a scale of 0.1 is no number of bfloat16, and codes taken with it would differ."""
    x = torch.linspace(-3, 12, 4001).reshape(1, -1).to(dtype)
    quantizer = LSQActivation(bits=8)
    quantizer.set_grid(torch.tensor([0.1]), torch.tensor([30.0]))
    with torch.autocast("cpu", dtype):
        found = quantizer(x)
    scale = np.float32(np.exp(quantizer.log_scale.detach().numpy()))
    codes = np.clip(np.round(x.float().numpy() / scale) + 30, 0, 255)
    expected = torch.from_numpy((codes - 30).astype(np.float32) * scale).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found.detach(), expected)


def test_weights_and_taq_moments_are_float32_inside_autocast():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer, taq = LSQWeight(bits=4, weight=weight), NormalizedActivation(bits=4)
    x = (weight + 40).to(torch.bfloat16)
    plain = quantizer(weight), *taq.moments(x)
    with torch.autocast("cpu", torch.bfloat16):
        lower = quantizer(weight), *taq.moments(x)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, lower, strict=True))


def test_a_deterministic_run_is_the_same_bit_for_bit(student, train, tmp_path):
    """And what has no deterministic form is an error of one line."""
    states = []
    try:
        for name in "ab":
            module = student()
            set_up(TrainerConfig(deterministic=True, compile="off", threads=1))
            train(module, tmp_path / name, deterministic=True)
            assert torch.are_deterministic_algorithms_enabled()
            states.append(module.state_dict())
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        with (
            pytest.raises(UserError, match=r"^trainer\.deterministic=true: put_ has no deterministic form"),
            deterministic_or_one_line(),
        ):
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    finally:
        set_up(TrainerConfig())
