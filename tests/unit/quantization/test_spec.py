import re

import pytest

from qdm_lightning.quantization.spec import QuantConfig, TaQEma, TaQNormalize, TaQOff, TaQScale

BAD = {
    "quant.weight_bits=1": lambda: QuantConfig(weight_bits=1),
    "quant.act_bits=9": lambda: QuantConfig(act_bits=9),
    "quant.qkv_bits=16": lambda: QuantConfig(qkv_bits=16),
    "quant.probs_bits=0": lambda: QuantConfig(probs_bits=0),
    "quant.first_last_bits=33": lambda: QuantConfig(first_last_bits=33),
    "quant.rules.mid*=7.5": lambda: QuantConfig(rules={"mid*": 7.5}),
    "quant.mode=ptqq": lambda: QuantConfig(mode="ptqq"),
    "quant.calibration_batches=0": lambda: QuantConfig(calibration_batches=0),
    "quant.calibration_timesteps=all": lambda: QuantConfig(calibration_timesteps="all"),
    "taq.scope=none": lambda: TaQOff(scope="none"),
    "taq.psi=0.0": lambda: TaQNormalize(psi=0.0),
    "taq.groups=0": lambda: TaQScale(groups=0),
    "taq.momentum=1.5": lambda: TaQEma(momentum=1.5),
}


@pytest.mark.parametrize("setting", BAD)
def test_a_bad_value_is_named_with_what_is_allowed(setting):
    with pytest.raises(ValueError, match=re.escape(setting) + r" is not allowed: .*"):
        BAD[setting]()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 32])
def test_allowed_bits(bits):
    config = QuantConfig(weight_bits=bits, act_bits=bits, probs_bits=bits, first_last_bits=bits)
    assert config.attention_bits == bits
    assert QuantConfig(act_bits=bits, qkv_bits=5).attention_bits == 5
    assert config.is_float is (bits == 32)


@pytest.mark.parametrize("name", ["weight_bits", "act_bits", "qkv_bits", "probs_bits", "first_last_bits"])
def test_one_quantized_kind_makes_a_student(name):
    floats = {"weight_bits": 32, "act_bits": 32, "qkv_bits": 32, "probs_bits": 32, "first_last_bits": 32}
    assert QuantConfig(**floats).is_float
    assert not QuantConfig(**floats | {name: 8}).is_float
    assert not QuantConfig(**floats, rules={"conv_in": 8}).is_float
