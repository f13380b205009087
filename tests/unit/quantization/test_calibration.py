import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdm_lightning.quantization.calibration import MinMax, MSESearch, Percentile, calibrate
from qdm_lightning.quantization.observer import SAMPLES_PER_ROW, Observer
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.quantizer import LSQActivation
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.quantization.taq import EMANormalizedActivation, GroupedActivation, NormalizedActivation
from qdm_lightning.quantization.timestep import timesteps

SEARCHES = [MinMax(), Percentile(99.0), MSESearch()]


def error(values, scale, zero_point, qmin, qmax):
    codes = (values / scale + zero_point).round().clamp(qmin, qmax)
    return ((codes - zero_point) * scale - values).square().mean().item()


def least_error(values, qmin, qmax, symmetric):
    """Over a dense grid of scales and every zero point."""
    widest = (values.max() - values.min()).item() / (qmax - qmin) * 1.5
    zero_points = [0] if symmetric else range(qmin, qmax + 1, max(1, qmax // 32))
    return min(
        error(values, scale, zero_point, qmin, qmax)
        for scale in torch.linspace(widest / 60, widest, 240).tolist()
        for zero_point in zero_points
    )


DATA = {"silu": lambda x: F.silu(2 * x), "gauss": lambda x: x, "one-sided": torch.exp, "small": lambda x: 1e-6 * x}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", DATA)
def test_mse_search_is_near_the_optimum(name, bits):
    values = DATA[name](torch.randn(1, 3000))
    qmax = 2**bits - 1
    found = {type(s): s.search(values, 0, qmax, symmetric=False) for s in SEARCHES}
    errors = {kind: error(values, *grid, 0, qmax) for kind, grid in found.items()}
    assert errors[MSESearch] <= errors[MinMax]
    assert errors[MSESearch] <= 1.05 * least_error(values, 0, qmax, symmetric=False)
    if bits <= 4:
        assert errors[MSESearch] < 0.8 * errors[MinMax]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_search_of_each_row(bits):
    values = torch.randn(5, 500) * torch.logspace(-3, 2, 5)[:, None]
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero_point = MSESearch().search(values, qmin, qmax, symmetric=True)
    assert scale.shape == zero_point.shape == (5,)
    assert zero_point.tolist() == [0.0] * 5
    for row in range(5):
        alone = MSESearch().search(values[row : row + 1], qmin, qmax, symmetric=True)
        torch.testing.assert_close(scale[row : row + 1], alone[0])
        best = least_error(values[row], qmin, qmax, symmetric=True)
        assert error(values[row], scale[row], 0, qmin, qmax) <= 1.1 * best


def test_min_max_and_percentile():
    values = torch.cat([torch.linspace(-1, 3, 1001), torch.tensor([-100.0, 500.0])])[None]
    scale, zero_point = MinMax().search(values, 0, 15, symmetric=False)
    assert (scale.item(), zero_point.item()) == (pytest.approx(40), 2)  # round(100 / 40)
    scale, zero_point = Percentile(99.0).search(values, 0, 255, symmetric=False)
    assert scale.item() == pytest.approx(4 * 0.98 / 255, rel=0.01)
    assert zero_point.item() == pytest.approx(63, abs=2)
    scale, _ = MinMax().search(values, -8, 7, symmetric=True)
    assert scale.item() == pytest.approx(500 / 7)
    scale, _ = MinMax().search(values.abs(), 0, 255, symmetric=True)
    assert scale.item() == pytest.approx(500 / 255)
    with pytest.raises(ValueError, match=r"quant\.calibrator\.percentile=40"):
        Percentile(40)


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("constant", [0.0, 2.0, -2.0, 1e-30])
def test_constant_inputs_give_finite_grids(search, symmetric, constant):
    values = torch.full((2, 50), constant)
    qmin, qmax = (-8, 7) if symmetric else (0, 15)
    scale, zero_point = search.search(values, qmin, qmax, symmetric=symmetric)
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all() & scale.log().isfinite().all())
    assert bool(((zero_point >= qmin) & (zero_point <= qmax)).all())
    assert error(values[0], scale[0], zero_point[0], qmin, qmax) <= 1e-10


def test_a_model_of_zeros_computes_zeros():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    prepare(model, QuantConfig())
    x = torch.zeros(2, 2, 6, 6)
    calibrate(model, lambda: model(x), MSESearch())
    out = model(x)
    out.sum().backward()
    assert out.abs().max() == 0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_record_is_bounded_and_its_ends_are_those_of_the_data():
    observer = Observer(torch.Generator().manual_seed(0))
    batches = [torch.randn(3, 40, 40) for _ in range(4)]
    for batch, t in zip(batches, range(0, 12, 3), strict=True):
        with timesteps(torch.arange(t, t + 3)):
            observer.add(batch)
    everything = torch.cat(batches).flatten(1)
    assert observer.values.shape == (12, SAMPLES_PER_ROW)
    assert observer.timesteps.tolist() == list(range(12))
    assert torch.equal(observer.ends, torch.stack([everything.amin(1), everything.amax(1)], dim=1))
    for kept, row in zip(observer.values, everything, strict=True):
        assert set(kept.tolist()) <= set(row.tolist())
    pool = observer.pool(observer.timesteps < 6)
    assert pool.shape == (1, 6 * SAMPLES_PER_ROW + 2)
    assert (pool.min(), pool.max()) == (everything[:6].min(), everything[:6].max())


@pytest.mark.parametrize("bits", [3, 4])
def test_a_record_leads_to_the_grid_of_least_error_of_all_the_data(bits):
    """The extremes of each sample must not weigh more in the record than they do in the data."""
    x = F.silu(torch.randn(64, 8192))
    quantizer = LSQActivation(bits=bits)
    observer = Observer(torch.Generator().manual_seed(0))
    observer.add(x)
    quantizer.initialize(observer, MSESearch())
    sample = x.flatten()[:: len(x.flatten()) // 8000]
    assert error(x, *quantizer.grid(x), 0, 2**bits - 1) <= 1.1 * least_error(sample, 0, 2**bits - 1, symmetric=False)


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1))


@pytest.mark.parametrize(
    "activation", [LSQActivation, NormalizedActivation, EMANormalizedActivation, GroupedActivation], ids=lambda k: k.__name__
)
@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
def test_eight_bits_after_calibration_are_close_to_float(activation, search):
    model, x, t = network(), torch.randn(16, 3, 8, 8), torch.linspace(0, 999, 16).long()
    expected = model(x)
    prepare(model, QuantConfig(weight_bits=8, act_bits=8), Quantizers(activation=activation))

    def run():
        with timesteps(t):
            model(x)

    calibrate(model, run, search)
    with timesteps(t):
        found = model(x)
    assert ((found - expected).square().mean() / expected.var()).sqrt() < 0.05


@pytest.mark.parametrize("widths", [{"weight_bits": 2, "act_bits": 32}, {"weight_bits": 32, "act_bits": 2}])
def test_quantizers_are_off_meanwhile_and_on_afterwards(widths):
    model, x = network(), torch.randn(4, 3, 8, 8)
    expected = model(x)
    prepare(model, QuantConfig(**widths), first_last=())
    seen = []
    calibrate(model, lambda: seen.append(model(x)), MinMax())
    assert torch.equal(seen[0], expected)
    assert not torch.allclose(model(x), expected, atol=1e-2)
    with pytest.raises(KeyError):  # an error on the way leaves the model quantized
        calibrate(model, lambda: {}["missing"], MinMax())
    assert not torch.allclose(model(x), expected, atol=1e-2)


def test_a_quantizer_that_saw_nothing_is_an_error():
    model = network()
    prepare(model, QuantConfig())
    with pytest.raises(
        RuntimeError, match=r"calibration reached no input of 2.input_quantizer, 4.input_quantizer: run the whole"
    ):
        calibrate(model, lambda: model[:2](torch.randn(1, 3, 8, 8)), MinMax())


def test_the_same_seed_gives_the_same_grids():
    x, grids = torch.randn(8, 3, 16, 16), []
    weights = network().state_dict()
    for _ in range(2):
        model = network()
        model.load_state_dict(weights)
        prepare(model, QuantConfig())
        calibrate(model, lambda model=model: model(x), MSESearch(), seed=3)
        grids.append(model.state_dict())
    assert all(torch.equal(grids[0][name], grids[1][name]) for name in grids[0])


def test_scales_by_channel_are_the_root_of_the_channels_root_mean_square():
    """Over their geometric mean; the float product stays, and quantized layers see channels of like size."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 3))
    with torch.no_grad():
        model[0].weight[5] = model[0].bias[5] = 0  # a channel that is silent
    x = torch.randn(16, 4, 4, 4) * torch.tensor([1.0, 4, 0.25, 9]).view(4, 1, 1)
    with torch.no_grad():
        expected, inner = model(x), model[0](x)
    config = QuantConfig(weight_bits=8, act_bits=8, channel_scales="rms")
    prepare(model, config)
    calls = []
    calibrate(model, lambda: calls.append(model(x)), MinMax())
    assert len(calls) == 2
    assert torch.equal(calls[1], expected)
    rms = x.square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(model[0].channel_scale, (rms / rms.log().mean().exp()).sqrt())
    rms = inner.square().mean((0, 2, 3)).sqrt()
    rms = rms.clamp(min=1e-3 * float(rms.square().mean().sqrt()))
    torch.testing.assert_close(model[1].channel_scale, (rms / rms.log().mean().exp()).sqrt(), rtol=1e-4, atol=1e-6)
    # The scaled weight on the scaled input is the layer itself, in groups too.
    layer = model[1]
    again = F.conv2d(inner * layer.channel_factors(), layer.scaled_weight(), layer.bias, groups=2)
    torch.testing.assert_close(again, F.conv2d(inner, layer.weight, layer.bias, groups=2), rtol=1e-4, atol=1e-5)
    assert 0 < (model(x) - expected).abs().max() < 0.05 * expected.abs().max()
    calibrate(model, lambda: model(x), MinMax())
    torch.testing.assert_close(model[0].channel_scale.square().log().sum(), torch.zeros(()), rtol=0, atol=1e-5)


def test_inputs_in_float_have_no_scales_by_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1))
    prepare(model, QuantConfig(act_bits=32, channel_scales="rms"))
    assert [layer.channel_scale is None for layer in model] == [False, True, False]
    assert "1.log_channel_scale" not in model.state_dict()
