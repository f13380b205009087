import copy

import pytest
import torch
from torch import nn

from qdm_lightning.quantization.calibration import MinMax, calibrate
from qdm_lightning.quantization.layers import QuantConv2d, QuantizedLayer, QuantLinear
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.quantizer import LSQActivation, LSQProbability, LSQWeight
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.quantization.taq import NormalizedActivation


def network():
    """A user's own module: three convolutions, a norm and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.Linear(8, 2),
    )


def bits(report):
    return {row.name: (row.weight_bits, row.act_bits) for row in report.rows}


def test_first_and_last_layer_have_bits_of_their_own():
    report = prepare(network(), QuantConfig(weight_bits=3, act_bits=4, first_last_bits=6))
    assert bits(report) == {"0": (6, 6), "1": (32, 32), "2": (3, 4), "4": (3, 4), "5": (6, 6)}
    assert [row.name for row in report.rows if not row.quantizers] == ["1"]


def test_first_and_last_layers_by_name():
    report = prepare(network(), QuantConfig(weight_bits=2, act_bits=2), first_last=("4",))
    assert bits(report) == {"0": (2, 2), "1": (32, 32), "2": (2, 2), "4": (8, 8), "5": (2, 2)}


def test_rules_go_over_everything_and_the_last_that_matches_wins():
    report = prepare(network(), QuantConfig(rules={"*": 5, "[02]": 3, "2": 32}))
    assert bits(report) == {"0": (3, 3), "1": (32, 32), "2": (32, 32), "4": (5, 5), "5": (5, 5)}
    assert [row.name for row in report.rows if not row.quantizers] == ["1", "2"]


@pytest.mark.parametrize(
    "options", [{"config": QuantConfig(rules={"conv*": 8})}, {"config": QuantConfig(), "first_last": ("conv*",)}]
)
def test_a_pattern_without_a_match_is_refused(options):
    kind = r"first_last" if "first_last" in options else r"quant\.rules"
    with pytest.raises(ValueError, match=rf"{kind}: the pattern 'conv\*' matches no layer: layers are named like 0, 2, 4"):
        prepare(network(), **options)


def test_weights_or_inputs_alone():
    model = network()
    prepare(model, QuantConfig(weight_bits=4, act_bits=32), first_last=())
    assert all(m.input_quantizer is None and m.weight_quantizer for m in model if isinstance(m, QuantizedLayer))
    model = network()
    report = prepare(model, QuantConfig(weight_bits=32, act_bits=4), first_last=())
    assert all(m.weight_quantizer is None and m.input_quantizer for m in model if isinstance(m, QuantizedLayer))
    assert report.summary() == "806 parameters: 806 at float"


def test_layers_keep_their_very_parameters_name_and_mode():
    for mode in (True, False):
        model = network().train(mode)
        before = dict(model.named_parameters())
        prepare(model, QuantConfig())
        after = dict(model.named_parameters())
        assert all(after[name] is before[name] for name in before)
        assert type(model[2]) is QuantConv2d
        assert type(model[4]) is QuantLinear
        assert all(m.training is mode for m in model.modules())


def test_zero_stays_on_the_grid_of_every_convolution():
    model = network()
    prepare(model, QuantConfig(), Quantizers(activation=NormalizedActivation))
    padded = {name: m.input_quantizer.padded for name, m in model.named_children() if isinstance(m, QuantizedLayer)}
    assert padded == {"0": True, "2": True, "4": False, "5": False}


def test_hooks_move_along():
    model, seen = network(), []
    model[2].register_forward_hook(lambda *_: seen.append(1))
    prepare(model, QuantConfig())
    calibrate(model, lambda: model(torch.randn(2, 3, 4, 4)), MinMax())
    assert seen == [1]


def test_a_layer_in_two_places_is_quantized_in_both():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(layer, nn.ReLU(), layer), "c": layer})
    report = prepare(model, QuantConfig(), first_last=("a",))
    assert model["b"][0] is model["b"][2] is model["c"]
    assert type(model["c"]) is QuantLinear
    assert list(bits(report)) == ["a", "b.0"]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    prepare(model, QuantConfig(), first_last=())
    assert model[1].weight is model[0].weight
    assert model[1].weight_quantizer is not model[0].weight_quantizer


def test_a_prepared_model_is_refused():
    model = network()
    prepare(model, QuantConfig())
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="the model is prepared already: prepare a fresh float model"):
            prepare(again, QuantConfig())


def test_a_bare_layer_is_refused():
    with pytest.raises(ValueError, match=r"the model is a bare Linear: wrap it, for example nn.Sequential\(model\)"):
        prepare(nn.Linear(2, 2), QuantConfig())


UNSUPPORTED = {
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3),
    "Conv3d": lambda: nn.Conv3d(4, 4, 3),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "LSTM": lambda: nn.LSTM(4, 4),
    "Bilinear": lambda: nn.Bilinear(4, 4, 4),
    "Mine": lambda: type("Mine", (nn.Linear,), {})(4, 4),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_cannot_be_quantized_is_an_error_and_the_rule_that_it_names_helps(kind):
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "other": UNSUPPORTED[kind](), "last": nn.Linear(4, 4)})
    rule = r"quant\.rules=\{other: 32\}"
    with pytest.raises(
        ValueError, match=rf"other is a {kind}, which can't be quantized .*: leave it in float by the rule {rule}"
    ):
        prepare(copy.deepcopy(model), QuantConfig())
    before = {name: type(m) for name, m in model["other"].named_modules()}
    report = prepare(model, QuantConfig(rules={"other": 32}))
    assert {name: type(m) for name, m in model["other"].named_modules()} == before
    assert sum(row.parameters for row in report.rows) == sum(
        p.numel() for name, p in model.named_parameters() if "quantizer" not in name
    )


def test_parameters_of_other_modules_are_reported_as_float():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    report = prepare(model, QuantConfig())
    assert [(row.name, row.kind, row.parameters) for row in report.rows if not row.quantizers] == [
        ("0", "Embedding", 12),
        ("2", "LayerNorm", 8),
    ]


def test_a_table_says_it_all():
    report = prepare(network(), QuantConfig(weight_bits=4, act_bits=3))
    lines = report.table().splitlines()
    assert lines[0].split() == ["module", "kind", "parameters", "weight", "input", "quantizers"]
    assert lines[3].split() == ["2", "Conv2d", "148", "4", "3", "LSQWeight", "LSQActivation"]
    assert lines[2].split() == ["1", "GroupNorm", "8", "float", "float", "-"]
    assert report.summary() == "806 parameters: 668 at 4 bits, 130 at 8 bits, 8 at float"
    assert report.rows[2].quantizers == ["LSQWeight", "LSQActivation"]
    assert report.quantized == [row for row in report.rows if row.name != "1"]


def test_a_users_own_factories_are_called_with_what_they_need():
    asked = []

    def weight(**options):
        asked.append(("weight", options["bits"], tuple(options["weight"].shape)))
        return LSQWeight(**options)

    def activation(**options):
        asked.append(("activation", options))
        return LSQActivation(**options)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    prepare(model, QuantConfig(weight_bits=5, act_bits=3), Quantizers(weight=weight, activation=activation), first_last=())
    assert asked == [
        ("weight", 5, (4, 3, 3, 3)),
        ("activation", {"bits": 3, "padded": True}),
        ("weight", 5, (2, 16)),
        ("activation", {"bits": 3, "padded": False}),
    ]
    assert Quantizers().probabilities is LSQProbability


def test_a_plain_training_loop():
    """`prepare`, `calibrate` and torch alone."""
    x = torch.randn(64, 3, 4, 4)
    y = x.mean((2, 3))[:, :2]
    model = network()
    prepare(model, QuantConfig(weight_bits=3, act_bits=3))
    calibrate(model, lambda: model(x), MinMax())
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(40):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    reloaded = network()
    prepare(reloaded, QuantConfig(weight_bits=3, act_bits=3))
    reloaded.load_state_dict(model.state_dict())
    assert torch.equal(reloaded.eval()(x), model.eval()(x))
