"""What holds for every grid and every input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_lightning.quantization.functional import fake_quantize

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def grids(draw):
    """Scale, zero point and ends: unsigned with an integer zero point on the grid, or signed without one."""
    bits = draw(st.integers(2, 8))
    scale = torch.tensor([draw(st.floats(2**-13, 2**13, width=32))])
    if draw(st.booleans()):
        qmin, qmax = 0, 2**bits - 1
        zero_point = torch.tensor([float(draw(st.integers(qmin, qmax)))])
    else:
        qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        zero_point = torch.zeros(1)
    return scale, zero_point, qmin, qmax


values = st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40)


def input_for(grid, steps):
    """Numbers given in steps of the grid, so that all of it and its outside are met."""
    return torch.tensor(steps) * grid[0]


@SETTINGS
@given(grids())
def test_every_point_of_the_grid_is_its_own_image(grid):
    scale, zero_point, qmin, qmax = grid
    points = (torch.arange(qmin, qmax + 1) - zero_point) * scale
    assert torch.equal(fake_quantize(points, *grid), points)


@SETTINGS
@given(grids())
def test_zero_is_exact(grid):
    assert fake_quantize(torch.zeros(3), *grid).tolist() == [0.0] * 3


@SETTINGS
@given(grids(), values)
def test_monotone(grid, steps):
    x = input_for(grid, steps).sort().values
    assert bool((fake_quantize(x, *grid).diff() >= 0).all())


@SETTINGS
@given(grids(), values)
def test_idempotent(grid, steps):
    once = fake_quantize(input_for(grid, steps), *grid)
    assert torch.equal(fake_quantize(once, *grid), once)


@SETTINGS
@given(grids(), values, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_commutes(grid, steps, power):
    x, factor = input_for(grid, steps), 2.0**power
    scaled = fake_quantize(x * factor, grid[0] * factor, *grid[1:])
    assert torch.equal(scaled, fake_quantize(x, *grid) * factor)


@SETTINGS
@given(grids(), values)
def test_images_are_codes_and_at_most_half_a_step_away(grid, steps):
    scale, zero_point, qmin, qmax = grid
    x = input_for(grid, steps)
    out = fake_quantize(x, *grid)
    codes = out / scale + zero_point
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert qmin <= codes.round().min() <= codes.round().max() <= qmax
    inside = (x / scale + zero_point >= qmin) & (x / scale + zero_point <= qmax)
    assert bool(((out - x).abs()[inside] <= scale * 0.5001).all())


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_sweep_meets_every_level_and_no_more(bits):
    x = torch.linspace(-400, 400, 20001)
    assert len(fake_quantize(x, torch.tensor([0.7]), torch.tensor([1.0]), 0, 2**bits - 1).unique()) == 2**bits


@SETTINGS
@given(st.lists(grids(), min_size=2, max_size=4), values)
def test_rows_do_not_see_one_another(rows, steps):
    qmin, qmax = rows[0][2:]
    x = torch.stack([input_for(grid, steps) for grid in rows])
    scale, zero_point = (torch.cat(columns) for columns in list(zip(*rows, strict=True))[:2])
    together = fake_quantize(x, scale, zero_point, qmin, qmax)
    alone = [fake_quantize(x[i : i + 1], scale[i : i + 1], zero_point[i : i + 1], qmin, qmax) for i in range(len(rows))]
    assert torch.equal(together, torch.cat(alone))
