"""TaQ against a direct formula, sample by sample in double precision."""

import pytest
import torch

from qdm_lightning.quantization.calibration import MinMax, MSESearch
from qdm_lightning.quantization.observer import Observer
from qdm_lightning.quantization.taq import EMANormalizedActivation, GroupedActivation, NormalizedActivation
from qdm_lightning.quantization.timestep import timesteps
from qdm_lightning.training.optimizer import QuantizerAdam

PSI = 1e-5


def normalized(bits=4, padded=False, scale=0.3, zero_point=6.2):
    quantizer = NormalizedActivation(bits=bits, padded=padded, psi=PSI)
    quantizer.set_grid(torch.tensor([scale]), torch.tensor([zero_point]))
    return quantizer


def by_sample(x, moments, bits, padded, scale, zero_point):
    """x_hat and the gradient to log s, each sample with its own mean and standard deviation; upstream is 1."""
    out, gradient, qmax = [], 0.0, 2**bits - 1
    for sample, (mean, std) in zip(x.double(), moments, strict=True):
        s_n = scale * std
        z_n = round(zero_point - mean / s_n)
        z_n = min(max(z_n, 0), qmax) if padded else z_n
        codes = ((sample / s_n).round() + z_n).clamp(0, qmax)
        out.append(s_n * (codes - z_n))
        ratio = sample / s_n
        outside = (ratio + z_n < 0) | (ratio + z_n > qmax)
        # x_hat depends on s through s_n, and through z_n: d z_n / d s = mean / (s_n s); d x_hat / d z_n = -s_n outside.
        slope = torch.where(outside, (codes - z_n) * std - mean / scale, (ratio.round() - ratio) * std)
        gradient += slope.sum() * scale * (sample.numel() * qmax) ** -0.5
    return torch.stack(out), gradient


def own_moments(x):
    return [(s.mean().item(), (s.var(correction=0) + PSI).sqrt().item()) for s in x.double()]


def samples(*shape):
    """Every sample with a mean and standard deviation of its own."""
    column = (-1, *[1] * (len(shape) - 1))
    return torch.randn(shape) * torch.logspace(-1, 1, shape[0]).view(column) + torch.linspace(-3, 2, shape[0]).view(column)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(6, 4, 5, 5), (6, 2, 9, 8)])
def test_normalize_by_hand(bits, padded, shape):
    x = samples(*shape)
    scale, zero_point = 4.0 / 2**bits, 2**bits / 2.2
    quantizer = normalized(bits, padded, scale, zero_point)
    out = quantizer(x)
    out.sum().backward()
    expected, gradient = by_sample(x, own_moments(x), bits, padded, scale, zero_point)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.log_scale.grad.double(), gradient[None], rtol=1e-3, atol=1e-4)


def test_normalize_has_zero_on_the_grid_only_where_zeros_are_padded():
    x = torch.randn(2, 3, 8, 8) + 9
    assert normalized(padded=True).grid(x)[1].tolist() == [0.0, 0.0]
    assert bool((normalized().grid(x)[1] < 0).all())


def test_moments_carry_no_gradient():
    x = torch.randn(3, 50, requires_grad=True)
    quantizer = normalized(bits=8, scale=0.1, zero_point=128.0)
    quantizer(x).sum().backward()
    assert x.grad.unique().tolist() == [1.0]  # nothing clipped, and no path through mean and std


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sample_does_not_see_its_batch(layout):
    x = samples(5, 4, 6, 6).to(memory_format=layout)
    quantizer = normalized()
    together = quantizer(x)
    alone = torch.cat([quantizer(x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(quantizer(x.flip(0)), together.flip(0))


@pytest.mark.parametrize(("groups", "total"), [(20, 1000), (1, 1000), (1000, 1000), (7, 1000), (3, 10), (8, 10)])
def test_group_is_the_floor_of_t_g_over_t(groups, total):
    t = torch.arange(total)
    quantizer = GroupedActivation(bits=4, groups=groups, num_train_timesteps=total)
    assert quantizer.group_of(t).tolist() == [k * groups // total for k in range(total)]


@pytest.mark.parametrize("t", [-1, 1000])
def test_timesteps_outside_the_process_are_refused(t):
    with pytest.raises(ValueError, match=r"timesteps -?\d+..\d+ lie outside \[0, 1000\)"):
        GroupedActivation(bits=4).group_of(torch.tensor([5, t]))


@pytest.mark.parametrize("kind", [EMANormalizedActivation, GroupedActivation])
def test_t_is_required(kind):
    quantizer = kind(bits=4, groups=4)
    with pytest.raises(RuntimeError, match=f"{kind.__name__} needs the timesteps: run the model under `with timesteps"):
        quantizer(torch.randn(2, 3))
    quantizer.observer = Observer(torch.Generator())
    with pytest.raises(RuntimeError, match=f"{kind.__name__} needs the timesteps"):
        quantizer(torch.randn(2, 3))


@pytest.mark.parametrize("kind", [EMANormalizedActivation, GroupedActivation])
def test_groups_never_seen_are_an_error_in_evaluation(kind):
    quantizer = kind(bits=4, groups=4)
    x = torch.randn(2, 3)
    with timesteps(torch.tensor([0, 600])):
        quantizer(x)
        quantizer.eval()(x)
    with (
        timesteps(torch.tensor([0, 999])),
        pytest.raises(RuntimeError, match=r"groups \[3\] of 4 were never seen in calibration or training: .*taq.groups="),
    ):
        quantizer(x)
    copy = kind(bits=4, groups=4).eval()
    copy.load_state_dict(quantizer.state_dict())
    with timesteps(torch.tensor([0, 600])):
        assert torch.equal(copy(x), quantizer(x))


def test_ema_tables_follow_the_groups_means():
    quantizer = EMANormalizedActivation(bits=4, groups=4, momentum=0.9, psi=PSI)
    x, y = samples(4, 50), samples(4, 50).flip(0)
    with timesteps(torch.tensor([10, 20, 260, 999])):
        quantizer(x)
    first = own_moments(x)
    assert quantizer.seen.tolist() == [True, True, False, True]
    expected = [(first[0][0] + first[1][0]) / 2, first[2][0], 0.0, first[3][0]]
    torch.testing.assert_close(quantizer.mean.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    before = quantizer.std.clone()
    with timesteps(torch.tensor([260, 400, 600, 700])):
        quantizer(y)
    second = own_moments(y)
    updated = 0.9 * before[1].item() + 0.1 * (second[0][1] + second[1][1]) / 2
    expected = [before[0].item(), updated, (second[2][1] + second[3][1]) / 2, before[3].item()]
    torch.testing.assert_close(quantizer.std.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_tables_of_version_0_1_load():
    """Its checkpoints hold the table of standard deviations as `deviation`."""
    quantizer = EMANormalizedActivation(bits=4, groups=2, psi=PSI)
    with timesteps(torch.tensor([0, 999])):
        quantizer(samples(2, 40))
    state = {name.replace("std", "deviation"): value for name, value in quantizer.state_dict().items()}
    assert "deviation" in state
    other = torch.nn.ModuleDict({"inner": EMANormalizedActivation(bits=4, groups=2, psi=PSI)})
    other.load_state_dict({f"inner.{name}": value for name, value in state.items()})
    assert torch.equal(other["inner"].std, quantizer.std)
    assert not torch.equal(quantizer.std, torch.ones(2))


@pytest.mark.parametrize("padded", [False, True])
def test_ema_quantizes_by_its_tables_and_evaluation_leaves_them(padded):
    quantizer = EMANormalizedActivation(bits=4, groups=2, padded=padded, psi=PSI)
    quantizer.set_grid(torch.tensor([0.3]), torch.tensor([6.2]))
    with timesteps(torch.tensor([0, 999])):
        quantizer(samples(2, 40))
    quantizer.eval()
    tables = [table.clone() for table in (quantizer.mean, quantizer.std, quantizer.seen)]
    x, t = samples(3, 40), torch.tensor([700, 1, 800])
    with timesteps(t):
        out = quantizer(x)
    moments = [(quantizer.mean[g].item(), quantizer.std[g].item()) for g in (1, 0, 1)]
    torch.testing.assert_close(out.double(), by_sample(x, moments, 4, padded, 0.3, 6.2)[0], rtol=1e-5, atol=1e-6)
    for before, after in zip(tables, (quantizer.mean, quantizer.std, quantizer.seen), strict=True):
        assert torch.equal(before, after)


def test_heads_folded_into_the_batch_use_their_samples_group():
    quantizer = GroupedActivation(bits=4, groups=2)
    quantizer.set_grid(torch.tensor([0.1, 0.7]), torch.tensor([2.0, 9.0]))
    x = torch.randn(4, 5, 6)
    with timesteps(torch.tensor([3, 900])):
        scale, zero_point = quantizer.grid(x)
        quantizer(x)
    torch.testing.assert_close(scale, torch.tensor([0.1, 0.1, 0.7, 0.7]))
    assert zero_point.tolist() == [2.0, 2.0, 9.0, 9.0]
    with timesteps(torch.tensor([3, 900, 5])), pytest.raises(ValueError, match="a tensor of 4 rows"):
        quantizer(x)


def grouped(groups=4):
    quantizer = GroupedActivation(bits=3, groups=groups)
    quantizer.set_grid(torch.linspace(0.2, 0.5, groups), torch.linspace(1.0, 4.0, groups))
    return quantizer


def test_scale_gives_gradients_to_the_groups_present():
    quantizer, t = grouped(), torch.tensor([10, 600, 610])
    x = torch.randn(3, 200)
    with timesteps(t):
        out = quantizer(x)
    out.square().sum().backward()
    for parameter in quantizer.parameters():
        assert (parameter.grad != 0).tolist() == [True, False, True, False]
    for g, rows in ((0, [0]), (2, [1, 2])):  # each group as a quantizer of its own
        plain = GroupedActivation(bits=3, groups=1)
        plain.set_grid(quantizer.scale[g : g + 1].detach(), quantizer.zero_point[g : g + 1].detach())
        with timesteps(t[rows]):
            single = plain(x[rows])
        single.square().sum().backward()
        torch.testing.assert_close(single, out[rows])
        torch.testing.assert_close(plain.log_scale.grad[0], quantizer.log_scale.grad[g])
        torch.testing.assert_close(plain.zero_point.grad[0], quantizer.zero_point.grad[g])


@pytest.mark.parametrize("kind", [QuantizerAdam, torch.optim.Adam])
def test_absent_groups_are_not_moved_by_momentum(kind):
    quantizer = grouped()
    optimizer = kind(quantizer.parameters(), lr=0.05)

    def step(*t):
        optimizer.zero_grad()
        with timesteps(torch.tensor(t)):
            quantizer(torch.randn(len(t), 200)).square().sum().backward()
        optimizer.step()

    step(10, 300, 600, 900)
    before = [p.detach().clone() for p in quantizer.parameters()]
    step(10, 600)
    moved = [(p != b).tolist() for p, b in zip(quantizer.parameters(), before, strict=True)]
    absent_moves = kind is torch.optim.Adam
    assert moved == [[True, absent_moves, True, absent_moves]] * 2


def record_at(t, x):
    observer = Observer(torch.Generator().manual_seed(0))
    with timesteps(t):
        observer.add(x)
    return observer


def test_each_group_starts_from_its_own_samples_however_few_the_others_have():
    x = torch.cat([torch.randn(1, 64), 10 * torch.rand(60, 64)])
    t = torch.tensor([0] + [999] * 60)
    quantizer = GroupedActivation(bits=4, groups=3)
    calibrator = MSESearch()
    quantizer.initialize(record_at(t, x), calibrator)
    assert quantizer.seen.tolist() == [True, False, True]
    for g, values in ((0, x[:1]), (2, x[1:])):
        scale, zero_point = calibrator.search(values.flatten()[None], 0, 15, symmetric=False)
        torch.testing.assert_close(quantizer.scale[g : g + 1].detach(), scale, rtol=0.02, atol=0)
        assert quantizer.zero_point[g].item() == zero_point.item()


def test_normalize_starts_in_units_of_the_deviation():
    x = samples(16, 500)
    quantizer = NormalizedActivation(bits=8, psi=PSI)
    quantizer.observer = Observer(torch.Generator().manual_seed(0))
    quantizer(x)
    quantizer.initialize(quantizer.observer, MinMax())
    quantizer.observer = None
    unit = torch.stack([(s - m) / d for s, (m, d) in zip(x, own_moments(x), strict=True)])
    assert quantizer.scale.item() == pytest.approx((unit.max() - unit.min()).item() / 255, rel=0.02)
    error = (quantizer(x) - x).std(dim=1) / x.std(dim=1)
    assert error.max() < 0.02


def probabilities(rows=6, keys=9):
    """Softmax from nearly even to nearly one-hot, sample by sample."""
    return (torch.randn(rows, 2, keys, keys) * torch.logspace(-1.5, 1, rows).view(-1, 1, 1, 1)).softmax(-1)


def test_normalize_without_a_zero_point_follows_the_greatest_value():
    p = probabilities().requires_grad_()
    quantizer = NormalizedActivation(bits=4, symmetric=True)
    quantizer.set_grid(torch.tensor([0.06]), torch.zeros(1))
    out = quantizer(p)
    out.sum().backward()
    expected, slope = [], 0.0
    for sample in p.detach().double():
        step = 0.06 * sample.max()
        ratio = sample / step
        codes = ratio.round().clamp(0, 15)
        expected.append(codes * step)
        slope += torch.where(ratio <= 15, codes - ratio, codes).sum() * step * (sample.numel() * 15) ** -0.5
    torch.testing.assert_close(out.detach().double(), torch.stack(expected), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(quantizer.log_scale.grad.double(), slope[None], rtol=1e-3, atol=1e-5)
    assert [name for name, _ in quantizer.named_parameters()] == ["log_scale"]


@pytest.mark.parametrize("kind", [GroupedActivation, EMANormalizedActivation])
def test_groups_without_a_zero_point(kind):
    """Each group its own grid, far better than one for all; what is stored has no zero points."""
    p, t = probabilities(), torch.tensor([0, 200, 400, 600, 800, 999])
    quantizer = kind(bits=4, symmetric=True, groups=6)
    observer = Observer(torch.Generator().manual_seed(0))
    quantizer.observer = observer
    with timesteps(t):
        quantizer(p)
        quantizer.observer = None
        quantizer.initialize(observer, MSESearch())
        out = quantizer.eval()(p)
        scale, zero_point = quantizer.grid(p)
    assert not zero_point.any()
    assert scale.shape == (6,)
    torch.testing.assert_close((p / scale.view(-1, 1, 1, 1)).round().clamp(0, 15) * scale.view(-1, 1, 1, 1), out)
    assert "zero_point" not in quantizer.state_dict()
    one = MSESearch().search(p.reshape(1, -1), 0, 15, symmetric=True)[0]
    whole = (p / one).round().clamp(0, 15) * one
    assert ((out - p).square().mean((1, 2, 3))[:3] < 0.5 * (whole - p).square().mean((1, 2, 3))[:3]).all()
