import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from qdm_lightning.metrics.frechet import features, frechet_key
from qdm_lightning.metrics.resnet20 import ResNet20, ResNet20Features


def random_state():
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in ResNet20().state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator)
            fan_in = max(1, value[0].numel()) if value.ndim > 1 else 1
            state[name] = 0.5 + 0.1 * drawn.abs() if name.endswith("running_var") else drawn * (2 / fan_in) ** 0.5
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet20.npz"
    np.savez(path, **{name: value.numpy() for name, value in random_state().items()})
    return path


def pictures(count, channels=3, size=32):
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def by_hand(state, images):
    """ResNet-20 as the paper describes it, from the state dict alone."""

    def normed(x, name):
        at = [state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")]
        return (x - at[0]) / (at[1] + 1e-5).sqrt() * at[2] + at[3]

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((images.permute(0, 2, 3, 1) / 255 - mean) / std).permute(0, 3, 1, 2)
    x = normed(F.conv2d(x, state["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = normed(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
            y = normed(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                zeros = torch.zeros(len(x), x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2)
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (x + y).relu()
    x = x.flatten(2).mean(2)
    return x, x @ state["linear.weight"].T + state["linear.bias"]


def test_network_is_the_papers(weights):
    network = ResNet20Features(str(weights))
    assert sum(p.numel() for p in network.parameters()) == 269_722
    for ours, theirs in zip(network.features_and_logits(pictures(5)), by_hand(random_state(), pictures(5)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert features(network, pictures(3)).shape == (3, network.dim) == (3, 64)
    assert frechet_key(network) == "fd_resnet20"
    assert not network.training


def test_small_images_are_enlarged_bilinearly_and_gray_ones_colored(weights):
    network = ResNet20Features(str(weights))
    flat = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    torch.testing.assert_close(network(flat), network(torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)))
    assert network.resize == "32x32, bilinear, antialiased where it shrinks"
    small = pictures(2, size=16)
    enlarged = F.interpolate(small.double(), scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(network(small), by_hand(random_state(), enlarged.float())[0], rtol=1e-4, atol=1e-4)
    shrunk = F.interpolate(pictures(2, size=80).float() / 255, (32, 32), mode="bilinear", antialias=True) * 255
    expected = by_hand(random_state(), shrunk)[0]
    torch.testing.assert_close(network(pictures(2, size=80)), expected, rtol=1e-4, atol=1e-4)
    gray = pictures(2, channels=1)
    assert torch.equal(network(gray), network(gray.repeat(1, 3, 1, 1)))


def test_safetensors_and_npz_give_the_same_network(weights, tmp_path):
    save_file(random_state(), tmp_path / "w.safetensors")
    network = ResNet20Features(str(tmp_path / "w.safetensors"))
    assert torch.equal(network(pictures(2)), ResNet20Features(str(weights))(pictures(2)))
    assert network.weights_sha256 == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()


def test_absent_weights_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"metrics=resnet20 needs trained weights: type metrics\.weights=<"):
        ResNet20Features()
    with pytest.raises(FileNotFoundError, match=r"metrics\.weights=.*absent\.npz: no such file"):
        ResNet20Features(str(tmp_path / "absent.npz"))


def test_unfit_weights_are_refused(weights, tmp_path):
    state = random_state()
    np.savez(tmp_path / "short.npz", **{name: v.numpy() for name, v in state.items() if name != "conv1.weight"})
    np.savez(
        tmp_path / "shape.npz", **{**{name: v.numpy() for name, v in state.items()}, "linear.bias": np.zeros(100, np.float32)}
    )
    np.savez(tmp_path / "more.npz", **{name: v.numpy() for name, v in state.items()}, extra=np.zeros(1))
    for file, name in (("short", r"conv1\.weight"), ("shape", r"linear\.bias"), ("more", "extra")):
        with pytest.raises(ValueError, match=rf"{file}\.npz is no CIFAR-10 ResNet-20: .*{name}") as caught:
            ResNet20Features(str(tmp_path / f"{file}.npz"))
        assert "\n" not in str(caught.value)
    for name in ("half.npz", "half.safetensors"):
        (tmp_path / name).write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match="damaged"):
            ResNet20Features(str(tmp_path / name))
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"an \.npz or \.safetensors file is wanted"):
        ResNet20Features(str(tmp_path / "w.pt"))


def test_other_images_are_refused(weights):
    network = ResNet20Features(str(weights))
    for images in (pictures(2).float(), pictures(2, channels=2)):
        with pytest.raises(ValueError, match="metrics=resnet20 measures uint8 images"):
            network(images)
