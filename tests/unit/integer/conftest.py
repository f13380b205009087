import pytest
import torch

from qdm_lightning.quantization import compiled


@pytest.fixture(autouse=True)
def _one_thread_eager():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    compiled.set_mode("off")
    yield
    compiled.set_mode("auto")
    torch.set_num_threads(threads)
