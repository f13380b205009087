"""A student's folder: written by every run, read by one call, the same output; and what it refuses to read or run."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qdm_lightning import load_student
from qdm_lightning.base.files import atomic_folder
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.models.diffusers_io import load_unet, read_diffusion
from qdm_lightning.train import train
from qdm_lightning.training.student_files import CONFIG, WEIGHTS, read_student, save_student

TINY = """
    model.block_out_channels=[8,16] model.norm_num_groups=4 model.dropout=0.1 data.batch_size=8 teacher.max_steps=2
    trainer.max_steps=2 trainer.val_every=2 trainer.compile=off trainer.accelerator=cpu quant.calibration_batches=2
    sampler.steps=2 num_samples=4 logger=none
"""
VARIANTS = {
    "normalize": ["taq=normalize"],
    "scale everywhere, rules": ["taq=scale", "taq.scope=all_but_probs", "taq.groups=4", "quant.rules={down_blocks.0.*: 8}"],
    "ema, post-training": ["taq=ema", "taq.groups=4", "quant.mode=ptq", "quant=w3a3"],
    "no TaQ, float attention": ["taq=off", "quant.qkv_bits=32", "quant.probs_bits=32"],
}
OWN = """
from qdm_lightning.quantization import LSQActivation

class Own(LSQActivation):
    def __init__(self, *, bits, padded=False, inner=None, factor=1.0):
        super().__init__(bits=bits, padded=padded)
        self.inner, self.factor = inner, factor

    def quantize(self, x):
        return super().quantize(x) * self.factor

class Inner:
    def __init__(self, size):
        self.size = size
"""


@pytest.fixture
def run(tmp_path_factory, composed):
    """Run tiny overrides; all runs of this module share one teacher."""
    cache = tmp_path_factory.getbasetemp() / "student_files_cache"

    def run_it(*overrides):
        output = tmp_path_factory.mktemp("runs")
        cfg = composed(*TINY.split(), f"paths.cache={cache}", f"paths.output={output}", *overrides)
        return train(cfg, Progress("silent"))

    return run_it


@pytest.fixture
def folder(run, tmp_path_factory):
    """The student's folder of one run, to damage."""
    kept = tmp_path_factory.getbasetemp() / "student_files_kept"
    if not kept.is_dir():
        shutil.copytree(run().run_dir / "student", kept, ignore=shutil.ignore_patterns(".*.sha256"))
    copy = tmp_path_factory.mktemp("copy") / "student"
    shutil.copytree(kept, copy)
    return copy


def same_output(measured, loaded, channels=1, size=8):
    """Bit for bit, with and without gradients: with them, weights are quantized anew."""
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    for layout in (torch.contiguous_format, torch.channels_last):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected = measured(x.contiguous(memory_format=layout), t).sample
                given = loaded(x.contiguous(memory_format=layout), t).sample
            assert torch.equal(given, expected)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_a_run_saves_the_student_that_it_measured(run, overrides):
    result = run(*overrides)
    loaded = load_student(result.run_dir)
    assert not loaded.training
    same_output(result.student.unet, loaded)
    assert loaded.state_dict().keys() == result.student.unet.state_dict().keys()
    again, old = result.run_dir.parent / "again", first_format(result.run_dir / "student")
    save_student(loaded, evaluate.check(evaluate.compose(result.run_dir))[0], again)
    for file in ("model_index.json", "scheduler/scheduler_config.json", CONFIG):
        assert (again / file).read_bytes() == (result.run_dir / "student" / file).read_bytes()
    with pytest.warns(UserWarning, match="names and shapes alone were checked"):
        same_output(loaded, load_student(old))
    assert read_student(old).settings == read_student(again).settings


def test_the_file_says_what_the_student_is(folder):
    config = json.loads((folder / CONFIG).read_text())
    assert config["_class_name"] == "UNet2DModel"
    assert config["dropout"] == 0
    assert "_name_or_path" not in config
    grouped = {"_target_": "qdm_lightning.quantization.taq.GroupedActivation", "groups": 20, "num_train_timesteps": 1000}
    assert config["quantization_config"] == {
        "quant_method": "qdm_lightning",
        "format": 2,
        "quant": {
            "weight_bits": 4,
            "act_bits": 4,
            "qkv_bits": 4,
            "probs_bits": 8,
            "first_last_bits": 8,
            "channel_scales": "off",
            "rules": {},
            "weight_quantizer": {"_target_": "qdm_lightning.quantization.quantizer.LSQWeight"},
            "act_quantizer": grouped,
        },
        "taq": {"scope": "all", **grouped},
    }


def test_the_folder_is_a_whole_pipeline_and_no_teacher(folder):
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert files == {"model_index.json", "scheduler/scheduler_config.json", CONFIG, WEIGHTS}
    assert DDPMPipeline.load_config(folder)["unet"] == ["diffusers", "UNet2DModel"]
    assert DDPMScheduler.from_pretrained(folder / "scheduler").config.variance_type == "fixed_large"
    assert DiffusionConfig(**read_diffusion(folder / "unet")) == DiffusionConfig()
    with pytest.raises(ValueError, match="is of a quantized network: give one at full precision"):
        load_unet(folder)


def first_format(folder):
    """The folder as version 0.1 wrote it: quantizers by their roles, weights that say nothing of themselves."""
    files, old = read_student(folder), folder.parent / "old" / "student"
    old.mkdir(parents=True)
    quant, taq = dict(files.settings["quant"]), dict(files.settings["taq"])
    assert quant.pop("channel_scales") == "off"
    roles = {"weight": quant.pop("weight_quantizer"), "activation": quant.pop("act_quantizer")}
    scope = taq.pop("scope", "")
    roles["attention"] = taq or roles["activation"]
    assert scope != "all_but_probs" or roles["attention"] == roles["activation"]
    diffusion = files.settings["diffusion"]
    settings = {"format": 1, "unet": files.unet, "diffusion": diffusion, "quant": quant, "quantizers": roles}
    (old / "config.json").write_text(json.dumps(settings))
    save_file(load_file(folder / WEIGHTS), old / "model.safetensors", metadata={"format": "pt"})
    return old


def test_a_quantizer_of_the_users_own_must_be_trusted(run, tmp_path, monkeypatch):
    (tmp_path / "own_quantizers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    node = "{_target_: own_quantizers.Own, factor: 0.5, inner: {_target_: own_quantizers.Inner, size: 3}}"
    result = run(f"quant.act_quantizer={node}", "taq=off")
    with pytest.raises(
        ValueError, match=r"would run own_quantizers\.Own .*load_student\(\.\.\., trusted=\['own_quantizers\.Own'"
    ):
        load_student(result.run_dir)
    with pytest.raises(ValueError, match=r"would run own_quantizers\.Inner \(quant\.act_quantizer\.inner\._target_\)"):
        load_student(result.run_dir, trusted=["own_quantizers.Own"])
    loaded = load_student(result.run_dir, trusted=["own_quantizers.Own", "own_quantizers.Inner"])
    assert loaded.mid_block.resnets[0].conv1.input_quantizer.inner.size == 3
    same_output(result.student.unet, loaded)
    monkeypatch.setitem(sys.modules, "own_quantizers", None)
    with pytest.raises(ValueError, match=r"own_quantizers\.\w+ cannot be imported"):
        load_student(result.run_dir, trusted=["own_quantizers.Own", "own_quantizers.Inner"])


def edit(folder, **changes):
    """Change the quantization, or with `unet=` the config.json around it."""
    file = folder / CONFIG
    config = {**json.loads(file.read_text()), **changes.pop("unet", {})}
    if changes:
        config["quantization_config"] = {**config["quantization_config"], **changes}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "qdm_lightning.models.diffusers_io.load_unet",
        "qdm_lightning.quantization.quantizer.LSQActivation",
        ["os.system"],
    ],
)
def test_only_quantizers_run(folder, target):
    quant = read_student(folder).settings["quant"]
    edit(folder, quant={**quant, "weight_quantizer": {"_target_": target}})
    with pytest.raises(ValueError, match=r"would run .* \(quant\.weight_quantizer\._target_\), which is not what"):
        load_student(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, r"format 3, this version reads up to 2"),
        ({"format": None}, r"format None, this version reads up to 2"),
        ({"quant": {}}, r"quant\.weight_quantizer\._target_ is missing"),
        ({"quant": None}, "quant is missing"),
        ({"taq": ["scope"]}, "taq is missing"),
        ({"quant_method": "gguf"}, "has no quantization_config of qdm_lightning"),
        ({"unet": {"quantization_config": None}}, "has no quantization_config of qdm_lightning"),
        ({"unet": {"quantization_config": 4}}, "has no quantization_config of qdm_lightning"),
        ({"weight_bits": 9}, r"does not describe a student: quant\.weight_bits=9 is not allowed"),
        ({"weight_bits": "4"}, "does not describe a student"),
        ({"rules": [4]}, "does not describe a student"),
        # What is whole, and not what the weights are of:
        ({"weight_bits": 3}, r"is of another network: quant\.weight_bits=4, not 3"),
        ({"rules": {"conv_in": 32}}, r"is of another network: quant\.rules=\{\}, not \{'conv_in': 32\}"),
        ({"taq": {}}, "is of another network: taq=scale, not off"),
        ({"unet": {"freq_shift": 1}}, r"is of another network: unet\.freq_shift=0, not 1"),
    ],
)
def test_a_foreign_or_damaged_description_is_one_line(folder, changes, message):
    inner = {name: changes[name] for name in ("weight_bits", "rules") if name in changes}
    edit(folder, **({"quant": read_student(folder).settings["quant"] | inner} if inner else changes))
    with pytest.raises(ValueError, match=message) as caught:
        load_student(folder)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files_are_named(folder, tmp_path):
    weights = folder / WEIGHTS
    with safe_open(weights, "pt") as file:
        said = file.metadata()
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "conv_in.weight_quantizer.log_scale"}, weights, said)
    with pytest.raises(ValueError, match=r"do not make a student: .*conv_in\.weight_quantizer\.log_scale"):
        load_student(folder)
    weights.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_student(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_student(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no student: give the folder of a run"):
        load_student(tmp_path)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "a"
    for text in ("one", "two"):
        with atomic_folder(place) as beside:
            (beside / "file").write_text(text)

    def fail():
        with atomic_folder(place) as beside:
            (beside / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    left = [file.relative_to(tmp_path).as_posix() for file in sorted(tmp_path.rglob("*"))]
    assert left == ["a", "a/.file.sha256", "a/file"]
    assert (place / "file").read_text() == "two"


def test_the_package_alone_imports_no_torch():
    code = "import qdm_lightning, sys; assert 'torch' not in sys.modules; assert 'load_student' in qdm_lightning.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)
