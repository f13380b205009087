import copy
import functools
import inspect
import io
import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn

from qdm_lightning.integer import to_integer
from qdm_lightning.quantization import GroupedActivation, MinMax, QuantConfig, Quantizers, cached_weights, calibrate, prepare
from qdm_lightning.quantization.timestep import NAMES, current_timesteps, tell_own_timesteps, timesteps


def test_only_within_the_block():
    assert current_timesteps(2) is None
    with timesteps(torch.tensor([3, 5])):
        assert current_timesteps(2).tolist() == [3, 5]
        with timesteps(torch.tensor(7)):
            assert current_timesteps(2).tolist() == [7, 7]
        assert current_timesteps(2).tolist() == [3, 5]
    assert current_timesteps(2) is None


def test_an_error_ends_the_block():
    with pytest.raises(KeyError), timesteps(torch.tensor([3])):
        raise KeyError
    assert current_timesteps(1) is None


def test_heads_folded_into_the_batch_repeat_their_samples_timestep():
    """The order of diffusers' `Attention.head_to_batch_dim`: the heads of a sample lie together."""
    with timesteps(torch.tensor([3, 5])):
        assert current_timesteps(6).tolist() == [3, 3, 3, 5, 5, 5]


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_batch_that_does_not_fit_is_refused(rows):
    with (
        timesteps(torch.tensor([3, 5])),
        pytest.raises(ValueError, match=f"a tensor of {rows} rows reached a quantizer under timesteps.2 values.: give one t"),
    ):
        current_timesteps(rows)


def test_threads_do_not_share_it():
    seen = []
    with timesteps(torch.tensor([3])):
        thread = threading.Thread(target=lambda: seen.append(current_timesteps(1)))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_timestep_between_two_steps_is_refused_where_it_is_read():
    with timesteps(torch.tensor([3.0, 5.0])):
        assert current_timesteps(4).tolist() == [3, 3, 5, 5]
        assert current_timesteps(4).dtype == torch.int64
    for given in (0.25, torch.tensor([3.0, 0.25])):
        with timesteps(given), pytest.raises(ValueError, match=r"timestep 0\.25 lies between two steps of the process"):
            current_timesteps(2)


class Told(nn.Module):
    """What its quantizers would be told in a pass, and after a pass of another network within its own."""

    def forward(self, sample, timestep, inner=lambda: None):
        before, between = current_timesteps(len(sample)), inner()
        return [t if t is None else t.tolist() for t in (before, between, current_timesteps(len(sample)))]


@pytest.fixture
def told():
    module = Told()
    tell_own_timesteps(module)
    return module


def test_a_pass_tells_its_own_timesteps(told):
    x = torch.zeros(2, 1)
    for t in (7, 7.0, np.int64(7), np.float32(7), torch.tensor(7), torch.tensor(7.0), torch.tensor([7]), torch.tensor([7, 7])):
        assert told(x, t) == told(x, timestep=t) == told.forward(x, t) == [[7, 7], None, [7, 7]]
    with timesteps(torch.tensor([1, 2])):
        assert told(x, torch.tensor([3, 4]))[0] == [3, 4]
        assert told(x, None)[0] == told(x, torch.zeros(2, 5))[0] == [1, 2]  # another thing by that name: nothing is told
        assert current_timesteps(2).tolist() == [1, 2]
    assert current_timesteps(2) is None
    assert list(inspect.signature(told.forward).parameters) == ["sample", "timestep", "inner"]


def test_a_pass_within_a_pass_and_one_that_fails(told):
    x, other = torch.zeros(2, 1), copy.deepcopy(told)
    assert told(x, 1, lambda: torch.tensor(other(x, 2)[0])) == [[1, 1], [2, 2], [1, 1]]
    for error in (ValueError, KeyboardInterrupt):

        def fail(error=error):
            raise error

        with pytest.raises(error):
            told(x, 1, fail)
        assert current_timesteps(2) is None


def test_passes_in_two_threads_do_not_mix(told):
    meet, found = threading.Barrier(2), {}

    def run(t):
        found[t] = told(torch.zeros(1, 1), t, lambda: (meet.wait(), None)[1])

    threads = [threading.Thread(target=run, args=(t,)) for t in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {t: [[t], None, [t]] for t in (1, 2)}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_argument(name):
    scope = {"nn": nn, "current_timesteps": current_timesteps}
    exec(f"class Net(nn.Module):\n    def forward(self, x, {name}):\n        return current_timesteps(len(x))", scope)
    module = scope["Net"]()
    tell_own_timesteps(module)
    assert module(torch.zeros(1, 1), 5).tolist() == [5]


@pytest.fixture(scope="module")
def student():
    """A calibrated U-Net whose every grid depends on the timestep."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        settings = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, **blocks}
        unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **settings)
    grouped = functools.partial(GroupedActivation, groups=4)
    prepare(unet, QuantConfig(weight_bits=4, act_bits=4), Quantizers(activation=grouped, attention=grouped))
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    calibrate(unet, lambda: unet(x, torch.arange(16) * 62), MinMax())
    return unet.eval()


def saved(student):
    stream = io.BytesIO()
    torch.save(student, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda s: to_integer(s)[0]], ids=["deepcopy", "saved", "integer"])
@torch.no_grad()
def test_a_prepared_network_and_its_copies_need_no_block(student, copied):
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 990])
    network = copied(student)
    first = network.conv_in.bias.clone()
    with timesteps(t):
        expected = network(x, t).sample
    assert torch.equal(network(x, t).sample, expected)
    with cached_weights(network), timesteps(torch.tensor([500, 500])):
        assert torch.equal(network(x, timestep=t).sample, expected)
    rows = torch.cat([network(x, int(step)).sample[i : i + 1] for i, step in enumerate(t)])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(network(x, 10).sample, network(x, 990).sample, atol=1e-2)
    with torch.no_grad():
        network.conv_in.bias.add_(1)  # of the copy alone
    assert not torch.equal(network(x, t).sample, expected)
    assert torch.equal(student.conv_in.bias, first)
    with pytest.raises(ValueError, match=r"timestep 10\.5 lies between two steps"):
        network(x, 10.5)


def test_a_pipeline_of_diffusers_needs_no_block(student):
    pipeline = DDIMPipeline(student, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 8, 8, 1)
