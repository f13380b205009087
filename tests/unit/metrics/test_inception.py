import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from qdm_lightning.base.files import file_hash
from qdm_lightning.metrics import frechet, inception
from qdm_lightning.metrics.frechet import feature_batches, frechet_key
from qdm_lightning.metrics.inception import WEIGHTS, InceptionFeatures
from qdm_lightning.metrics.protocol import metric_keys


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the format of torch-fidelity's file: the pickled state dict of its network."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        state = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path="-").state_dict()
    path = tmp_path_factory.mktemp("weights") / WEIGHTS
    torch.save(state, path)
    return path


class Recorder(nn.Module):
    def forward(self, images):
        self.seen = images
        return images, images


def pictures(channels):
    return torch.randint(0, 256, (2, channels, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_is_torch_fidelitys_network(weights):
    network = InceptionFeatures(str(weights))
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    expected = theirs(pictures(3))
    (ours,) = feature_batches(network, pictures(3), 2, logits=True)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert expected[0].std(0).max() > 0
    assert network.weights_sha256 == file_hash(weights)


def test_only_the_published_weights_are_called_fid(weights, monkeypatch):
    sha256 = file_hash(weights)
    assert frechet_key(InceptionFeatures(str(weights))) == f"fd_inception_{sha256[:8]}"
    for module in (frechet, inception):
        monkeypatch.setattr(module, "PUBLISHED", sha256[:8])
    keys = metric_keys(InceptionFeatures(str(weights)))
    assert (keys["frechet"], keys["score"], keys["kernel"]) == ("fid", "inception_score", "kid")
    assert inception.URL_INCEPTION_V3.endswith("-6726825d.pth")


def test_gray_pictures_get_three_channels(weights):
    network = InceptionFeatures(str(weights))
    network.extractor = Recorder()
    network(pictures(1))
    assert torch.equal(network.extractor.seen, pictures(1).repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match="metrics=inception measures uint8 images"):
        network(pictures(3).float())


def test_the_copy_in_torchs_hub_folder_is_used(weights, monkeypatch):
    folder = weights.parent / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / WEIGHTS).symlink_to(weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder.parent))
    assert InceptionFeatures().weights_sha256 == file_hash(weights)


def test_absent_weights_are_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"metrics\.weights=.*absent\.pth: no such file; it must be torch-fidelity's"):
        InceptionFeatures(str(tmp_path / "absent.pth"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"http://127.0.0.1:9/{WEIGHTS}")  # nobody listens there
    with pytest.raises(FileNotFoundError, match=r"could not be fetched .* type metrics\.weights=<that file>") as caught:
        InceptionFeatures()
    assert "\n" not in str(caught.value)


def test_unfit_weights_are_refused(weights, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    contents = {"code.pth": {"fc.weight": Evil()}, "list.pth": [1, 2], "other.pth": {"fc.weight": torch.zeros(2)}}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "half.pth").write_bytes(weights.read_bytes()[:100_000])
    for name in ("half.pth", *contents):
        with pytest.raises(
            ValueError, match=rf"{name} (is damaged: .* type metrics\.weights=<|does not hold Inception)"
        ) as caught:
            InceptionFeatures(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
