import threading

import pytest
import torch

from qdm_lightning.quantization.timestep import current_timesteps, timesteps


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
