"""A student as a folder: a whole diffusers pipeline whose U-Net's `config.json` says how it is quantized.

    student = qdm_lightning.load_student("outputs/<run>")
    with qdm_lightning.quantization.timesteps(t):
        eps = student(x, t).sample

    model_index.json
    scheduler/scheduler_config.json
    unet/config.json                          UNet2DModel's, with a `quantization_config`
    unet/diffusion_pytorch_model.safetensors  weights at their bits (see `quantization.packing`), its metadata the settings

`quantization_config` has `quant_method`, `format`, and the run's `quant` (bits, rules, quantizers) and `taq` (with its scope).
It names the quantizers by dotted paths, as the run's configuration did. A path in a file runs code: it must be what
`base.trust` has for its place, or be trusted by name.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

import torch
from diffusers import DDPMPipeline, UNet2DModel
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save
from torch import Tensor, nn

from qdm_lightning.base.checks import UserError, one_line, one_of
from qdm_lightning.base.files import atomic_folder, read_json, write_json
from qdm_lightning.base.trust import check_targets, targets
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.integer import to_integer
from qdm_lightning.models.diffusers_io import pipeline_scheduler, read_diffusion
from qdm_lightning.quantization.packing import load_packed, packed_state
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.spec import TAQ, QuantConfig, TaQOff
from qdm_lightning.runs.folder import CONFIG as RUN_CONFIG
from qdm_lightning.runs.folder import read_config
from qdm_lightning.runs.formats import upgraded
from qdm_lightning.training.checkpoint_io import load_weights, weights_settings
from qdm_lightning.training.experiment import Experiment
from qdm_lightning.training.network_settings import (
    FORMAT,
    KEY,
    NODES,
    check_format,
    check_settings,
    network_settings,
    quantization_settings,
    unet_config,
)

FOLDER, METHOD = "student", "qdm_lightning"
"""A student's folder in that of its run; its `quant_method`, by which diffusers knows who reads it."""

FILES = {2: ("unet/config.json", "unet/diffusion_pytorch_model.safetensors"), 1: ("config.json", "model.safetensors")}
"""Description and weights of a folder, by its format."""

CONFIG, WEIGHTS = FILES[FORMAT]


@dataclass(frozen=True)
class StudentFiles:
    """A student's folder as it was found.

    Attributes:
        format: its format.
        config, weights: its description, and its weights.
        settings: of the network, as `network_settings` has them.
        unet: config.json of the U-Net.
    """

    format: int
    config: Path
    weights: Path
    settings: dict[str, Any]
    unet: dict[str, Any]

    def state(self, wanted: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], str]:
        """The weights by name, and a warning for the record (see `check_settings`).

        Args:
            wanted: settings of the network that the weights are for, where it is another than the folder's own.

        Raises:
            ValueError: damaged, or weights of another network.
        """
        if wanted is not None:
            check_settings(self.settings, wanted, self.config)
        said = weights_settings(self.weights)
        if said is None and self.format > 1:
            raise UserError(
                f"{self.weights} does not say of which bits, TaQ and schedule its weights are: they were written by others"
            )
        return load_weights(self.weights), check_settings(said, self.settings, self.weights)


@rank_zero_only
def save_student(student: nn.Module, experiment: Experiment, folder: Path) -> None:
    """Write a student's folder, whole or not at all; an older one is replaced.

    Args:
        student: the prepared U-Net, any device and memory layout.
        experiment: that of its run, with the resolved configuration.
        folder: made, or replaced.

    Raises:
        ValueError: the student's state holds something that is no tensor.
    """
    state = student.state_dict()
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"{foreign[0]} of the student is no tensor: a quantizer must keep its state in parameters and buffers")
    quantization = quantization_settings(experiment.resolved)
    config = {name: value for name, value in unet_config(student).items() if name != "_name_or_path"} | {"dropout": 0.0}
    settings = network_settings(config, experiment.diffusion, quantization)
    config["quantization_config"] = {"quant_method": METHOD, "format": FORMAT, **quantization}
    scheduler = pipeline_scheduler(experiment.diffusion)
    with atomic_folder(folder) as new:
        DDPMPipeline(unet=student, scheduler=scheduler).save_config(new)
        scheduler.save_pretrained(new / "scheduler")
        write_json(new / CONFIG, config)
        (new / WEIGHTS).write_bytes(_same_bytes(save(packed_state(student), {"format": "pt", KEY: json.dumps(settings)})))


def _same_bytes(content: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them in another one each time."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[begin:]


def load_student(folder: str | Path, *, trusted: Collection[str] = (), execution: str = "simulated") -> nn.Module:
    """The quantized student of a run: a `UNet2DModel` in eval mode, on the CPU, channels-last, as it was measured.

    A call quantizes its weights; under `with quantization.cached_weights(student):` many calls do that once.

    Under `with quantization.timesteps(t):` its output `student(x, t).sample`, (B, C, H, W), is that of the run's student,
    bit for bit: same machine, versions and threads, fake quantization compiled or eager as it was there (`compiled.set_mode`
    takes `trainer.compile`; both say `auto` by themselves).

    A folder of version 0.1 loads with a warning: its weights do not say which quantization they are of.

    Args:
        folder: folder of a run, or its `student` folder.
        trusted: dotted paths outside this package that the file may name as quantizers; they are imported and run.
        execution: `simulated`, fake quantization in float, or `integer`, on integer codes (`integer.to_integer`).

    Raises:
        FileNotFoundError: no student there.
        ValueError: another `execution`, or a student that can't be integer; a damaged or foreign file, a quantizer that is not
            trusted or cannot be imported, weights that do not fit, or are of another student or (in a run's folder) run.
    """
    one_of("execution", execution, ("simulated", "integer"))
    folder = Path(folder).expanduser()
    files = read_student(folder)
    quantizers = _quantizers(files.settings, files.config, tuple(trusted))
    state, warning = files.state(_run_settings(folder))
    if warning:
        warnings.warn(warning, stacklevel=2)
    try:
        bits = QuantConfig(**{name: value for name, value in files.settings["quant"].items() if name not in NODES})
        unet = UNet2DModel.from_config(files.unet)
        # Weights in float come first: a quantizer may look at the weight that it is made for.
        unet.load_state_dict({name: state[name] for name in unet.state_dict() if name in state}, strict=False)
        prepare(unet, bits, quantizers)
        load_packed(unet, state)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{files.config} and its weights do not make a student: {one_line(error)}") from error
    student = cast(nn.Module, unet.to(memory_format=torch.channels_last).eval())
    return to_integer(student)[0] if execution == "integer" else student


def read_student(folder: Path) -> StudentFiles:
    """A student's folder, or that of its run, in this or an older format. Runs no code and reads no weights.

    Raises:
        FileNotFoundError: no student there.
        ValueError: the file is damaged, or of a newer format.
    """
    for place in (folder / FOLDER, folder):
        for version, (config, weights) in FILES.items():
            if (place / config).is_file() and (place / weights).is_file():
                read = _read if version == FORMAT else _read_first
                return StudentFiles(version, place / config, place / weights, *read(place, place / config))
    raise FileNotFoundError(f"{folder} holds no student: give the folder of a run, or one with {CONFIG} and {WEIGHTS}")


def _read(place: Path, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and the U-Net's config of a folder of this format."""
    unet = read_json(file)
    quantization = unet.pop("quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise ValueError(f"{file} does not describe a student of ours: it has no quantization_config of {METHOD}")
    check_format(quantization.get("format"), file)
    quantization = _complete(upgraded({part: quantization.get(part) for part in ("quant", "taq")}), file)
    found = read_diffusion(file.parent)
    if found is None:
        raise ValueError(f"{place} is damaged: scheduler/scheduler_config.json is missing")
    return network_settings(unet, DiffusionConfig(**found), quantization), unet


def _read_first(place: Path, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a folder of format 1, which had the quantizers by their roles: TaQ is what differs for q, k, v."""
    old = upgraded(read_json(file))
    if "format" not in old:
        raise ValueError(f"{file} does not describe a student of ours")
    check_format(old["format"], file)
    missing = [name for name in ("unet", "diffusion", "quant", "quantizers") if not isinstance(old.get(name), dict)]
    roles = {} if missing else {role: old["quantizers"].get(role) for role in ("weight", "activation", "attention")}
    missing += [f"quantizers.{role}._target_" for role, node in roles.items() if not isinstance(node, dict)]
    if missing:
        raise ValueError(f"{file} is damaged: {missing[0]} is missing")
    quant = {**old["quant"], "weight_quantizer": roles["weight"], "act_quantizer": roles["activation"]}
    everywhere = roles["attention"] == roles["activation"]
    ours = [getattr(kind, "_target_", None) for kind in TAQ.values()]
    off = everywhere and roles["attention"].get("_target_") not in ours[1:]
    taq = {} if off else {"scope": "all" if everywhere else "attention", **roles["attention"]}
    quantization = _complete(upgraded({"quant": quant, "taq": taq}), file)
    return network_settings(old["unet"], DiffusionConfig(**old["diffusion"]), quantization), old["unet"]


def _complete(quantization: dict[str, Any], file: Path) -> dict[str, Any]:
    """Settings of the quantization, checked. Raises ValueError where they are damaged."""
    quant, taq = quantization["quant"], quantization["taq"]
    if not isinstance(quant, dict) or not isinstance(taq, dict):
        raise ValueError(f"{file} is damaged: {'taq' if isinstance(quant, dict) else 'quant'} is missing")
    kinds = dict(targets(quant, "quant"))
    missing = [f"quant.{name}._target_" for name in NODES if not kinds.get(f"quant.{name}")]
    if missing:
        raise ValueError(f"{file} is damaged: {missing[0]} is missing")
    try:
        return quantization_settings(quantization)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} does not describe a student: {one_line(error)}") from error


def _run_settings(folder: Path) -> dict[str, Any] | None:
    """What the run in `folder` says about its student; None where it is no run's folder."""
    if not (folder / RUN_CONFIG).is_file():
        return None
    resolved, teacher = read_config(folder), folder / "teacher" / "unet" / "config.json"
    unet = read_json(teacher) if teacher.is_file() else {}
    return network_settings(unet, DiffusionConfig(**resolved["diffusion"]), quantization_settings(resolved))


def _quantizers(settings: Mapping[str, Any], file: Path, trusted: tuple[str, ...]) -> Quantizers:
    """The factories that a student's files name."""
    quant, taq = settings["quant"], settings["taq"]
    check_targets({"quant": quant, "taq": taq}, trusted, source=file, way="load_student(..., trusted=['{target}'])")
    weight, act = (_factory(file, quant[name]) for name in NODES)
    options = {name: value for name, value in taq.items() if name != "scope"}
    return Quantizers.with_taq(weight, act, _factory(file, options) if taq else None, taq.get("scope", TaQOff.scope))


def _factory(file: Path, node: Mapping[str, Any]) -> Callable[..., Any]:
    """A node as a partial of its `_target_`; nodes inside it are called."""
    options = {name: _value(file, v) for name, v in node.items() if not (name.startswith("_") and name.endswith("_"))}
    return functools.partial(_locate(file, node["_target_"]), *_value(file, node.get("_args_", [])), **options)


def _value(file: Path, value: Any) -> Any:
    if isinstance(value, dict):
        return _factory(file, value)() if "_target_" in value else {name: _value(file, v) for name, v in value.items()}
    return [_value(file, v) for v in value] if isinstance(value, list) else value


def _locate(file: Path, target: str) -> Any:
    try:
        return resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: {target} cannot be imported: {one_line(error)}") from error
