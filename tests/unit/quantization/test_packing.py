"""Weights at their bits: as many bytes as `cost` counts, and the very same network from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qdm_lightning.quantization.calibration import MSESearch, calibrate
from qdm_lightning.quantization.cost import cost
from qdm_lightning.quantization.layers import QuantizedLayer
from qdm_lightning.quantization.packing import load_packed, pack, packed_state, unpack
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.quantizer import WeightQuantizer
from qdm_lightning.quantization.spec import QuantConfig

X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))


class Ternary(WeightQuantizer):
    """A user's own: two values that no scale reaches by an integer."""

    def forward(self, weight):
        return torch.where(weight > 0, 0.5, -0.3)

    def initialize(self, weight, calibrator):
        pass


def model(bits=4, seed=0, weight=None, **options):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(63, 4))
    quantizers = Quantizers() if weight is None else Quantizers(weight=weight)
    report = prepare(net, QuantConfig(weight_bits=bits, act_bits=bits, **options), quantizers)
    calibrate(net, lambda: net(X), MSESearch(steps=2))
    return net.eval(), report


@given(st.integers(2, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(-(2 ** (b - 1)), 2 ** (b - 1) - 1)))))
def test_codes_come_back(drawn):
    bits, codes = drawn
    packed = pack(torch.tensor(codes), bits)
    assert len(packed) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, (len(codes),)).tolist() == codes
    whole = sum((code + 2 ** (bits - 1)) << (bits * k) for k, code in enumerate(codes))  # the definition, as one number
    assert int.from_bytes(bytes(packed.tolist()), "little") == whole


@pytest.mark.parametrize(("codes", "bits"), [([2], 2), ([-3], 2), ([128], 8)])
def test_codes_that_do_not_fit(codes, bits):
    with pytest.raises(ValueError, match="do not fit"):
        pack(torch.tensor(codes), bits)


@pytest.mark.parametrize("channels", ["off", "rms", "learned"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_the_network_from_its_codes_is_the_same_to_the_last_bit(bits, channels):
    net, report = model(bits, channel_scales=channels)
    state = packed_state(net)
    assert {name for name in state if name.endswith("_codes")} == {f"{k}.weight_codes" for k in (0, 2, 4)}
    assert sum(value.nbytes for value in state.values()) == cost(net, report, X).totals()["bytes"]
    other, _ = model(bits, seed=7, channel_scales=channels)
    load_packed(other, state)
    assert torch.equal(other(X), net(X))
    again = packed_state(other)
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    load_packed(other, net.state_dict())  # float weights load too
    assert torch.equal(other[0].weight, net[0].weight)


def test_what_is_no_grid_or_shared_or_in_float_stays_as_it_is():
    own, _ = model(weight=Ternary)
    assert not any(name.endswith("_codes") for name in packed_state(own))
    net, _ = model(rules={"2": 32})
    assert {name for name in packed_state(net) if "weight" in name} >= {"2.weight", "0.weight_codes"}
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    prepare(tied, QuantConfig())
    assert {name for name in packed_state(tied) if "_codes" in name} == {"2.weight_codes"}


def test_one_layer_in_two_places():
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Linear(4, 4), layer)
    prepare(net, QuantConfig())
    state, expected = packed_state(net), net(X[..., :4])
    assert {"0.weight_codes", "2.weight_codes"} <= state.keys()
    with torch.no_grad():
        layer.weight.zero_()
    load_packed(net, state)
    assert torch.equal(net(X[..., :4]), expected)


def test_damaged_states_are_refused():
    net, _ = model()
    state = packed_state(net)
    with pytest.raises(ValueError, match="135 codes of 8 bits are 135 bytes"):
        load_packed(net, {**state, "0.weight_codes": state["0.weight_codes"][:-1]})
    with pytest.raises(RuntimeError, match="Missing key"):
        load_packed(net, {name: value for name, value in state.items() if name != "4.weight_codes"})
    assert all(isinstance(net[k], QuantizedLayer) for k in (0, 2, 4))
