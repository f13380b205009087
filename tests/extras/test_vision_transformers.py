"""`metrics=dinov2` and `metrics=clip` over tiny random networks of `transformers`, saved into local folders."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.metrics.few_images import cmmd
from qdm_lightning.metrics.frechet import features, frechet_key
from qdm_lightning.metrics.vision_transformers import CLIPFeatures, DINOv2Features

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A network of each kind in a folder of its own, and a whole CLIP model."""
    root, small = tmp_path_factory.mktemp("networks"), {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    torch.manual_seed(0)
    dino = transformers.Dinov2Config(**small, image_size=28, patch_size=14, mlp_ratio=2)
    transformers.Dinov2Model(dino).save_pretrained(root / "dino")
    vision = {**small, "intermediate_size": 32, "image_size": 32, "patch_size": 8, "projection_dim": 6}
    clip = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
    clip.save_pretrained(root / "clip")
    text = {**small, "intermediate_size": 32, "vocab_size": 20}
    whole = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    transformers.CLIPModel(whole).save_pretrained(root / "whole")
    return root


def pictures(count=6, edge=40):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, edge, edge), dtype=np.uint8))


def test_dinov2_is_the_class_token_of_transformers(folders):
    network = DINOv2Features(weights=str(folders / "dino"))
    assert (network.dim, frechet_key(network), network.resize.split(",")[0]) == (16, "fd_dinov2", "224x224")
    theirs = transformers.Dinov2Model.from_pretrained(folders / "dino").eval()
    x = pictures(2, 224).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = theirs((x - mean[:, None, None]) / std[:, None, None]).last_hidden_state[:, 0]
    assert torch.allclose(features(network, pictures(2, 224)), expected, atol=1e-5)


def test_clip_is_the_image_embedding_of_transformers(folders):
    network = CLIPFeatures(weights=str(folders / "clip"))
    assert (network.dim, frechet_key(network), network.resize.split(",")[0]) == (6, "fd_clip", "32x32")
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(folders / "clip").eval()
    processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
    images = pictures(3, 32)
    pixels = processor([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**pixels).image_embeds
    assert torch.allclose(features(network, images), expected, atol=1e-5)
    assert CLIPFeatures(weights=str(folders / "whole")).dim == 6


def test_sizes_are_resampled_and_gray_is_three_channels(folders):
    network = CLIPFeatures(weights=str(folders / "clip"))
    small = pictures(2, 9)
    up = F.interpolate(small.float() / 255, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = network.network(pixel_values=(up - network_mean(0)) / network_mean(1)).image_embeds
    assert torch.allclose(features(network, small), expected, atol=1e-5)
    gray = pictures(2, 32)[:, :1]
    assert torch.equal(features(network, gray), features(network, gray.expand(-1, 3, -1, -1)))


def network_mean(which):
    from qdm_lightning.metrics.vision_transformers import CLIP

    return torch.tensor(CLIP[which])[:, None, None]


def test_cmmd_forgets_lengths(folders):
    x = features(CLIPFeatures(weights=str(folders / "clip")), pictures())
    assert cmmd(x, x[[1, 2, 3, 4, 5, 0]] * 3) == pytest.approx(0, abs=1e-9)


def test_bad_folders_are_one_line(folders, tmp_path):
    with pytest.raises(ValueError, match=r"holds clip_vision_model, not dinov2"):
        DINOv2Features(weights=str(folders / "clip"))
    with pytest.raises(ValueError, match=r"holds no config.json, not clip"):
        CLIPFeatures(weights=str(tmp_path))
    (tmp_path / "config.json").write_text((folders / "dino" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"holds no .safetensors"):
        DINOv2Features(weights=str(tmp_path))
    state = load_file(folders / "dino" / "model.safetensors")
    state.pop(next(iter(state)))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for "):
        DINOv2Features(weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"cannot be read: ") as error:
        DINOv2Features(weights=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_run_is_scored_by_them(tiny_run, folders, tmp_path):
    for name, folder in (("dinov2", "dino"), ("clip", "clip")):
        typed = [f"metrics={name}", f"metrics.weights={folders / folder}", "num_samples=40", f"out={tmp_path / name}"]
        scores = evaluate(tiny_run, typed, Progress("silent")).record["scores"]
        assert f"fd_{name}" in scores
        assert ("cmmd" in scores) == (name == "clip")
        record = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert record["protocol"]["network"] == name
        assert record["metric"]["weights_file_sha256"]
