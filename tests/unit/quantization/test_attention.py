import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from qdm_lightning.quantization.attention import QuantizedAttention, is_attention
from qdm_lightning.quantization.calibration import MSESearch, calibrate
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.quantizer import LSQActivation, LSQProbability, LSQWeight
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.quantization.taq import GroupedActivation, NormalizedActivation

FLOAT = QuantConfig(weight_bits=32, act_bits=32, qkv_bits=8, probs_bits=8, first_last_bits=32)


def attention(**options):
    settings = {"heads": 2, "dim_head": 8, "bias": True} | options
    return Attention(16, **settings)


CASES = {
    "picture": ({"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}, (3, 16, 4, 4)),
    "sequence": ({}, (3, 9, 16)),
    "one head": ({"heads": 1, "dim_head": 16, "bias": False}, (3, 9, 16)),
    "cross": ({"cross_attention_dim": 6}, (3, 9, 16)),
}


def call(name, module, x):
    return module(x, encoder_hidden_states=torch.linspace(-1, 1, 3 * 5 * 6).view(3, 5, 6)) if name == "cross" else module(x)


@pytest.mark.parametrize("name", CASES)
def test_without_quantizers_it_is_diffusers_own_processor(name):
    options, shape = CASES[name]
    module, x = attention(**options), torch.randn(shape)
    expected = call(name, module, x)
    module.set_processor(QuantizedAttention(None, None, None, None))
    assert torch.equal(call(name, module, x), expected)


@pytest.mark.parametrize("name", CASES)
def test_eight_bits_are_close(name):
    options, shape = CASES[name]
    model, x = nn.ModuleList([attention(**options)]), torch.randn(shape)
    expected = call(name, model[0], x)
    prepare(model, FLOAT)
    calibrate(model, lambda: call(name, model[0], x), MSESearch())
    found = call(name, model[0], x)
    assert 0 < (found - expected).abs().max() < 0.02 * expected.abs().max()


class Passing(nn.Module):
    """In a quantizer's place; keeps what it is given."""

    def forward(self, x):
        self.seen = x
        return x


@pytest.mark.parametrize("name", CASES)
def test_probabilities_made_by_hand_are_the_fused_ones(name):
    options, shape = CASES[name]
    module, x = attention(**options), torch.randn(shape)
    module.set_processor(AttnProcessor())
    expected = call(name, module, x)
    quantizers = [Passing() for _ in range(4)]
    module.set_processor(QuantizedAttention(*quantizers))
    torch.testing.assert_close(call(name, module, x), expected, rtol=1e-5, atol=1e-6)
    heads, width = module.heads, 16 // module.heads
    keys = 5 if name == "cross" else quantizers[0].seen.shape[2]
    assert [q.seen.shape[:2] for q in quantizers] == [(3, heads)] * 4
    assert quantizers[1].seen.shape == (3, heads, keys, width)
    torch.testing.assert_close(quantizers[3].seen.sum(-1), torch.ones(quantizers[3].seen.shape[:3]))


def test_a_mask_hides_keys():
    module, x = attention(), torch.randn(2, 6, 16)
    mask = torch.zeros(2, 1, 6)
    mask[0, :, 4:] = -10000.0
    expected = module(x, attention_mask=mask)
    assert not torch.allclose(expected, module(x))
    for probabilities in (None, Passing()):
        module.set_processor(QuantizedAttention(None, None, None, probabilities))
        torch.testing.assert_close(module(x, attention_mask=mask), expected, rtol=1e-5, atol=1e-6)


def test_bits_by_operand():
    model = nn.ModuleDict({"mid": attention()})
    report = prepare(model, QuantConfig(qkv_bits=5, probs_bits=7), Quantizers(attention=NormalizedActivation))
    processor = model["mid"].processor
    assert [type(m) for m in (processor.query, processor.key, processor.value)] == [NormalizedActivation] * 3
    assert type(processor.probabilities) is LSQProbability
    assert [(row.name, row.act_bits) for row in report.rows if row.kind == "attention"] == [("mid.qkv", 5), ("mid.probs", 7)]
    assert processor.query.bits == processor.value.bits == 5
    assert processor.probabilities.bits == 7
    assert {"mid.processor.query.log_scale", "mid.processor.probabilities.log_scale"} <= set(model.state_dict())


OPERANDS = ("query", "key", "value", "probabilities")


@pytest.mark.parametrize(
    ("scope", "acts"),
    {
        "qkv": (1, 1, 1, 0, 0),
        "attention": (1, 1, 1, 1, 0),
        "all_but_probs": (1, 1, 1, 0, 1),
        "all": (1, 1, 1, 1, 1),
        ("*.probabilities", "mid.to_q"): (0, 0, 0, 1, 1),
        ("mid.[kv]*",): (0, 1, 1, 0, 0),
    }.items(),
)
def test_scope_says_where_taq_acts(scope, acts):
    model = nn.ModuleDict({"mid": attention()})
    quantizers = Quantizers.with_taq(LSQWeight, LSQActivation, GroupedActivation, scope)
    report = prepare(model, QuantConfig(probs_bits=4), quantizers)
    processor = model["mid"].processor
    found = [*(getattr(processor, name) for name in OPERANDS), model["mid"].to_q.input_quantizer]
    assert [type(q) is GroupedActivation for q in found] == [bool(act) for act in acts]
    assert processor.probabilities.symmetric
    assert not processor.query.symmetric
    named = {row.name: row.quantizers for row in report.rows}
    assert named["mid.probs"] == [type(processor.probabilities).__name__]
    assert named["mid.qkv"] == list(dict.fromkeys(type(q).__name__ for q in found[:3]))


def test_a_scope_that_makes_no_sense_is_one_line():
    def quantizers(taq, scope):
        return Quantizers.with_taq(LSQWeight, LSQActivation, taq, scope)

    model = nn.ModuleDict({"mid": attention()})
    with pytest.raises(ValueError, match=r"taq\.scope: the pattern '\*\.conv9' matches no quantized activation: .* mid\.query"):
        prepare(model, QuantConfig(), quantizers(GroupedActivation, ["mid.*", "*.conv9"]))
    for scope in ("everywhere", [], [3], None):
        with pytest.raises(
            ValueError, match=r"^taq\.scope=.* is not allowed: choose one of qkv, attention, all, all_but_probs"
        ):
            quantizers(GroupedActivation, scope)

    class Own(LSQActivation):
        def __init__(self, *, bits, padded=False):
            super().__init__(bits=bits, padded=padded)

    with pytest.raises(ValueError, match=r"^taq\.scope=attention has TaQ act on probabilities, for which Own must take symm"):
        prepare(nn.ModuleDict({"mid": attention()}), QuantConfig(), quantizers(Own, "attention"))
    prepare(nn.ModuleDict({"mid": attention()}), QuantConfig(), quantizers(Own, "all_but_probs"))


def test_operands_follow_act_bits_and_rules():
    model = nn.ModuleDict({"a": attention(), "b": attention(), "c": attention()})
    prepare(model, QuantConfig(act_bits=3, rules={"b": 6, "c": 32}), first_last=())
    assert model["a"].processor.query.bits == 3
    assert model["a"].processor.probabilities.bits == 8
    assert model["b"].processor.query.bits == model["b"].processor.probabilities.bits == 6
    assert not isinstance(model["c"].processor, QuantizedAttention)
    assert model["c"].to_q.weight_quantizer.bits == 4  # the rule names the products, `c.*` its layers


def test_probabilities_alone_or_operands_alone():
    for options, kinds in (
        ({"qkv_bits": 32}, [type(None)] * 3 + [LSQProbability]),
        ({"probs_bits": 32}, [LSQActivation] * 3 + [type(None)]),
    ):
        model = nn.ModuleList([attention()])
        prepare(model, QuantConfig(**options))
        processor = model[0].processor
        assert [type(m) for m in (processor.query, processor.key, processor.value, processor.probabilities)] == kinds


def test_attention_of_another_kind_is_refused():
    class Mine(AttnProcessor):
        pass

    normed, own = attention(qk_norm="layer_norm"), attention()
    own.set_processor(Mine())
    for module, reason in ((normed, "its norm_q is set"), (own, "its processor is a Mine")):
        model = nn.ModuleDict({"mid": module})
        with pytest.raises(ValueError, match=rf"mid: this attention can't be quantized, {reason}: .*rules=\{{mid: 32\}}"):
            prepare(model, QuantConfig())
        prepare(model, QuantConfig(rules={"mid": 32}))
        assert not isinstance(module.processor, QuantizedAttention)


def test_other_modules_are_no_attention():
    assert is_attention(attention())
    assert not is_attention(nn.MultiheadAttention(4, 2))
    assert not is_attention(nn.Linear(2, 2))


def test_gradients_reach_every_scale():
    model, x = nn.ModuleList([attention()]), torch.randn(4, 9, 16)
    prepare(model, QuantConfig(weight_bits=3, act_bits=3, probs_bits=3), first_last=())
    calibrate(model, lambda: model[0](x), MSESearch())
    model[0](x).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert [name for name in missing if "zero_point" not in name and name != "0.to_k.bias"] == []
