"""A student as a folder: weights as safetensors, and what builds the network around them again.

    student = qdm_lightning.load_student("outputs/<run>")
    with qdm_lightning.quantization.timesteps(t):
        eps = student(x, t).sample

`config.json` names the quantizers by dotted paths, as the run's configuration did. A path in a file runs code: those of this
package must be quantizers, any other one must be trusted by name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

import torch
from diffusers import UNet2DModel
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file
from torch import Tensor, nn

from qdm_lightning.base.checks import one_line, one_of
from qdm_lightning.base.files import atomic_folder, read_json, write_json
from qdm_lightning.base.trust import is_ours, targets
from qdm_lightning.integer import to_integer
from qdm_lightning.quantization.preparation import Quantizers, prepare
from qdm_lightning.quantization.quantizer import ActivationQuantizer, WeightQuantizer
from qdm_lightning.quantization.spec import QuantConfig
from qdm_lightning.runs.formats import upgraded
from qdm_lightning.training.checkpoint_io import load_weights
from qdm_lightning.training.experiment import Experiment

FORMAT = 1
"""Raised when a folder of an older version could no longer be read as it was meant."""

FOLDER, CONFIG, WEIGHTS = "student", "config.json", "model.safetensors"
PARTS = ("unet", "diffusion", "quant", "quantizers")
BITS = ("weight_bits", "act_bits", "qkv_bits", "probs_bits", "first_last_bits", "rules")
ROLES: dict[str, type[nn.Module]] = {
    "weight": WeightQuantizer,
    "activation": ActivationQuantizer,
    "attention": ActivationQuantizer,
}


@rank_zero_only
def save_student(student: nn.Module, experiment: Experiment, folder: Path) -> None:
    """Write a student's folder, whole or not at all; an older one is replaced.

    Args:
        student: the prepared U-Net, any device and memory layout.
        experiment: that of its run, with the resolved configuration.
        folder: `config.json` and `model.safetensors` go there.

    Raises:
        ValueError: the student's state holds something that is no tensor.
    """
    state = student.state_dict()
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"{foreign[0]} of the student is no tensor: a quantizer must keep its state in parameters and buffers")
    with atomic_folder(folder) as new:
        write_json(new / CONFIG, _settings(student, experiment))
        contiguous = {n: value.detach().cpu().clone(memory_format=torch.contiguous_format) for n, value in state.items()}
        save_file(contiguous, new / WEIGHTS, metadata={"format": "pt"})


def _settings(student: Any, experiment: Experiment) -> dict[str, Any]:
    quant = experiment.resolved["quant"]
    taq: Any = {name: value for name, value in experiment.resolved["taq"].items() if name != "scope"}
    scope = experiment.resolved["taq"].get("scope", "")
    nodes = Quantizers.with_taq(quant["weight_quantizer"], quant["act_quantizer"], taq if taq.get("_target_") else None, scope)
    return {
        "format": FORMAT,
        "unet": {**json.loads(student.to_json_string()), "dropout": 0.0},
        "diffusion": asdict(experiment.diffusion),
        "quant": {name: quant[name] for name in BITS},
        "quantizers": {role: getattr(nodes, role) for role in ROLES},
    }


def load_student(folder: str | Path, *, trusted: Collection[str] = (), execution: str = "simulated") -> nn.Module:
    """The quantized student of a run: a `UNet2DModel` in eval mode, on the CPU, channels-last, as it was measured.

    A call quantizes its weights; under `with quantization.cached_weights(student):` many calls do that once.

    Under `with quantization.timesteps(t):` its output `student(x, t).sample`, (B, C, H, W), is that of the run's student,
    bit for bit: same machine, versions and threads, fake quantization compiled or eager as it was there (`compiled.set_mode`
    takes `trainer.compile`; both say `auto` by themselves).

    Args:
        folder: folder of a run, or its `student` folder.
        trusted: dotted paths outside this package that the file may name as quantizers; they are imported and run.
        execution: `simulated`, fake quantization in float, or `integer`, on integer codes (`integer.to_integer`).

    Raises:
        FileNotFoundError: no student there.
        ValueError: another `execution`, or a student that can't be integer; a damaged or foreign file, a quantizer that is not
            trusted or cannot be imported, weights that do not fit.
    """
    one_of("execution", execution, ("simulated", "integer"))
    place = _place(Path(folder).expanduser())
    settings = read_settings(place)
    quantizers = Quantizers(
        **{role: _quantizer(place / CONFIG, role, settings["quantizers"][role], tuple(trusted)) for role in ROLES}
    )
    state = load_weights(place / WEIGHTS)
    try:
        bits = QuantConfig(**settings["quant"])
        unet = UNet2DModel.from_config(settings["unet"])
        # The float weights come first: a quantizer may look at the weight that it is made for.
        unet.load_state_dict({name: state[name] for name in unet.state_dict()})
        prepare(unet, bits, quantizers)
        unet.load_state_dict(state)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{place}: {CONFIG} and {WEIGHTS} do not make a student: {one_line(error)}") from error
    student = cast(nn.Module, unet.to(memory_format=torch.channels_last).eval())
    return to_integer(student)[0] if execution == "integer" else student


def read_settings(folder: Path) -> dict[str, Any]:
    """`unet`, `diffusion`, `quant` and `quantizers` of a student's `config.json`, as this version names them. Runs no code.

    Raises:
        ValueError: the file is damaged, or of another format.
    """
    file = folder / CONFIG
    settings: dict[str, Any] = upgraded(read_json(file))
    if "format" not in settings:
        raise ValueError(f"{file} does not describe a student of ours")
    if settings["format"] != FORMAT:
        raise ValueError(
            f"{file} has format {settings['format']}, this version reads {FORMAT}: load it with the version it is of"
        )
    kinds = dict(targets(settings.get("quantizers"), "quantizers"))
    missing = [name for name in PARTS if not isinstance(settings.get(name), dict)]
    missing += [f"quantizers.{role}._target_" for role in ROLES if not kinds.get(f"quantizers.{role}")]
    if missing:
        raise ValueError(f"{file} is damaged: {missing[0]} is missing")
    return settings


def _place(folder: Path) -> Path:
    for place in (folder / FOLDER, folder):
        if (place / CONFIG).is_file() and (place / WEIGHTS).is_file():
            return place
    raise FileNotFoundError(f"{folder} holds no student: give the folder of a run, or one with {CONFIG} and {WEIGHTS}")


def _quantizer(file: Path, role: str, node: dict[str, Any], trusted: tuple[str, ...]) -> Callable[..., Any]:
    """The factory that a node names. Ours must be quantizers; other code runs only if it is trusted."""
    for key, target in targets(node, f"quantizers.{role}"):
        if target in trusted:
            continue
        if not is_ours(str(target)):
            raise ValueError(
                f"{file} would run {target} ({key}._target_), which is not part of qdm_lightning: "
                f"if you trust it, load_student(..., trusted=[{target!r}])"
            )
        kind = _locate(file, target)
        if not (isinstance(kind, type) and issubclass(kind, ROLES[role])):
            raise ValueError(f"{file}: {key}._target_={target} is no {ROLES[role].__name__}")
    return _factory(file, node)


def _factory(file: Path, node: dict[str, Any]) -> Callable[..., Any]:
    """A node as a partial of its `_target_`; nodes inside it are called."""
    options = {name: _value(file, value) for name, value in node.items() if not (name.startswith("_") and name.endswith("_"))}
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
