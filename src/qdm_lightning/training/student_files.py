"""A student as a folder: a whole diffusers pipeline whose U-Net's `config.json` says how it is quantized.

    student = qdm_lightning.load_student("outputs/<run>")
    eps = student(x, t).sample

    model_index.json
    scheduler/scheduler_config.json
    unet/config.json                          UNet2DModel's, with a `quantization_config`
    unet/diffusion_pytorch_model.safetensors  weights at their bits (see `quantization.packing`), its metadata the settings

`quantization_config` has `quant_method`, `format`, the run's `quant` (bits, rules, quantizers) and `taq` (with its scope), and
`label_dropout` where the network was trained with dropped labels: its last label stands for no class. Where it is to run on
integer codes by itself, `"execution": "integer"` too.
diffusers reads the folder too, see `diffusers_quantizer`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor, nn

from qdm_lightning.base.checks import one_line, one_of
from qdm_lightning.base.files import atomic_folder, read_json
from qdm_lightning.base.ranks import rank
from qdm_lightning.diffusion.spec import DiffusionConfig
from qdm_lightning.models.diffusers_io import pipeline_scheduler, read_diffusion
from qdm_lightning.quantization.packing import load_packed
from qdm_lightning.quantization.spec import EXECUTIONS, TAQ
from qdm_lightning.runs.folder import CONFIG as RUN_CONFIG
from qdm_lightning.runs.folder import read_config
from qdm_lightning.runs.formats import upgraded
from qdm_lightning.training.diffusers_quantizer import as_loaded
from qdm_lightning.training.named_quantizers import checked_quantization, named_quantizers, prepare_by
from qdm_lightning.training.network_settings import (
    DROPPED,
    FORMAT,
    METHOD,
    check_format,
    check_settings,
    checked_execution,
    network_settings,
    quantization_settings,
    unet_config,
)
from qdm_lightning.training.student_weights import load_weights, own_settings, weights_settings, write_student_files

if TYPE_CHECKING:
    from qdm_lightning.training.experiment import Experiment

FOLDER = "student"
"""A student's folder in that of its run."""

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
        execution: what the folder says, one of `EXECUTIONS`.
    """

    format: int
    config: Path
    weights: Path
    settings: dict[str, Any]
    unet: dict[str, Any]
    execution: str = EXECUTIONS[0]

    def state(self, wanted: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], str]:
        """The weights by name, and a warning for the record (see `check_settings`).

        Args:
            wanted: settings of the network that the weights are for, where it is another than the folder's own.

        Raises:
            ValueError: damaged, or weights of another network.
        """
        if wanted is not None:
            check_settings(self.settings, wanted, self.config)
        said = own_settings(self.weights) if self.format > 1 else weights_settings(self.weights)
        return load_weights(self.weights), check_settings(said, self.settings, self.weights)


def save_student(student: nn.Module, experiment: Experiment, folder: Path) -> None:
    """Write a student's folder, whole or not at all; an older one is replaced. Of several processes the first one writes.

    Args:
        student: the prepared U-Net, any device and memory layout.
        experiment: that of its run, with the resolved configuration.
        folder: made, or replaced.

    Raises:
        ValueError: the student's state holds something that is no tensor.
    """
    if rank():
        return
    state = student.state_dict()
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"{foreign[0]} of the student is no tensor: a quantizer must keep its state in parameters and buffers")
    settings = network_settings(unet_config(student), experiment.diffusion, quantization_settings(experiment.resolved))
    scheduler = pipeline_scheduler(experiment.diffusion)
    with atomic_folder(folder) as new:
        DDPMPipeline(unet=student, scheduler=scheduler).save_config(new)
        scheduler.save_pretrained(new / "scheduler")
        write_student_files(student, settings, (new / CONFIG).parent)


def load_student(folder: str | Path, *, trusted: Collection[str] = (), execution: str | None = None) -> nn.Module:
    """The quantized student of a run: a `UNet2DModel` in eval mode, on the CPU, channels-last, as it was measured.

    A call quantizes its weights; under `with quantization.cached_weights(student):` many calls do that once.

    Its output `student(x, t).sample`, (B, C, H, W), is that of the run's student, bit for bit: same machine, versions and
    threads, fake quantization compiled or eager as it was there (`compiled.set_mode` takes `trainer.compile`; both say `auto`
    by themselves). Its `save_pretrained` writes the files again.

    A folder of version 0.1 loads with a warning: its weights do not say which quantization they are of.

    Args:
        folder: folder of a run, or its `student` folder.
        trusted: dotted paths outside this package that the file may name as quantizers; they are imported and run.
        execution: `simulated`, fake quantization in float, or `integer`, on integer codes (`integer.to_integer`), and then it
            is for the CPU alone; None: what the folder says, which is `simulated` where nobody saved an integer one.

    Raises:
        FileNotFoundError: no student there.
        ValueError: another `execution`, or a student that can't be integer; a damaged or foreign file, a quantizer that is not
            trusted or cannot be imported, weights that do not fit, or are of another student or (in a run's folder) run.
    """
    if execution is not None:
        one_of("execution", execution, EXECUTIONS)
    folder = Path(folder).expanduser()
    files = read_student(folder)
    quantizers = named_quantizers(files.settings, files.config, tuple(trusted))
    state, warning = files.state(_run_settings(folder))
    if warning:
        warnings.warn(warning, stacklevel=2)
    try:
        unet = UNet2DModel.from_config(files.unet)
        # Weights in float come first: a quantizer may look at the weight that it is made for.
        unet.load_state_dict({name: state[name] for name in unet.state_dict() if name in state}, strict=False)
        prepare_by(unet, files.settings, quantizers)
        load_packed(unet, state)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{files.config} and its weights do not make a student: {one_line(error)}") from error
    as_loaded(unet, files.settings, execution or files.execution)
    return cast(nn.Module, unet)


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


def _read(place: Path, file: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Settings, the U-Net's config and the execution of a folder of this format."""
    unet = read_json(file)
    quantization = unet.pop("quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise ValueError(f"{file} does not describe a student of ours: it has no quantization_config of {METHOD}")
    check_format(quantization.get("format"), file)
    execution = checked_execution(quantization.get("execution"), file)
    dropped = {name: value for name, value in quantization.items() if name == DROPPED}
    quantization = checked_quantization({part: quantization.get(part) for part in ("quant", "taq")}, file)
    found = read_diffusion(file.parent)
    if found is None:
        raise ValueError(f"{place} is damaged: scheduler/scheduler_config.json is missing")
    return network_settings(unet, DiffusionConfig(**found, **dropped), quantization), unet, execution


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
    quantization = checked_quantization({"quant": quant, "taq": taq}, file)
    return network_settings(old["unet"], DiffusionConfig(**old["diffusion"]), quantization), old["unet"]


def _run_settings(folder: Path) -> dict[str, Any] | None:
    """What the run in `folder` says about its student; None where it is no run's folder."""
    if not (folder / RUN_CONFIG).is_file():
        return None
    resolved, teacher = read_config(folder), folder / "teacher" / "unet" / "config.json"
    unet = read_json(teacher) if teacher.is_file() else {}
    return network_settings(unet, DiffusionConfig(**resolved["diffusion"]), quantization_settings(resolved))
