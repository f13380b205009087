"""A student's folder: written by every run, read by one call, the same output; and what it refuses to read or run."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdm_lightning import load_student
from qdm_lightning.base.files import atomic_folder
from qdm_lightning.display.progress import Progress
from qdm_lightning.quantization import timesteps
from qdm_lightning.train import train

TINY = """
    model.block_out_channels=[8,16] model.norm_num_groups=4 model.dropout=0.1 data.batch_size=8 teacher.max_steps=2
    trainer.max_steps=2 trainer.val_every=2 trainer.compile=off trainer.accelerator=cpu quant.calibration_batches=2
    sampler.steps=2 num_samples=4 logger=none
"""
VARIANTS = {
    "normalize": [],
    "scale everywhere, rules": ["taq=scale", "taq.scope=all", "taq.groups=4", "quant.rules={down_blocks.0.*: 8}"],
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
            with torch.set_grad_enabled(grad), timesteps(t):
                expected = measured.unet(x.contiguous(memory_format=layout), t).sample
                given = loaded(x.contiguous(memory_format=layout), t).sample
            assert torch.equal(given, expected)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_a_run_saves_the_student_that_it_measured(run, overrides):
    result = run(*overrides)
    loaded = load_student(result.run_dir)
    assert not loaded.training
    same_output(result.student, loaded)
    assert loaded.state_dict().keys() == result.student.unet.state_dict().keys()


def test_the_file_says_what_the_student_is(folder):
    settings = json.loads((folder / "config.json").read_text())
    assert settings["unet"]["_class_name"] == "UNet2DModel"
    assert settings["unet"]["dropout"] == 0
    assert settings["diffusion"]["num_train_timesteps"] == 1000
    assert settings["quant"] == {
        "weight_bits": 4,
        "act_bits": 4,
        "qkv_bits": None,
        "probs_bits": 8,
        "first_last_bits": 8,
        "rules": {},
    }
    assert settings["quantizers"]["attention"]["_target_"].endswith("NormalizedActivation")
    assert settings["quantizers"]["activation"]["_target_"].endswith("LSQActivation")


def test_a_quantizer_of_the_users_own_must_be_trusted(run, tmp_path, monkeypatch):
    (tmp_path / "own_quantizers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    node = "{_target_: own_quantizers.Own, factor: 0.5, inner: {_target_: own_quantizers.Inner, size: 3}}"
    result = run(f"quant.act_quantizer={node}")
    with pytest.raises(
        ValueError, match=r"would run own_quantizers\.Own .*load_student\(\.\.\., trusted=\['own_quantizers\.Own'"
    ):
        load_student(result.run_dir)
    with pytest.raises(ValueError, match=r"would run own_quantizers\.Inner \(quantizers\.activation\.inner\._target_\)"):
        load_student(result.run_dir, trusted=["own_quantizers.Own"])
    loaded = load_student(result.run_dir, trusted=["own_quantizers.Own", "own_quantizers.Inner"])
    assert loaded.mid_block.resnets[0].conv1.input_quantizer.inner.size == 3
    same_output(result.student, loaded)
    monkeypatch.setitem(sys.modules, "own_quantizers", None)
    with pytest.raises(ValueError, match=r"own_quantizers\.\w+ cannot be imported"):
        load_student(result.run_dir, trusted=["own_quantizers.Own", "own_quantizers.Inner"])


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "which is not part of qdm_lightning"),
        ("qdm_lightning.models.diffusers_io.load_unet", "is no WeightQuantizer"),
        ("qdm_lightning.quantization.quantizer.LSQActivation", "is no WeightQuantizer"),
        (["os.system"], "which is not part of qdm_lightning"),
    ],
)
def test_only_quantizers_run(folder, target, message):
    quantizers = json.loads((folder / "config.json").read_text())["quantizers"]
    edit(folder, quantizers={**quantizers, "weight": {"_target_": target}})
    with pytest.raises(ValueError, match=message):
        load_student(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"format 2, this version reads 1"),
        ({"quantizers": {}}, r"quantizers\.weight\._target_ is missing"),
        ({"unet": None}, "unet is missing"),
        ({"quant": {"weight_bits": 9}}, r"do not make a student: quant\.weight_bits=9 is not allowed"),
        ({"quant": {"bits": 4}}, "do not make a student"),
        ({"quant": {"rules": {"conv_in": 32}}}, "do not make a student"),
    ],
)
def test_a_foreign_or_damaged_description_is_one_line(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_student(folder)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files_are_named(folder, tmp_path):
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "conv_in.weight_quantizer.log_scale"}, weights)
    with pytest.raises(ValueError, match=r"do not make a student: .*conv_in\.weight_quantizer\.log_scale"):
        load_student(folder)
    weights.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_student(folder)
    (folder / "config.json").write_text("{")
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
