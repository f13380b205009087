"""Compiled equals eager, and whatever keeps the compiler from running is seen."""

import pytest
import torch

from qdm_lightning.quantization import compiled
from qdm_lightning.quantization.functional import fake_quantize
from qdm_lightning.quantization.layers import swap
from qdm_lightning.quantization.quantizer import LSQActivation, LSQWeight
from qdm_lightning.quantization.taq import NormalizedActivation

CASES = {
    "vector": ((7,), 1),
    "linear input": ((4, 33), 1),
    "linear weight": ((33, 17), 33),
    "pointwise weight": ((8, 1, 1, 1), 8),
    "convolution weight": ((16, 3, 3, 3), 16),
    "activation": ((4, 16, 9, 9), 1),
    "activation by sample": ((5, 16, 9, 9), 5),
    "large activation": ((2, 32, 65, 65), 1),
    "one sample": ((1, 16, 8, 8), 1),
    "attention operand": ((4, 2, 64, 8), 4),
}
GRIDS = [(0, 15), (0, 3), (0, 255), (-8, 7), (-2, 1)]


@pytest.fixture
def fresh(monkeypatch):
    """Nothing compiled yet."""
    monkeypatch.setattr(compiled._backend, "compiled", {})


@pytest.fixture
def traced(monkeypatch, fresh):
    """Compiling without its slow half: every function is traced for any size, and the graph runs as it is."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", lambda graph, examples: lambda args: graph(*args))


def run(shape, rows, qmin, qmax, dtype=torch.float32, silu=False):
    """x_hat and the gradients to x, scale and, of a grid that is not symmetric, zero point."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(shape, generator=generator).to(dtype)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    scale = torch.rand(rows, generator=generator) * 0.5 + 0.1
    zero_point = torch.full((rows,), float((qmin + qmax + 1) // 2))
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)[: 3 if qmin == 0 else 2]]
    out = fake_quantize(x, scale, zero_point, qmin, qmax, 0.5, silu=silu)
    return out.detach(), *torch.autograd.grad(out, inputs, torch.randn(shape, generator=generator).to(dtype))


def run_all(grids, dtypes):
    return {(case, grid, dtype): run(*CASES[case], *grid, dtype) for dtype in dtypes for grid in grids for case in CASES}


def test_compiled_equals_eager(fresh):
    """Forward and the gradient to x exactly; sums in another order to 1e-6 of what is summed."""
    moments = {shape: torch.randn(shape) * 3 + 1 for shape in ((6, 1536), (1, 77), (4, 4096))}
    eager = run_all(GRIDS[:1] + GRIDS[3:4], [torch.float32])
    eager_moments = {shape: compiled.row_moments(x, 1e-5) for shape, x in moments.items()}
    compiled.set_mode("on")
    fused = run_all(GRIDS[:1] + GRIDS[3:4], [torch.float32])
    for name, expected in eager.items():
        for found, wanted in zip(fused[name][:2], expected[:2], strict=True):
            assert torch.equal(found, wanted), name
            assert found.stride() == wanted.stride(), name
        size = expected[1].abs().sum() * 255
        for found, wanted in zip(fused[name][2:], expected[2:], strict=True):
            assert (found - wanted).abs().max() <= 1e-6 * size, name
    for shape, x in moments.items():
        for found, wanted in zip(compiled.row_moments(x, 1e-5), eager_moments[shape], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert compiled.provenance() == {"fake_quantization": "compiled", "reason": "inductor"}


def test_compiled_silu_equals_eager(fresh):
    """Bit for bit, or one code apart where silu(x), which two exponentials may round apart, lies between two codes."""
    cases = {name: (*CASES[name], 0, 15) for name in ("activation", "linear input", "vector")}
    eager = {name: run(*case, silu=True) for name, case in cases.items()}
    compiled.set_mode("on")
    for name, case in cases.items():
        found, expected = run(*case, silu=True), eager[name]
        apart = found[0] != expected[0]
        assert apart.double().mean() <= 1e-3, name
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
        for one, other in zip(found[2:], expected[2:], strict=True):
            assert (one - other).abs().max() <= 1e-5 * expected[1].abs().sum() * 255, name


def layouts():
    """Tensors of every kind of memory, with the groups that their scales make."""
    images = torch.randn(4, 6, 5, 3)
    yield "contiguous", images, 1
    yield "channels last, by sample", images.contiguous(memory_format=torch.channels_last), 4
    yield "folded heads", torch.randn(4, 10, 16).view(4, 10, 2, 8).transpose(1, 2), 4
    yield "samples not the slowest", images.permute(1, 0, 2, 3), 6
    yield "part of the channels", torch.randn(4, 12, 5, 3).to(memory_format=torch.channels_last)[:, 3:9], 4
    yield "expanded", torch.randn(4, 1, 5, 3).expand(4, 6, 5, 3), 1
    yield "one number", torch.tensor(2.5), 1
    yield "nothing", torch.zeros(0, 3), 1
    yield "a long vector", torch.randn(compiled.ROW + 1), 1
    yield "a value for each number", torch.randn(7), 7
    yield "wide weight", torch.randn(3, 2, compiled.ROW // 2 + 5), 3


@pytest.mark.parametrize(("x", "groups"), [case[1:] for case in layouts()], ids=[case[0] for case in layouts()])
def test_rows_hold_the_numbers_of_one_group_each(x, groups):
    """Whatever the memory, x_hat and the gradients are those of the contiguous tensor, whose rows are groups."""
    rows, _ = compiled.as_rows(x, groups)
    assert rows.is_contiguous()
    assert rows.shape[-1] <= compiled.ROW or x.ndim == 1
    whole, parts = x.reshape(groups, -1), rows.reshape(groups, -1)
    assert torch.equal(parts.sort(1).values, whole.sort(1).values)
    scale = torch.linspace(0.2, 0.5, groups).requires_grad_()
    zero_point = torch.full((groups,), 3.0, requires_grad=True)
    upstream = torch.randn(x.shape)
    results = []
    for value in (x.detach(), x.detach().contiguous()):
        value.requires_grad_()
        out = fake_quantize(value, scale, zero_point, 0, 15, 0.5)
        results.append((out, *torch.autograd.grad(out, (value, scale, zero_point), upstream)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_result_is_nobodys_view():
    """autograd copies a gradient that is a view before it adds another to it."""
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    x.register_hook(found.append)
    out = fake_quantize(x, torch.ones(1), torch.zeros(1), 0, 15)
    out.sum().backward()
    assert len(found) == 1
    for tensor in (out, found[0]):
        assert tensor._base is None
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_silu_in_the_same_pass_is_silu_before():
    """Against autograd through torch's own silu."""
    x = (torch.randn(4, 16, 9, 9) * 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    scale, zero_point = torch.full((1,), 0.11), torch.full((1,), 3.0)
    upstream = torch.randn(4, 16, 9, 9)
    apart = fake_quantize(torch.nn.functional.silu(x), scale, zero_point, 0, 15)
    together = fake_quantize(x, scale, zero_point, 0, 15, silu=True)
    assert torch.equal(together, apart)
    (found,), (expected,) = (torch.autograd.grad(y, x, upstream) for y in (together, apart))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_every_shape_and_grid_is_one_of_a_few_variants(traced):
    """Forward, and backward with and without the zero point's gradient; whatever the size and the grid."""
    compiled.set_mode("on")
    found = run_all(GRIDS, [torch.float32])
    assert len(compiled._backend.compiled) == 3
    assert compiled.provenance()["fake_quantization"] == "compiled"
    compiled.set_mode("off")
    for name, expected in run_all(GRIDS, [torch.float32]).items():
        assert all(torch.equal(a, b) for a, b in zip(found[name], expected, strict=True)), name
    assert compiled.provenance() == {"fake_quantization": "eager", "reason": "asked for"}


def test_training_in_bfloat16_and_sampling_are_compiled(traced):
    compiled.set_mode("auto")
    quantizers = [NormalizedActivation(bits=2), LSQActivation(bits=8)]
    model = torch.nn.Conv2d(3, 1, 3)
    layer = swap(model, LSQWeight(bits=2, weight=model.weight), quantizers[0])
    for batch in (4, 3, 1):
        x = torch.randn(batch, 3, 9 + batch, 9).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            y = quantizers[1](layer.train()(x))
            assert y.dtype == torch.bfloat16
            quantizers[0](y)
        y.float().sum().backward()
        with torch.no_grad():
            quantizers[1](layer.eval()(x))
    assert compiled.provenance()["fake_quantization"] == "compiled"


def test_the_code_knows_its_threads(traced):
    """The number of threads stands in compiled code: another number compiles again."""
    compiled.set_mode("on")
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        fake_quantize(torch.ones(8), torch.ones(1), torch.zeros(1), 0, 15)
    assert [key[-1] for key in compiled._backend.compiled] == [1, 2]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_what_only_traces_runs_eager(fresh):
    """Shapes without data, and a compiler around the whole network."""
    compiled.set_mode("on")
    meta = fake_quantize(*(torch.ones(n, device="meta") for n in (4, 1, 1)), 0, 15)
    assert meta.is_meta
    whole = torch.compile(lambda x: fake_quantize(x, torch.ones(1), torch.zeros(1), 0, 15), backend="eager", fullgraph=True)
    assert torch.equal(whole(torch.full((4,), 3.3)), torch.full((4,), 3.0))
    assert not compiled._backend.compiled


def broken(*args, **kwargs):
    raise RuntimeError("no C++ compiler\nmore lines")


def test_auto_runs_eager_without_a_compiler_and_says_so(monkeypatch, fresh):
    expected = run(*CASES["activation"], 0, 15)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", broken)
    compiled.set_mode("auto")
    assert compiled.provenance() == {"fake_quantization": "unused", "reason": ""}
    assert all(torch.equal(a, b) for a, b in zip(run(*CASES["activation"], 0, 15), expected, strict=True))
    assert compiled.provenance() == {"fake_quantization": "eager", "reason": "compiling failed: no C++ compiler"}


def test_on_insists(monkeypatch, fresh):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", broken)
    compiled.set_mode("on")
    with pytest.raises(RuntimeError, match=r"trainer.compile=on, .* failed: no C\+\+ compiler; type trainer.compile=off"):
        run(*CASES["activation"], 0, 15)


def test_what_is_too_large_to_compile_runs_eager_and_says_so(monkeypatch, fresh):
    monkeypatch.setattr(compiled, "LARGEST", 7)
    x, scale, zero_point = torch.full((8,), 3.3), torch.ones(1), torch.zeros(1)
    compiled.set_mode("auto")
    assert torch.equal(fake_quantize(x, scale, zero_point, 0, 15), torch.full((8,), 3.0))
    assert not compiled._backend.compiled
    assert "more than 7 elements ran eager" in compiled.provenance()["reason"]
    compiled.set_mode("on")
    with pytest.raises(RuntimeError, match="a tensor has 8 elements"):
        fake_quantize(x, scale, zero_point, 0, 15)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="compile mode fast is not allowed: choose one of auto, on, off"):
        compiled.set_mode("fast")


def test_gradient_factor():
    assert compiled.gradient_factor((7, 25, 2, 2), 4) == 0.05
