"""diffusers' own calls read a student and write it back: the same outputs, the same bytes; what they refuse."""

import copy
import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from diffusers.quantizers import auto
from safetensors.torch import load_file, save_file

import qdm_lightning
from qdm_lightning.diffusion.sampling import sample
from qdm_lightning.diffusion.spec import DiffusionConfig, SamplerConfig
from qdm_lightning.integer import to_integer
from qdm_lightning.integer.layers import IntegerLayer
from qdm_lightning.models.denoiser import Denoiser
from qdm_lightning.quantization import compiled
from qdm_lightning.quantization.layers import QuantizedLayer
from qdm_lightning.training import diffusers_quantizer
from qdm_lightning.training.student_files import CONFIG, WEIGHTS, load_student

PROCESS = """
    import sys
    import qdm_lightning
    assert not {"torch", "diffusers"} & set(sys.modules)

    import torch
    from diffusers import DDPMPipeline, UNet2DModel
    folder, out = sys.argv[1:]
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert "lightning" not in sys.modules

    from qdm_lightning.quantization import compiled
    compiled.set_mode("off")
    torch.set_num_threads(1)
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 500, 999])
    with torch.no_grad():
        eps = unet(x, t).sample
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    images = pipeline(batch_size=4, generator=generators, num_inference_steps=10, output_type="np").images
    torch.save({"eps": eps, "images": torch.from_numpy(images)}, out)
"""


@pytest.fixture
def folder(tiny_run, tmp_path):
    """A student's folder without checksums, to damage."""
    compiled.set_mode("off")
    shutil.copytree(tiny_run / "student", tmp_path / "student", ignore=shutil.ignore_patterns(".*.sha256"))
    return tmp_path / "student"


def estimate(network, rows=3):
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 500, 999])
    with torch.no_grad():
        return network(x[:rows], t[:rows]).sample


def test_a_fresh_process_reads_it_and_samples(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    subprocess.run([sys.executable, "-c", textwrap.dedent(PROCESS), folder, tmp_path / "out"], check=True)
    theirs, student = torch.load(tmp_path / "out"), load_student(folder)
    assert torch.equal(theirs["eps"], estimate(student))
    sampler = SamplerConfig(kind="ddpm", steps=10, batch_size=4)
    ours = sample(Denoiser(student), sampler, DiffusionConfig(), shape=(1, 8, 8), seeds=range(4)).permute(0, 2, 3, 1)
    assert (255 * (ours / 2 + 0.5 - theirs["images"]).abs()).max() < 1


def test_what_is_read_is_written_back_to_the_byte(folder, tmp_path):
    read = UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert not read.training
    assert read.hf_quantizer.quantization_config.to_dict() == json.loads((folder / CONFIG).read_text())["quantization_config"]
    pipeline = DDIMPipeline.from_pretrained(folder)
    for name, student in {"unet": read, "ours": load_student(folder), "copy": copy.deepcopy(read)}.items():
        assert torch.equal(estimate(student), estimate(read))
        student.save_pretrained(tmp_path / name / "unet")
    pipeline.save_pretrained(tmp_path / "pipeline")
    for place in ("unet", "ours", "copy", "pipeline"):
        for file in (CONFIG, WEIGHTS):
            assert (tmp_path / place / file).read_bytes() == (folder / file).read_bytes(), (place, file)
    assert torch.equal(estimate(load_student(tmp_path / "pipeline")), estimate(read))
    read.save_pretrained(folder / "unet")  # over itself, with its checksums
    assert torch.equal(estimate(load_student(folder)), estimate(read))
    read.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(estimate(UNet2DModel.from_pretrained(tmp_path / "shards")), estimate(read))


def test_a_saved_integer_student_runs_on_integers_wherever_diffusers_reads_it(folder, tmp_path):
    integer = load_student(folder, execution="integer")
    expected = estimate(to_integer(load_student(folder))[0])
    assert not torch.equal(expected, estimate(load_student(folder)))
    assert torch.equal(estimate(integer), expected)
    pipeline = DDPMPipeline.from_pretrained(folder, unet=integer)
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    before, after = (json.loads((place / CONFIG).read_text()) for place in (folder, tmp_path / "pipeline"))
    assert after["quantization_config"].pop("execution") == "integer"
    assert after == before
    read = UNet2DModel.from_pretrained(tmp_path / "pipeline", subfolder="unet", device_map="cpu")
    for found in (read, copy.deepcopy(read), DDPMPipeline.from_pretrained(tmp_path / "pipeline").unet):
        assert any(isinstance(module, IntegerLayer) for module in found.modules())
        assert not any(isinstance(module, QuantizedLayer) for module in found.modules())
        assert torch.equal(estimate(found), expected)
    assert torch.equal(estimate(load_student(tmp_path / "pipeline")), expected)
    assert torch.equal(estimate(load_student(tmp_path / "pipeline", execution="simulated")), estimate(load_student(folder)))
    read.save_pretrained(tmp_path / "again")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / file.rpartition("/")[2]).read_bytes() == (tmp_path / "pipeline" / file).read_bytes()
    for device, move in (("meta", lambda: read.to("meta")), ("meta", lambda: pipeline.to("meta"))):
        with pytest.raises(ValueError, match=f"{device} is not allowed: a network on integer codes runs on the CPU"):
            move()
    with pytest.raises(ValueError, match=r"device_map=meta is not allowed: a student on integer codes runs on the CPU"):
        UNet2DModel.from_pretrained(tmp_path / "pipeline", subfolder="unet", device_map={"": "meta"})


def test_a_copy_on_integers_is_not_written(folder, tmp_path):
    read = UNet2DModel.from_pretrained(folder, subfolder="unet")
    integer = to_integer(read)[0]
    assert torch.equal(estimate(integer), estimate(load_student(folder, execution="integer")))
    with pytest.raises(ValueError, match="to_integer's result has no weights to write: save the student that it was made of"):
        integer.save_pretrained(tmp_path / "integer")
    assert not (tmp_path / "integer").exists()
    with pytest.raises(ValueError, match="safe_serialization=False is not allowed"):
        read.save_pretrained(tmp_path / "pickle", safe_serialization=False)


def test_without_this_package_diffusers_says_so(folder, monkeypatch):
    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(table, "qdm_lightning")
    for read in (lambda: UNet2DModel.from_pretrained(folder / "unet"), lambda: DDPMPipeline.from_pretrained(folder)):
        with pytest.raises(ValueError, match="Unknown quantization type, got qdm_lightning - supported types are"):
            read()


def edit(folder, **changes):
    file = folder / CONFIG
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def quant(folder, **changes):
    return json.loads((folder / CONFIG).read_text())["quantization_config"]["quant"] | changes


def test_what_it_refuses(folder, monkeypatch):
    def refused(message, kind=ValueError, **options):
        with pytest.raises(kind, match=message) as caught:
            UNet2DModel.from_pretrained(folder, subfolder="unet", **options)
        assert "\n" not in str(caught.value)

    refused("torch_dtype=torch.float16 is not allowed: a student is read in float32", torch_dtype=torch.float16)
    before = (folder / CONFIG).read_text()
    for changes, message in (
        ({"quant": quant(folder, weight_quantizer={"_target_": "os.system"})}, r"would run os\.system"),
        ({"quant": quant(folder, weight_bits=3)}, r"is of another network: quant\.weight_bits=4, not 3"),
        ({"taq": {}}, "is of another network: taq=normalize, not off"),
        ({"format": 3}, "format 3, this version reads up to 2"),
        ({"quant": 4}, "quant is missing"),
        ({"execution": "fast"}, "execution=fast, which is not allowed: choose one of simulated, integer"),
    ):
        edit(folder, **changes)
        refused(message)
        (folder / CONFIG).write_text(before)
    state = load_file(folder / WEIGHTS)
    save_file(state, folder / WEIGHTS)
    refused("does not say of which bits, TaQ and schedule")
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(r"model\.bin is damaged")
    monkeypatch.setattr(diffusers_quantizer, "find_spec", lambda name: None)
    refused("by accelerate alone: pip install accelerate", ImportError)


def test_a_network_at_full_precision_is_not_quantized_by_loading(tiny_run):
    config = diffusers_quantizer.StudentConfig(format=2, quant={}, taq={})
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        UNet2DModel.from_pretrained(tiny_run / "teacher", subfolder="unet", quantization_config=config)


def test_registered_once_in_both_tables():
    assert auto.AUTO_QUANTIZER_MAPPING["qdm_lightning"] is diffusers_quantizer.StudentQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qdm_lightning"] is diffusers_quantizer.StudentConfig
    assert qdm_lightning.load_student is load_student
