"""LSQ+'s forward and backward against a loop over single numbers in double precision."""

import pytest
import torch
import torch.nn.functional as F

from qdm_lightning.quantization.functional import exp, fake_quantize, quantize

GRIDS = [(0, 3), (0, 15), (0, 255), (-2, 1), (-8, 7), (-128, 127)]


def by_hand(x, upstream, scale, zero_point, qmin, qmax):
    """x_hat and the gradients to x, s and z, element by element; s and z one number for each row of x."""
    out, grad_x = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    grad_s, grad_z = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for row in range(len(x)):
        s, z = scale[row].item(), int(zero_point[row])
        for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[1:])).view(-1, x.ndim - 1).tolist():
            place = (row, *index)
            value, g = x[place].item(), upstream[place].item()
            out[place] = s * (min(max(round(value / s) + z, qmin), qmax) - z)
            if value / s + z < qmin:
                grad_s[row] += g * (qmin - z)
                grad_z[row] += g * -s
            elif value / s + z > qmax:
                grad_s[row] += g * (qmax - z)
                grad_z[row] += g * -s
            else:
                grad_x[place] = g
                grad_s[row] += g * (round(value / s) - value / s)
    return out, grad_x, grad_s, grad_z


def ours(x, upstream, scale, zero_point, qmin, qmax, factor=1.0):
    x, scale, zero_point = x.detach(), scale.clone().requires_grad_(), zero_point.clone().requires_grad_()
    x.requires_grad_()
    out = fake_quantize(x, scale, zero_point, qmin, qmax, factor)
    return out.detach(), *torch.autograd.grad(out, (x, scale, zero_point), upstream)


def example(qmin, qmax, rows, shape=(4, 3, 2, 5)):
    """About a third of the values lie outside the range."""
    generator = torch.Generator().manual_seed(qmax + rows)
    zero_point = torch.randint(qmin, qmax + 1, (rows,), generator=generator).float() if qmin == 0 else torch.zeros(rows)
    scale = 0.05 + torch.rand(rows, generator=generator)
    x = (torch.rand(shape, generator=generator) * 1.5 - 0.25) * (qmax - qmin) + qmin
    column = (-1, *[1] * (len(shape) - 1))
    x = (x - zero_point.view(column)) * scale.view(column)
    return x, torch.randn(shape, generator=generator), scale, zero_point


@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
@pytest.mark.parametrize("rows", [1, 4])
def test_forward_and_gradients_by_hand(qmin, qmax, rows):
    x, upstream, scale, zero_point = example(qmin, qmax, rows)
    out, grad_x, grad_s, grad_z = ours(x, upstream, scale, zero_point, qmin, qmax)
    expected = by_hand(x, upstream, scale.expand(4), zero_point.expand(4), qmin, qmax)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(grad_x.double(), expected[1])
    assert 0 < (grad_x == 0).double().mean() < 0.6  # both cases occur
    if rows == 1:
        expected = (*expected[:2], expected[2].sum()[None], expected[3].sum()[None])
    torch.testing.assert_close(grad_s.double(), expected[2], rtol=1e-5, atol=1e-5 * qmax)
    torch.testing.assert_close(grad_z.double(), expected[3], rtol=1e-5, atol=1e-5)


def test_the_ends_of_the_range_belong_to_it():
    x = torch.tensor([-0.5, -0.5001, 7.0, 7.0001])
    one = torch.ones(4)
    out, grad_x, grad_s, grad_z = ours(x, one, torch.tensor([0.5]), torch.tensor([1.0]), 0, 15)
    assert out.tolist() == [-0.5, -0.5, 7.0, 7.0]
    assert grad_x.tolist() == [1, 0, 1, 0]
    assert grad_s.item() == -1 + 14
    assert grad_z.item() == -1


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_factor_scales_the_gradient_of_the_scale_alone(factor):
    case = example(0, 15, 4)
    plain, scaled = ours(*case, 0, 15), ours(*case, 0, 15, factor)
    assert torch.equal(scaled[2], plain[2] * factor)
    for a, b in zip(plain[:2] + plain[3:], scaled[:2] + scaled[3:], strict=True):
        assert torch.equal(a, b)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every other column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "one row": lambda x: x[:1],
    "one element": lambda x: x[:1, :1, :1, :1],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 4])
def test_every_layout_gives_what_the_contiguous_one_does(name, rows):
    x, upstream, scale, zero_point = example(0, 15, rows)
    x = LAYOUTS[name](x)
    upstream, scale, zero_point = upstream[: x.shape[0], : x.shape[1]], scale[: x.shape[0]], zero_point[: x.shape[0]]
    upstream = upstream[..., : x.shape[2], : x.shape[3]]
    expected = ours(x.contiguous(), upstream.contiguous(), scale, zero_point, 0, 15)
    for gradient in (upstream, LAYOUTS["transposed"](upstream)):
        found = ours(x, gradient, scale, zero_point, 0, 15)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2:], expected[2:], rtol=1e-5, atol=1e-5)
    if name == "channels last":
        assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4,)])
def test_any_number_of_axes(shape):
    x, upstream, scale, zero_point = example(0, 7, 1, shape)
    out, grad_x, _, _ = ours(x, upstream, scale, zero_point, 0, 7)
    codes = torch.clamp(torch.round(x / scale) + zero_point, 0, 7)
    assert torch.equal(out, (codes - zero_point) * scale)
    assert grad_x.shape == x.shape


def test_bfloat16_is_computed_in_float32():
    x, upstream, scale, zero_point = example(0, 15, 4)
    x, upstream = x.bfloat16(), upstream.bfloat16()
    expected = ours(x.float(), upstream.float(), scale, zero_point, 0, 15)
    found = ours(x, upstream, scale, zero_point, 0, 15)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(found[0], expected[0].bfloat16())
    assert torch.equal(found[1], expected[1].bfloat16())
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[3], expected[3])


def test_autocast_leaves_the_scales_in_float32():
    x, _, scale, zero_point = example(0, 15, 1)
    expected = fake_quantize(x, scale, zero_point, 0, 15)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fake_quantize(x, scale, zero_point, 0, 15), expected)


def test_backward_keeps_the_input_and_no_other_tensor_of_its_size():
    x, _, scale, zero_point = example(0, 15, 1, (4, 3, 16, 16))
    x.requires_grad_(), scale.requires_grad_(), zero_point.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize(x, scale, zero_point, 0, 15)
    large = [t for t in kept if t.numel() > 1]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("scales", "zero_points"), [(3, 3), (4, 1), (2, 2)])
def test_scales_that_fit_no_axis_are_refused(scales, zero_points):
    with pytest.raises(
        ValueError, match=f"scale has {scales} and zero_point {zero_points} elements .* both 1 element or both 4"
    ):
        fake_quantize(torch.zeros(4, 3), torch.ones(scales), torch.zeros(zero_points), 0, 15)


def test_a_second_derivative_is_refused():
    x = torch.randn(3, requires_grad=True)
    out = fake_quantize(x, torch.ones(1), torch.zeros(1), 0, 15).square().sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_codes():
    x = torch.tensor([[-1.0, 0.24, 0.26, 9.0]], requires_grad=True)
    codes = quantize(x, torch.tensor(0.5), torch.tensor(1.0), 0, 15)
    assert codes.tolist() == [[0.0, 1.0, 2.0, 15.0]]
    assert not codes.requires_grad
    assert ((codes - 1.0) * 0.5).tolist() == fake_quantize(x, torch.tensor([0.5]), torch.tensor([1.0]), 0, 15).tolist()


@pytest.mark.parametrize("rows", [1, 6])
def test_a_scale_that_brings_its_logarithm_takes_autograd_past_the_exponential(rows):
    """The same result, bit for bit, and autograd's own gradient to log s."""
    x = (torch.randn(6, 5, 4) * 2).requires_grad_()
    log_scale = torch.linspace(-1.5, 0.3, rows).requires_grad_()
    zero_point = torch.full((rows,), 6.0, requires_grad=True)
    inputs, upstream = (x, log_scale, zero_point), torch.randn(6, 5, 4)
    apart = fake_quantize(x, log_scale.exp(), zero_point, 0, 15, 0.7)
    together = fake_quantize(x, exp(log_scale), zero_point, 0, 15, 0.7)
    assert torch.equal(together, apart)
    assert together.grad_fn.next_functions[1][0].variable is log_scale
    for found, expected in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (together, apart)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("shape", [(6, 8, 5, 3), (6, 8, 70, 70), (6, 7, 8), (6, 8)])
def test_factors_by_channel_are_a_product_before_the_grid(shape, rows, silu):
    """Bit for bit, in each layout, and with autograd's gradients of the operations one by one."""
    channels = torch.rand(8) + 0.5
    if len(shape) == 4:
        channels = channels.view(8, 1, 1)
    x, upstream = torch.randn(shape) * 2, torch.randn(shape)
    scale, zero_point = torch.linspace(0.1, 0.4, rows).requires_grad_(), torch.full((rows,), 6.2, requires_grad=True)
    layouts = [torch.contiguous_format, torch.channels_last] if len(shape) == 4 else [torch.contiguous_format]
    for layout in layouts:
        own = x.contiguous(memory_format=layout).requires_grad_()
        together = fake_quantize(own, scale, zero_point, 0, 15, 0.7, silu=silu, channels=channels)
        apart = fake_quantize((F.silu(own) if silu else own) * channels, scale, zero_point, 0, 15, 0.7)
        assert torch.equal(together, apart)
        assert together.stride() == own.stride()
        inputs = (own, scale, zero_point)
        for found, expected in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (together, apart)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
