"""Hostile files, each made in a folder `{F}`; `{O}` is a folder outside it that nothing may be written into."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

STORED_RUN = Path(__file__).parents[1] / "assets" / "stored_run_0_1"
FEW = "num_samples=16 sampler.steps=2 compile=off scores=fd"
ESCAPES = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202e"
COMMANDS = {
    "train": "run={F}/run",
    "evaluate": f"run={{F}}/run {FEW}",
    "sample": "run={F}/run seeds=0-3 sampler.steps=2 compile=off",
    "diagnose": "run={F}/run num_images=4 timesteps=2 points=2 sampler.steps=2 compile=off",
}


@dataclass(frozen=True)
class Attack:
    """Files of a stranger, and what the user types.

    Attributes:
        make: writes them into a folder.
        command, words: what is typed, `python -m qdm_lightning.<command> <words>`.
        harmless: the command may also do its work.
        call: called with the folder, in place of a command.
    """

    make: Callable[[Path], Any]
    command: str = ""
    words: str = ""
    harmless: bool = False
    call: Callable[[Path], Any] | None = None


CANARY = "open('canary','w')"
TARGETS: dict[str, dict[str, Any]] = {
    "os.system": {"command": "touch canary"},
    "os.popen": {"cmd": "touch canary"},
    "os.mkdir": {"path": "canary"},
    "posix.system": {"command": "touch canary"},
    "subprocess.run": {"args": ["touch", "canary"]},
    "subprocess.Popen": {"args": ["touch", "canary"]},
    "subprocess.check_output": {"args": ["touch", "canary"]},
    "builtins.exec": {"_args_": [CANARY]},
    "builtins.eval": {"_args_": [CANARY]},
    "builtins.open": {"file": "canary", "mode": "w"},
    "builtins.__import__": {"name": "hostile_module"},
    "importlib.import_module": {"name": "hostile_module"},
    "runpy.run_path": {"path_name": "hostile_module.py"},
    "runpy.run_module": {"mod_name": "hostile_module"},
    "hostile_module.Thing": {},
    "pathlib.Path.touch": {"_args_": ["canary"]},
    "shutil.rmtree": {"path": "{O}"},
    "shutil.copytree": {"src": ".", "dst": "canary"},
    "pickle.loads": {"_args_": ["x"]},
    "torch.load": {"f": "x.pt", "weights_only": False},
    "torch.hub.load": {"repo_or_dir": ".", "model": "x", "source": "local"},
    "torch.save": {"obj": 1, "f": "canary"},
    "numpy.load": {"file": "x.npy", "allow_pickle": True},
    "hydra.utils.instantiate": {"config": {"_target_": "os.system", "command": "touch canary"}},
    "hydra.utils.get_method": {"path": "os.system"},
    "hydra.utils.call": {"config": {"_target_": "os.system", "command": "touch canary"}},
    "functools.partial": {"_args_": ["os.system", "touch canary"]},
    "timeit.timeit": {"stmt": CANARY},
    "code.interact": {},
    "pdb.run": {"statement": CANARY},
    "webbrowser.open": {"url": "file:///canary"},
    "urllib.request.urlopen": {"url": "http://127.0.0.1:9"},
    "qdm_lightning.cli.jobs._run": {"command": ["touch", "canary"], "environment": {}, "log": None},
    "qdm_lightning.cli.app._discard": {"folder": "{O}"},
    "qdm_lightning.base.files.write_json": {"path": "{O}/canary", "data": 1},
    "qdm_lightning.base.files.write_whole": {"path": "{O}/canary", "content": "x"},
    "qdm_lightning.base.files.atomic_folder": {"path": "{O}/canary"},
    "qdm_lightning.models.diffusers_io.save_pipeline": {"unet": 1, "diffusion": 1, "folder": "{O}/canary"},
    "qdm_lightning.report.main": {"argv": ["{F}/run", "out={O}/canary"]},
    "qdm_lightning.train.main": {},
    "qdm_lightning.cli.app.os.system": {"command": "touch canary"},
    "qdm_lightning.quantization.spec.QuantConfig.__init__": {},
    "qdm_lightning..os.system": {},
}
PLACES = (
    "data",
    "model",
    "taq",
    "metrics",
    "logger",
    "logger.mine",
    "callbacks.mine",
    "quant.weight_quantizer",
    "quant.act_quantizer",
    "quant.calibrator",
    "optimizer.lr",
    "sampler",
    "trainer.histograms",
    "data.batch_size",
    "model.block_out_channels",
    "taq.psi",
    "quant.act_quantizer.inner",
    "paths.output",
)
SHELL = {"_target_": "os.system", "command": "touch canary"}
TEXTS = {
    "python object": "x: !!python/object/apply:os.system ['touch canary']",
    "python name": "x: !!python/name:os.system",
    "python module": "x: !!python/module:hostile_module",
    "python object new": "x: !!python/object/new:os.system ['touch canary']",
    "python tuple": "tags: !!python/tuple [a]",
    "own tag": "x: !canary a",
    "alias": "x: &a [1]\ny: *a",
    "alias bomb": "\n".join(["a0: &a0 [x]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12))]),
    "merge key": "x: &a {b: 1}\ny: {<<: *a}",
    "interpolated target": "callbacks: '${oc.create:{_target_: os.system, command: touch canary}}'",
    "interpolated list": "tags: ['${oc.env:HOME}']",
    "environment": "logger: {name: '${oc.env:HOME}'}",
    "environment in a name": "'${oc.env:HOME}': 1",
    "decoded": "x: '${oc.decode:1}'",
    "our resolver": "x: '${qdm.scratch:}'",
    "node": "paths: ${sampler}",
    "nested brackets": "x: " + "[" * 50000,
    "deep brackets": "x: " + "[" * 5000 + "]" * 5000,
    "many": "x: [" + "1," * 700000 + "]",
    "binary": "x: !!binary aGVsbG8=",
    "set": "x: !!set {a, b}",
    "several documents": "x: 1\n---\ny: 2",
    "date": "seed: 2001-01-01",
    "two names": "seed: 1\nseed: {_target_: os.system}",
    "number as name": "1: 2",
    "null as name": "null: 2",
    "anchor alone": "seed: &a {_target_: os.system, command: touch canary}",
}


def run_copy(folder: Path, name: str = "run") -> Path:
    """A finished run of ours, that the attack changes."""
    return Path(shutil.copytree(STORED_RUN, folder / name, copy_function=shutil.copyfile))


def _put(values: Any, place: str, node: Any) -> None:
    *above, last = place.split(".")
    for name in above:
        values = values.setdefault(name, {}) if isinstance(values, dict) else {}
        if values is None:
            return
    values[last] = node


def with_node(place: str, node: Any, folder: Path) -> None:
    """A run whose configuration has `node` at `place`."""
    file = run_copy(folder) / "config.yaml"
    values = yaml.safe_load(file.read_text())
    text = json.dumps(node).replace("{O}", str(folder.parent / "outside")).replace("{F}", str(folder))
    _put(values, place, json.loads(text))
    file.write_text(yaml.safe_dump(values))
    (folder.parents[1] / "work" / "hostile_module.py").write_text("open('canary', 'w')\nThing = dict\n")


def with_text(text: str, folder: Path) -> None:
    """A run whose configuration ends with `text`."""
    file = run_copy(folder) / "config.yaml"
    name = text.partition(":")[0].strip("'")
    values = {key: value for key, value in yaml.safe_load(file.read_text()).items() if key != name}
    file.write_text(yaml.safe_dump(values) + text + "\n")


class Pickled:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def pickled(file: str, folder: Path, run: bool = True) -> None:
    """A pickle that runs a command, in place of a file."""
    import torch

    if run:
        run_copy(folder)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": Pickled(), "global_step": 1, "x": Pickled()}, path)


def object_array(file: str, folder: Path) -> None:
    """An archive whose arrays are pickles."""
    import numpy as np

    arrays = {name: np.array([Pickled()], dtype=object) for name in ("images", "mu", "sigma", "data", "labels")}
    run_copy(folder)
    np.savez(folder / file, **arrays)


def plain_pickle(file: str, folder: Path) -> None:
    """A pickle without torch's archive around it."""
    import pickle

    run_copy(folder)
    (folder / file).write_bytes(pickle.dumps(Pickled()))


def cifar_pickles(folder: Path) -> None:
    """CIFAR-10's batches, each a pickle that runs a command."""
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"):
        plain_pickle_to(place / name)


def plain_pickle_to(path: Path) -> None:
    """A pickle that runs a command."""
    import pickle

    path.write_bytes(pickle.dumps({"data": Pickled()}))


def bin_weights(folder: Path) -> None:
    """A teacher whose weights are a pickle."""
    run = run_copy(folder)
    for file in (run / "teacher" / "unet").glob("*.safetensors"):
        file.unlink()
    pickled("run/teacher/unet/diffusion_pytorch_model.bin", folder, run=False)


def student_node(role: str, node: dict[str, Any], folder: Path) -> None:
    """A student whose config.json names a quantizer."""
    file = run_copy(folder) / "student" / "config.json"
    values = json.loads(file.read_text())
    values["quantizers"][role] = node
    file.write_text(json.dumps(values))
    (folder.parents[1] / "work" / "hostile_module.py").write_text("open('canary', 'w')\nThing = dict\n")


def load_student(folder: Path) -> int:
    """`qdm_lightning.load_student`, with the exit status of a command."""
    import qdm_lightning
    from qdm_lightning.base.checks import one_line

    sys.path.insert(0, str(Path.cwd()))
    try:
        qdm_lightning.load_student(folder / "run")
    except (ValueError, FileNotFoundError) as error:
        print(one_line(error), file=sys.stderr)
        return 2
    return 0


def student_json(change: dict[str, Any], folder: Path) -> None:
    """A student whose config.json says something else."""
    file = run_copy(folder) / "student" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def network_json(change: dict[str, Any], folder: Path) -> None:
    """A teacher whose U-Net's config.json says something else."""
    file = run_copy(folder) / "teacher" / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def bomb_png(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it has bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


PICTURES = {
    "PostScript as png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(canary) (w) file closefile\n",
    "PSD as png": b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(40),
    "PDF as jpg": b"%PDF-1.4\n",
    "SVG as png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "HTML as jpg": b"<html></html>",
    "FITS as tif": b"SIMPLE  =                    T" + b" " * 2850,
    "HDF5 as png": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "BUFR as png": b"BUFR" + bytes(100),
    "GRIB as png": b"GRIB" + bytes(3) + b"\x01" + bytes(100),
    "MPEG as jpg": b"\x00\x00\x01\xb3" + bytes(100),
    "WMF as bmp": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(100),
    "ICNS as png": b"icns" + struct.pack(">I", 100) + bytes(92),
    "wide png": bomb_png(10**6, 10**6),
    "long png": bomb_png(1, 2**31 - 1),
    "wide bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 10**6, 0, 0, 54, 40, 2**30, 2**20, 1, 24, 0, 0, 0, 0, 0, 0),
    "wide gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02",
    "wide ppm": b"P5 1000000 1000000 255\n",
    "cut png": bomb_png(8, 8)[:50],
}


def picture(content: bytes, name: str, folder: Path) -> None:
    """Pictures, one of them hostile."""
    import numpy as np
    from PIL import Image

    (folder / "pics").mkdir()
    for index in range(6):
        Image.fromarray(np.full((8, 8), 40 * index, np.uint8)).save(folder / "pics" / f"{index}.png")
    (folder / "pics" / f"a.{name}").write_bytes(content)


def metrics(folder: Path, place: str = "") -> None:
    """A run whose record, settings or folder have names that steer a terminal."""
    run = run_copy(folder)
    record = json.loads((run / "metrics.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    if place == "name":
        record["teacher"] |= {ESCAPES: 1.0}
        record["student"] |= {ESCAPES: 1.0}
        record["floor"] |= {ESCAPES: 2.0}
    elif place == "value":
        record["git"] = {"commit": ESCAPES, "changed": ESCAPES}
        record["versions"] = dict.fromkeys(record["versions"], ESCAPES)
        record["hardware"] = dict.fromkeys(record["hardware"], ESCAPES)
        record["seconds"] |= {ESCAPES: 1.0}
    elif place == "config":
        config["tags"], config["sampler"]["kind"], config["data"]["path"] = [ESCAPES], ESCAPES, ESCAPES
        config[ESCAPES] = ESCAPES
    elif place == "damaged":
        record["teacher"] = ESCAPES
    elif place == "folder":
        run.rename(folder / f"run{ESCAPES}")
        return
    (run / "metrics.json").write_text(json.dumps(record))
    (run / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))


def evaluation(folder: Path) -> None:
    """A run with an evaluation whose texts steer a terminal, and rich's markup."""
    run = run_copy(folder)
    other = run_copy(folder, "other")
    place = other / "evaluations" / "x"
    place.mkdir(parents=True)
    text = f"[link=file:///canary]{ESCAPES}[/bold]"
    record = {
        "protocol": {"num_samples": text, "reference": text},
        "scores": {f"fd_{text}": 1.0},
        "sampler": {"kind": text, "steps": 1, "spacing": "uniform", "eta": 0.0, "clip_sample": True, "variance": "x"},
        "identity": text,
        "name": text,
        "network": "student",
        "bits": [4, 4],
        "origin": {"weights": text, "file": text},
        "diffusion": {},
        "images": {"count": 16, "sha256": "x"},
    }
    (place / "evaluation.json").write_text(json.dumps(record))
    assert run.is_dir()


def outside(place: str, value: Any, folder: Path) -> None:
    """A run that names a folder outside for what it writes."""
    with_node(place, value, folder)


def attacks() -> dict[str, Attack]:
    """Every attack by its name."""
    return dict(_attacks())


def _attacks() -> Iterator[tuple[str, Attack]]:
    commands = list(COMMANDS)
    for number, (target, options) in enumerate(TARGETS.items()):
        place = ("metrics", "callbacks.mine", "data", "quant.act_quantizer")[number % 4]
        command = "evaluate" if place == "metrics" else commands[number % 4]
        node = {"_target_": target, **options}
        yield f"{command}: {target} at {place}", Attack(partial(with_node, place, node), command, COMMANDS[command])
    for number, place in enumerate(PLACES):
        command = ("train", "evaluate")[number % 2]
        yield f"{command}: a shell at {place}", Attack(partial(with_node, place, SHELL), command, COMMANDS[command])
    forms: dict[str, tuple[str, Any]] = {
        "a list": ("tags", [SHELL]),
        "a list in a list": ("tags", [[SHELL]]),
        "partial": ("callbacks.mine", {**SHELL, "_partial_": True}),
        "a target that is a list": ("data", {"_target_": ["os", "system"]}),
        "a target that is a node": ("data", {"_target_": SHELL}),
        "no target but arguments": ("data", {"_args_": ["x"], "_target_": "qdm_lightning.data.digits.DigitsData"}),
        "not recursive": ("taq", {"_recursive_": False, "_target_": "qdm_lightning.quantization.taq.NormalizedActivation"}),
        "converted": ("metrics", {"_convert_": "object", "_target_": "qdm_lightning.metrics.digits.DigitsFeatures"}),
        "partial of ours": ("metrics", {"_partial_": True, "_target_": "qdm_lightning.metrics.digits.DigitsFeatures"}),
        "hydra's node": ("hydra", {"run": {"dir": "{O}/canary"}}),
        "a trust list": ("trust", ["os.system"]),
        "a hub's network": ("model", {"_target_": "qdm_lightning.models.diffusers_io.load_unet", "path": ["a/b"]}),
    }
    for name, (place, node) in forms.items():
        for command in ("train", "evaluate"):
            unused = place == "model" and command == "evaluate"  # which takes the run's own copy of its teacher
            yield f"{command}: {name}", Attack(partial(with_node, place, node), command, COMMANDS[command], harmless=unused)
    for number, (name, text) in enumerate(TEXTS.items()):
        command = commands[number % 4]
        yield f"{command}: YAML, {name}", Attack(partial(with_text, text), command, COMMANDS[command])
        if number % 3 == 0:
            harmless = name in ("date", "number as name")  # in a place that a report does not look at
            yield f"report: YAML, {name}", Attack(partial(with_text, text), "report", "{F}/run out=r", harmless=harmless)
    elsewhere = {
        "paths.cache": "{O}/cache",
        "paths.output": "{O}/runs",
        "data": {
            "_target_": "qdm_lightning.data.cifar10.Cifar10Data",
            "root": "{O}/data",
            "download": True,
        },
        "logger": {"_target_": "qdm_lightning.loggers.tensorboard_logger", "folder": "../../outside"},
        "run": "{O}/run",
    }
    for place, value in elsewhere.items():
        for command in ("train", "evaluate"):
            words = COMMANDS[command].replace(" compile=off", " compile=off")
            yield f"{command}: {place} outside", Attack(partial(outside, place, value), command, words, harmless=True)
    yield from _files()
    yield from _students()
    for name, content in PICTURES.items():
        words = "data=images metrics=digits data.channels=1 data.image_size=8 data.path={F}/pics"
        yield f"train: {name}", Attack(partial(picture, content, name.rpartition(" ")[2]), "train", words)
    for place in ("name", "value", "config", "damaged", "folder"):
        words = "{F} out=r"
        yield f"report: escapes in a {place}", Attack(partial(metrics, place=place), "report", words, harmless=True)
    yield "report: escapes in an evaluation", Attack(evaluation, "report", "{F} out=r", harmless=True)
    words = f"run={{F}}/run {FEW} against={{F}}/other"
    yield "evaluate: escapes and markup in another's record", Attack(evaluation, "evaluate", words, harmless=True)
    yield "evaluate: the same, forced", Attack(evaluation, "evaluate", f"{words} force=true", harmless=True)


def _files() -> Iterator[tuple[str, Attack]]:
    best, last = "run/checkpoints/best.ckpt", "run/checkpoints/last.ckpt"
    evaluate, sample, diagnose = (COMMANDS[name] for name in ("evaluate", "sample", "diagnose"))
    yield "evaluate: best.ckpt", Attack(partial(pickled, best), "evaluate", evaluate)
    yield "sample: best.ckpt", Attack(partial(pickled, best), "sample", sample)
    yield "diagnose: best.ckpt", Attack(partial(pickled, best), "diagnose", diagnose)
    yield "train: last.ckpt", Attack(partial(pickled, last), "train", "run={F}/run", harmless=True)  # best.ckpt is taken
    yield "evaluate: a checkpoint", Attack(partial(pickled, "x.ckpt"), "evaluate", f"{evaluate} checkpoint={{F}}/x.ckpt")
    yield "evaluate: a plain pickle", Attack(partial(plain_pickle, "x.ckpt"), "evaluate", f"{evaluate} checkpoint={{F}}/x.ckpt")
    yield "convert: a checkpoint", Attack(partial(pickled, "x.ckpt"), "convert", "{F}/x.ckpt out")
    yield "convert: a plain pickle", Attack(partial(plain_pickle, "x.ckpt"), "convert", "{F}/x.ckpt out")
    yield (
        "train: a teacher's checkpoint",
        Attack(partial(pickled, "x.ckpt"), "train", "teacher=checkpoint teacher.path={F}/x.ckpt"),
    )
    yield "evaluate: a teacher's .bin", Attack(bin_weights, "evaluate", f"{evaluate} network=teacher")
    yield "train: a teacher's .bin", Attack(bin_weights, "train", "teacher=pretrained teacher.path={F}/run/teacher")
    yield (
        "train: Inception's weights",
        Attack(partial(pickled, "x.pth"), "train", "metrics=inception metrics.weights={F}/x.pth"),
    )
    yield (
        "evaluate: Inception's weights",
        Attack(partial(pickled, "x.pth"), "evaluate", f"{evaluate} metrics=inception metrics.weights={{F}}/x.pth"),
    )
    yield (
        "train: ResNet's weights",
        Attack(partial(object_array, "x.npz"), "train", "metrics=resnet20 metrics.weights={F}/x.npz"),
    )
    yield (
        "evaluate: reference statistics",
        Attack(partial(object_array, "x.npz"), "evaluate", f"{evaluate} reference={{F}}/x.npz"),
    )
    pictures = "data=images metrics=digits data.channels=1 data.image_size=8 data.path={F}/x.npz"
    yield "train: an archive of pictures", Attack(partial(object_array, "x.npz"), "train", pictures)
    cifar = "data=cifar10 data.verify=false data.root={F} data.image_size=8 model.in_channels=3 model.out_channels=3"
    yield "train: CIFAR-10", Attack(cifar_pickles, "train", cifar)
    changes: dict[str, dict[str, Any]] = {
        "another class": {"_class_name": "os.system"},
        "code of its own": {"auto_map": {"UNet2DModel": "hostile_module.Thing"}, "_class_name": "hostile_module.Thing"},
        "a block of its own": {"down_block_types": ["hostile_module.Thing", "AttnDownBlock2D"]},
        "huge": {"block_out_channels": [4000000, 8000000]},
        "words": {"sample_size": ESCAPES},
    }
    for name, change in changes.items():
        yield (
            f"evaluate: a network with {name}",
            Attack(partial(network_json, change), "evaluate", f"{evaluate} network=teacher"),
        )
        words = "teacher=pretrained teacher.path={F}/run/teacher"
        yield f"train: a network with {name}", Attack(partial(network_json, change), "train", words)


def _students() -> Iterator[tuple[str, Attack]]:
    nodes: dict[str, dict[str, Any]] = {
        "a shell": SHELL,
        "a module": {"_target_": "hostile_module.Thing"},
        "our writer": {"_target_": "qdm_lightning.base.files.write_json", "path": "canary", "data": 1},
        "our command": {"_target_": "qdm_lightning.report.main"},
        "a private function": {"_target_": "qdm_lightning.cli.jobs._run"},
        "another role": {"_target_": "qdm_lightning.quantization.quantizer.LSQWeight", "inner": SHELL},
        "an import of ours": {"_target_": "qdm_lightning.base.trust.ast.parse"},
        "nested": {"_target_": "qdm_lightning.quantization.quantizer.LSQActivation", "x": {"y": [SHELL]}},
        "arguments": {"_target_": "qdm_lightning.quantization.quantizer.LSQActivation", "_args_": [SHELL]},
    }
    for name, node in nodes.items():
        for role in ("weight", "activation"):
            yield f"load_student: {name} as {role}", Attack(partial(student_node, role, node), call=load_student)
    changes: dict[str, dict[str, Any]] = {
        "a huge network": {"unet": {"sample_size": 8, "block_out_channels": [4000000, 8000000]}},
        "another format": {"format": 99},
        "a format of words": {"format": ESCAPES},
    }
    for name, change in changes.items():
        yield f"load_student: {name}", Attack(partial(student_json, change), call=load_student)
    yield "load_student: pickled weights", Attack(partial(pickled, "run/student/model.safetensors"), call=load_student)
