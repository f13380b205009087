"""A run's student as a file: what it says of itself, pictures and scores from it, and files that are refused."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.files import file_hash
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.evaluation.sample import read_picture
from qdm_lightning.export import export
from qdm_lightning.exporting import export as exporting
from qdm_lightning.exporting.operators import Translator
from qdm_lightning.exporting.verify import verify
from qdm_lightning.runtimes.files import FIELD, read_exported
from qdm_lightning.sample import sample

SEEDS = range(8)


def written(run, *overrides):
    return export(run, overrides, Progress("silent"))


@pytest.fixture(scope="module")
def files(tiny_run, tmp_path_factory):
    """The tiny run's student by format. It is traced and checked once, which takes longer than all the rest."""
    folder = tmp_path_factory.mktemp("exported")
    outs = {"onnx": folder / "student.onnx", "openvino": folder / "student.xml"}
    traced, checked = [], {}

    def trace(*arguments):
        traced.append(Translator(*arguments)) if not traced else None
        return traced[0]

    def check(translator, runtime, total):
        if runtime not in checked:
            checked[runtime] = verify(translator, runtime, total)
        return checked[runtime]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "Translator", trace)
        patch.setattr(exporting, "verify", check)
        return {kind: written(tiny_run, f"format={kind}", f"out={out}") for kind, out in outs.items()}


@pytest.fixture
def onnx_file(files, tmp_path):
    """Writes a changed copy of the ONNX file."""

    def write(change):
        model = onnx.load(files["onnx"].file)
        change(model)
        path = tmp_path / "changed.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def pictures(folder):
    return np.stack([read_picture(folder / f"{seed}.png")[0].numpy() for seed in SEEDS])


@pytest.fixture(scope="module")
def own(tiny_run, tmp_path_factory):
    """Pictures of the run's own student."""
    return pictures(sample(tiny_run, ["seeds=0-7", f"out={tmp_path_factory.mktemp('own')}"], Progress("silent")).folder)


def test_the_file_says_what_it_is(files, tiny_run):
    found = read_exported(files["onnx"].file)
    said = found.metadata
    assert (said["format"], said["network"], said["shape"], said["run"]) == (1, "student", [1, 8, 8], tiny_run.name)
    assert (said["quant"]["weight_bits"], said["quant"]["probs_bits"]) == (4, 8)
    assert said["taq"]["_target_"].endswith("NormalizedActivation")
    assert said["origin"]["sha256"] == file_hash(tiny_run / "checkpoints" / "best.ckpt")
    assert (found.sampler.steps, found.sampler.batch_size, found.diffusion.num_train_timesteps) == (4, 16, 1000)
    assert [one["floating"] for one in said["verified"]] == [0, 0]
    assert read_exported(files["openvino"].file).metadata["origin"] == said["origin"]
    floats = sum(
        array.size for array in map(onnx.numpy_helper.to_array, found.model.graph.initializer) if array.dtype == np.float32
    )
    codes = [
        t
        for t in found.model.graph.initializer
        if t.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.INT8) and len(t.dims) > 1
    ]
    assert sum(len(t.raw_data) or len(t.int32_data) for t in codes) < 0.2 * 4 * sum(np.prod(t.dims) for t in codes)
    assert floats < 0.2 * sum(np.prod(t.dims) for t in codes)  # no weight lies there in float too


@pytest.mark.parametrize(("kind", "runtime"), [("onnx", "onnxruntime"), ("onnx", "openvino"), ("openvino", "openvino")])
def test_pictures_are_those_of_the_run(files, own, kind, runtime, tmp_path):
    """But where a code flips: of 8 images nearly all pixels are the same, and each image is a function of its seed alone."""
    overrides = [f"file={files[kind].file}", f"runtime={runtime}"]
    result = sample(None, [*overrides, "seeds=0-7", f"out={tmp_path / 'all'}"], Progress("silent"))
    found = pictures(result.folder)
    assert len({image.tobytes() for image in found}) == len(SEEDS)
    steps = np.abs(found.astype(int) - own)
    assert np.median(steps) == 0
    assert (steps <= 1).mean() > 0.9
    one = sample(None, [*overrides, "seeds=[5]", f"out={tmp_path / 'one'}"], Progress("silent")).folder
    assert np.array_equal(read_picture(one / "5.png")[0].numpy(), found[5])
    record = read_picture(one / "5.png")[1]
    digest = read_exported(files[kind].file).sha256
    assert record["environment"]["runtime"].startswith(f"{runtime} 20" if runtime == "openvino" else f"{runtime} 1.")
    assert record["checkpoint_sha256"] == record["origin"]["sha256"] == digest


def test_sampling_imports_no_lightning(files, tmp_path):
    code = f"""
import sys
from qdm_lightning.sample import main
sys.argv = ["sample", "file={files["onnx"].file}", "seeds=0-1", "out={tmp_path / "out"}"]
main()
assert not {{"lightning", "pytorch_lightning", "torchmetrics", "wandb"}} & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "grid.png").is_file()


def test_scores_stand_beside_the_runs_own(files, run_copy):
    before = (run_copy / "evaluation.json").read_bytes() if (run_copy / "evaluation.json").is_file() else None
    own = evaluate(run_copy, ["scores=fd"], Progress("silent")).record
    result = evaluate(run_copy, ["scores=fd", f"file={files['onnx'].file}"], Progress("silent"))
    assert result.record["origin"]["weights"] == "onnxruntime"
    assert result.record["origin"]["exported_from"]["sha256"] == own["origin"]["sha256"]
    assert result.record["drawn_on"][0]["runtime"].startswith("onnxruntime")
    assert result.record["scores"]["fd_digits"] == pytest.approx(own["scores"]["fd_digits"], rel=0.02)
    assert [other["identity"] for other in result.others] == [own["identity"]]
    assert json.loads((run_copy / "evaluation.json").read_text())["identity"] == own["identity"]
    assert before is None


def test_scores_of_another_run_are_refused(files, run_copy):
    for checkpoint in (*run_copy.glob("checkpoints/*.ckpt"), *run_copy.glob("student/*.safetensors")):
        checkpoint.write_bytes(checkpoint.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"was exported from weights that run=.* has not"):
        evaluate(run_copy, [f"file={files['onnx'].file}"], Progress("silent"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=tflite"], "format=tflite is not allowed: choose one of onnx, openvino"),
        (["out=here.xml"], r"out=here\.xml is not allowed: with format=onnx it must end in \.onnx"),
        (["out=FOLDER"], "cannot be written: give the name of a file in a folder, such as out=student.onnx"),
        (["out=FOLDER/mine.onnx"], r"mine\.onnx cannot be read as an exported student"),
        (["checkpoint=nowhere.ckpt"], r"checkpoint=nowhere\.ckpt: no such file"),
    ],
)
def test_bad_exports(overrides, message, tiny_run, tmp_path):
    (tmp_path / "mine.onnx").write_bytes(b"something of mine")
    with pytest.raises((UserError, ValueError, FileNotFoundError), match=message):
        written(tiny_run, *(word.replace("FOLDER", str(tmp_path)) for word in overrides))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.onnx"]
    assert (tmp_path / "mine.onnx").read_bytes() == b"something of mine"


def test_a_run_without_a_student(run_copy):
    (run_copy / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(UserError, match=r"best\.ckpt is not there"):
        written(run_copy)
    assert not (run_copy / "export").exists()


def test_what_deviates_is_not_written(run_copy, monkeypatch):
    def deviating(*_):
        raise RuntimeError("conv_in deviates")

    monkeypatch.setattr(exporting, "Translator", lambda *_: None)
    monkeypatch.setattr(exporting, "verify", deviating)
    with pytest.raises(RuntimeError, match="conv_in deviates"):
        written(run_copy)
    assert not (run_copy / "export").exists()


def test_a_missing_package_is_named(tiny_run, monkeypatch):
    monkeypatch.setattr("qdm_lightning.runtimes.spec.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx is not installed: pip install 'qdm-lightning\[onnx\]'"):
        written(tiny_run)


def external(model):
    tensor = next(node for node in model.graph.node if node.op_type == "Conv").attribute.add()
    tensor.name, tensor.type = "hidden", onnx.AttributeProto.TENSOR
    tensor.t.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.t.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def says(model, **fields):
    entry = next(entry for entry in model.metadata_props if entry.key == FIELD)
    entry.value = json.dumps({**json.loads(entry.value), **fields})


def test_the_graph_gives_the_noise_whatever_the_network_estimates(files, onnx_file, tmp_path):
    """So nobody turns it into the noise once more."""
    path = onnx_file(lambda model: says(model, diffusion=DiffusionConfig(prediction_type="v_prediction").settings()))
    found = [
        sample(None, [f"file={file}", "seeds=0-7", f"out={tmp_path / str(i)}"], Progress("silent")).folder
        for i, file in enumerate((files["onnx"].file, path))
    ]
    assert np.array_equal(*map(pictures, found))


def unreadable(model):
    model.graph.node[3].op_type = "NoSuchOperator"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external, "lies in another file, which is never read"),
        (lambda model: says(model, format=2), "has format 2, this version reads 1: export the run again"),
        (lambda model: says(model, sampler={"kind": "magic"}), "its metadata is damaged: sampler.kind=magic is not allowed"),
        (lambda model: model.ClearField("metadata_props"), "python -m qdm_lightning.export did not write it"),
        (unreadable, "onnxruntime cannot read"),
    ],
)
def test_hostile_files(change, message, onnx_file, tmp_path):
    with pytest.raises((UserError, ValueError), match=message):
        sample(None, [f"file={onnx_file(change)}", "seeds=0-1"], Progress("silent"))
    assert [path.name for path in tmp_path.iterdir()] == ["changed.onnx"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["file=GARBAGE.onnx"], "cannot be read as an exported student"),
        (["file=GARBAGE.xml"], "garbage.bin is not beside it"),
        (["file=nowhere.onnx"], r"file=nowhere\.onnx: no such file"),
        (["file=student.ckpt"], r"is no exported file: give one that ends in \.onnx or \.xml"),
        (["file=OPENVINO", "runtime=onnxruntime"], "runtime=onnxruntime does not read"),
        (["file=ONNX", "weights=raw"], "weights=raw chooses within a run"),
        (["file=ONNX", "run=somewhere"], "needs no run, leave it out"),
        (["file=ONNX", "sampler.steps=1001"], "it must be at most diffusion.num_train_timesteps=1000"),
        (["runtime=openvino"], "run is missing"),
    ],
)
def test_bad_files_are_one_line(words, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for suffix in ("onnx", "xml"):
        (tmp_path / f"garbage.{suffix}").write_bytes(b"\x08garbage")
    known = {"GARBAGE": str(tmp_path / "garbage"), "OPENVINO": str(files["openvino"].file), "ONNX": str(files["onnx"].file)}
    for name, value in known.items():
        words = [word.replace(name, value) for word in words]
    monkeypatch.setattr(sys, "argv", ["sample", *words])
    with pytest.raises(SystemExit, match="2"):
        sample.main()
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.replace("\\", "") in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["garbage.onnx", "garbage.xml"]


def test_weights_of_another_graph(files, tmp_path):
    """What a crash between the two files would leave."""
    for file in (files["openvino"].file, files["openvino"].file.with_suffix(".bin")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "student.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"student\.bin beside it is not the one that it was written with"):
        read_exported(tmp_path / "student.xml")


def test_evaluate_needs_the_run(files, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", f"file={files['onnx'].file}"])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main()
    assert "type run=<folder of the run that" in capsys.readouterr().err
