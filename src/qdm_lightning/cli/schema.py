"""The typed schema of `conf/`: `TrainConfig` is the root of `conf/train.yaml`.

Nodes whose settings are ours are typed; a group whose options carry a `_target_` is open, and each of our options brings a
schema of its own (`base_<name>` in Hydra's ConfigStore). Imports no torch, so that help stays quick.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from qdm_lightning.base.checks import between, one_of
from qdm_lightning.cli.logger_schema import MLflowConfig, TensorBoardConfig, TrackioConfig, WandbConfig
from qdm_lightning.data.spec import CelebAConfig, Cifar10Config, DigitsConfig, HFConfig, ImageNet64Config, ImagesConfig
from qdm_lightning.diffusion.spec import SEEDS, DiffusionConfig, NeMConfig, SamplerConfig
from qdm_lightning.metrics.spec import (
    CLIPMetric,
    CustomMetric,
    DigitsMetric,
    DINOv2Metric,
    InceptionMetric,
    NoMetric,
    ResNet20Metric,
)
from qdm_lightning.models.spec import PretrainedConfig, UNetConfig
from qdm_lightning.quantization.spec import EXECUTIONS, TAQ, QuantConfig
from qdm_lightning.runs import naming
from qdm_lightning.runs.folder import MAY_CHANGE
from qdm_lightning.training.spec import OptimizerConfig, PathsConfig, TeacherConfig, TrainerConfig

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"
"""`conf/` inside the installed package, or at the top of a checkout."""


@dataclass(kw_only=True)
class TrainConfig:
    """Root of `conf/train.yaml`.

    Args:
        seed: seed of training, and of the images that are compared.
        run: folder of an earlier run to go on with; nothing else may be given with it.
        num_samples: images behind each distance.
        execution: how the student draws them: `simulated` in float, or on `integer` codes, on the CPU. It trains in float.
        tags: labels of the run, for the records.
        trial: the run only tries whether everything works (`debug=trial`); its record says so.
    """

    seed: int = 0
    run: str | None = None
    num_samples: int = 1024
    execution: str = "simulated"
    tags: list[str] = field(default_factory=list)
    trial: bool = False
    data: Any = MISSING
    model: Any = MISSING
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    taq: Any = MISSING
    nem: NeMConfig = field(default_factory=NeMConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    metrics: Any = MISSING
    logger: Any = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def __post_init__(self) -> None:
        between("seed", self.seed, 0, SEEDS - 1)
        between("num_samples", self.num_samples, 2, SEEDS)
        one_of("execution", self.execution, EXECUTIONS)
        if self.execution == "integer" and self.quant.is_float:
            raise ValueError("execution=integer is for a quantized student, quant=fp32 has none: leave one of the two out")


SCHEMAS: dict[str, dict[str, type]] = {
    "data": {
        "digits": DigitsConfig,
        "images": ImagesConfig,
        "hf": HFConfig,
        "cifar10": Cifar10Config,
        "celeba": CelebAConfig,
        "imagenet64": ImageNet64Config,
    },
    "model": {"unet": UNetConfig, "pretrained": PretrainedConfig},
    "taq": dict(TAQ),
    "metrics": {
        "none": NoMetric,
        "digits": DigitsMetric,
        "inception": InceptionMetric,
        "resnet20": ResNet20Metric,
        "dinov2": DINOv2Metric,
        "clip": CLIPMetric,
        "custom": CustomMetric,
    },
    "logger": {
        "wandb": WandbConfig,
        "tensorboard": TensorBoardConfig,
        "trackio": TrackioConfig,
        "mlflow": MLflowConfig,
    },
}
"""Schemas of our options in the open groups: a YAML file takes one with `defaults: [base_<name>, _self_]`."""


_ROOTS: list[type] = []


def register_root(name: str, schema: type) -> None:
    """Tell Hydra's ConfigStore the root `base_<name>`; any name may be added to its open nodes: no `+` to type."""
    _ROOTS.append(schema)
    root = OmegaConf.structured(schema)
    free = ["sampler.scheduler"] if "sampler" in root else []
    if issubclass(schema, TrainConfig):
        free += ["callbacks", "nem.weighting", "quant.rules"]
        free += ["quant.weight_quantizer", "quant.act_quantizer", "quant.calibrator"]
    for key in free:
        OmegaConf.set_struct(OmegaConf.select(root, key), False)
    ConfigStore.instance().store(name=f"base_{name}", node=root)


def roots() -> tuple[type, ...]:
    """Schemas of the root configurations, of the commands that were imported."""
    return tuple(_ROOTS)


PLACES = (
    "data.path",
    "data.root",
    "data.cache",
    "data.synsets",
    "paths.output",
    "paths.cache",
    "teacher.path",
    "model.path",
    "metrics.weights",
)
"""Settings that name a file or a folder outside the run's own."""


def located(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with absolute `PLACES`, so that they mean the same from every folder; `~` stays, and the id of a hub too."""
    for place in PLACES:
        group, _, name = place.partition(".")
        node = values.get(group)
        path = node.get(name) if isinstance(node, dict) else None
        hub = place in ("teacher.path", "model.path", "data.path") and isinstance(path, str) and not Path(path).exists()
        if isinstance(path, str) and path and not path.startswith("~") and not hub:
            node[name] = str(Path(path).absolute())  # type: ignore[index]
    return values


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A root configuration as dicts and lists, every interpolation resolved, every place absolute.

    Raises:
        MissingMandatoryValue: a value is missing.
    """
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return located({str(k): v for k, v in values.items()})  # type: ignore[union-attr]


def schema_of(group: str, node: Any) -> type | None:
    """The schema that checks a node of an open group: that of its `_target_`; None where it names the user's own code."""
    known, own, target = SCHEMAS[group].values(), OmegaConf.get_type(node), node.get("_target_")
    if own in known and target in (None, getattr(own, "_target_", None)):
        return own
    return next((schema for schema in known if getattr(schema, "_target_", None) == target), None)


def defaults_of(schema: Any) -> dict[str, Any]:
    """The default values of a settings class, as plain data; fields without one are left out."""
    found = {}
    for f in fields(schema):
        if f.default_factory is not NO_DEFAULT:
            value = f.default_factory()
            found[f.name] = asdict(value) if hasattr(value, "__dataclass_fields__") else value
        elif f.default is not NO_DEFAULT:
            found[f.name] = f.default
    return found


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Settings that make another result and are not left at their defaults: what tells two jobs of a sweep apart.

    Paths, logger and threads make no other result, so a job finds its folder again from another machine or launcher; and a
    setting that a later version adds does not rename the folders of this one.
    """
    values, defaults = located(settings_of(cfg, [f.name for f in fields(TrainConfig)])), defaults_of(TrainConfig)
    values["trainer"]["threads"] = defaults["trainer"]["threads"]
    found: dict[str, Any] = {}
    for name, value in values.items():
        schema, default = schema_of(name, cfg[name]) if name in SCHEMAS else None, defaults.get(name)
        if isinstance(value, dict):
            default = {**defaults_of(schema), "_target_": None} if schema else default or {}
            value, default = {key: v for key, v in value.items() if key not in default or v != default[key]}, {}
        if name not in MAY_CHANGE and value != default:
            found[name] = value
    return found


def settings_of(cfg: DictConfig, names: Iterable[str]) -> dict[str, Any]:
    """Some nodes of `cfg` as plain data, resolved within the whole."""
    return {
        name: OmegaConf.to_container(cfg[name], resolve=True) if OmegaConf.is_config(cfg[name]) else cfg[name] for name in names
    }


def run_name(cfg: DictConfig) -> str:
    """See `naming.run_name`."""
    return naming.run_name(settings_of(cfg, ("quant", "taq", "nem", "sampler", "seed")))


def job_name(cfg: DictConfig) -> str:
    """See `naming.job_name`."""
    return naming.job_name(settings_of(cfg, ("quant", "taq", "nem", "sampler", "seed", "tags")), identity(cfg))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def scratch() -> str:
    """A folder for what Hydra writes where a command leaves nothing; it is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="qdm_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def register() -> None:
    """Tell Hydra's ConfigStore the schemas and OmegaConf the resolvers; importing this module has done it."""
    register_root("train", TrainConfig)
    store = ConfigStore.instance()
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"base_{name}", node=schema)
    resolvers: dict[str, Any] = {
        "run_name": lambda _root_: run_name(_root_),
        "job_name": lambda _root_: job_name(_root_),
        "new_run": lambda new, _root_: str(Path(_root_.run or new).expanduser().absolute()),
        "unless_float": lambda value, other, _root_: other if naming.is_teacher(settings_of(_root_, ["quant"])) else value,
        "cores": cores,
        "scratch": scratch,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(f"qdm.{name}", resolver, replace=True)


register()
