"""The typed schema of `conf/`: `TrainConfig` is the root of `conf/train.yaml`.

Nodes whose settings are ours are typed; a group whose options carry a `_target_` is open, and each of our options brings a
schema of its own (`base_<name>` in Hydra's ConfigStore). Imports no torch, so that help stays quick.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from qdm_lightning.base.checks import at_least, one_of
from qdm_lightning.data.spec import CelebAConfig, Cifar10Config, DigitsConfig, ImageNet64Config, ImagesConfig
from qdm_lightning.diffusion.spec import DiffusionConfig, NeMConfig, SamplerConfig
from qdm_lightning.metrics.spec import CustomMetric, DigitsMetric, InceptionMetric, ResNet20Metric
from qdm_lightning.models.spec import PretrainedConfig, UNetConfig
from qdm_lightning.quantization.spec import TAQ, QuantConfig
from qdm_lightning.training.spec import OptimizerConfig, PathsConfig, TeacherConfig, TrainerConfig


def _conf_dir() -> Path:
    """`conf/` inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parents[1] / "conf"


CONF_DIR = _conf_dir()


@dataclass(kw_only=True)
class WandbConfig:
    """`logger=wandb`: a W&B run beside the files of the run folder.

    Args:
        project, entity, tags: of the W&B run; the root's `tags` and what the run does (`bits:w4a4`) are added.
        name: of the W&B run; None takes the run folder's.
        group: of W&B runs; None takes the multirun's folder, if there is one.
        mode: `online`, `offline`, or None: online only if the user is logged in.
        artifacts: log the networks and evaluations as artifacts.
    """

    _target_: str = "qdm_lightning.loggers.wandb_logger"
    project: str = "qdm-lightning"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: str | None = None
    artifacts: bool = True

    def __post_init__(self) -> None:
        if self.mode is not None:
            one_of("logger.mode", self.mode, ("offline", "online"))


@dataclass(kw_only=True)
class TensorBoardConfig:
    """`logger=tensorboard`: an event file in `<run>/<folder>`.

    Raises:
        ValueError: tensorboard is not installed.
    """

    _target_: str = "qdm_lightning.loggers.tensorboard_logger"
    folder: str = "tensorboard"

    def __post_init__(self) -> None:
        if find_spec("tensorboard") is None:
            raise ValueError("logger=tensorboard needs tensorboard: pip install 'qdm-lightning[tensorboard]'")


@dataclass(kw_only=True)
class TrainConfig:
    """Root of `conf/train.yaml`.

    Args:
        seed: of training, and of the images that are compared.
        run: folder of an earlier run to go on with; nothing else may be given with it.
        num_samples: images behind each distance.
        tags: labels of the run, for the records.
    """

    seed: int = 0
    run: str | None = None
    num_samples: int = 1024
    tags: list[str] = field(default_factory=list)
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
        at_least("seed", self.seed, 0)
        at_least("num_samples", self.num_samples, 2)


SCHEMAS: dict[str, dict[str, type]] = {
    "data": {
        "digits": DigitsConfig,
        "images": ImagesConfig,
        "cifar10": Cifar10Config,
        "celeba": CelebAConfig,
        "imagenet64": ImageNet64Config,
    },
    "model": {"unet": UNetConfig, "pretrained": PretrainedConfig},
    "taq": dict(TAQ),
    "metrics": {
        "digits": DigitsMetric,
        "inception": InceptionMetric,
        "resnet20": ResNet20Metric,
        "custom": CustomMetric,
    },
    "logger": {"wandb": WandbConfig, "tensorboard": TensorBoardConfig},
}
"""Schemas of our options in the open groups: a YAML file takes one with `defaults: [base_<name>, _self_]`."""


def root_node(schema: type[TrainConfig]) -> DictConfig:
    """A root configuration of `schema`; any name may be added to its open nodes: no `+` to type."""
    root = OmegaConf.structured(schema)
    for node in (
        root.callbacks,
        root.quant.rules,
        root.quant.weight_quantizer,
        root.quant.act_quantizer,
        root.quant.calibrator,
    ):
        OmegaConf.set_struct(node, False)
    assert isinstance(root, DictConfig)
    return root


def register() -> None:
    """Tell Hydra's ConfigStore the schemas and OmegaConf the resolvers; importing this module has done it."""
    store = ConfigStore.instance()
    store.store(name="base_train", node=root_node(TrainConfig))
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"base_{name}", node=schema)
    OmegaConf.register_new_resolver("qdm.run_name", lambda _root_: run_name(_root_), replace=True)
    OmegaConf.register_new_resolver("qdm.job_name", lambda _root_: job_name(_root_), replace=True)
    OmegaConf.register_new_resolver("qdm.cores", cores, replace=True)
    OmegaConf.register_new_resolver(
        "qdm.unless_float", lambda value, other, _root_: other if _is_float(_root_) else value, replace=True
    )
    OmegaConf.register_new_resolver(
        "qdm.unless_trial", lambda value, other, _root_: other if _is_trial(_root_) else value, replace=True
    )
    OmegaConf.register_new_resolver("qdm.expanduser", lambda path: str(Path(path).expanduser()), replace=True)


TRIAL_STEPS = 1000
"""A run of fewer training steps is a trial: `${qdm.unless_trial:50000,16}` does not ask it for 50,000 images."""


def _is_trial(root: DictConfig) -> bool:
    return bool(root.trainer.max_steps < TRIAL_STEPS)


def _is_float(root: DictConfig) -> bool:
    """True where the run is a teacher, as `QuantConfig.is_float`, without the checks."""
    q = root.quant
    attention = q.act_bits if q.qkv_bits is None else q.qkv_bits
    return {q.weight_bits, q.act_bits, attention, q.probs_bits, q.first_last_bits, *q.rules.values()} == {32}


def _default_target(schema: type) -> str | None:
    return getattr(schema, "_target_", None)


def schema_of(group: str, node: DictConfig) -> type | None:
    """The schema that checks a node of an open group: that of its `_target_`; None where it names the user's own code."""
    target = None if OmegaConf.is_missing(node, "_target_") else node.get("_target_")
    own = OmegaConf.get_type(node)
    known = list(SCHEMAS[group].values())
    if own in known and (not target or target == _default_target(own)):
        return own
    return next((schema for schema in known if _default_target(schema) == target), None)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_name(cfg: DictConfig) -> str:
    """Short name of what a run does, such as `w4a4_normalize_replace_ddim50_seed0`; the same settings give the same name."""
    sampler, seed = f"{cfg.sampler.kind}{cfg.sampler.steps}", f"seed{cfg.seed}"
    widths = (cfg.quant.weight_bits, cfg.quant.act_bits)
    if widths == (32, 32):
        return f"fp32_{sampler}_{seed}"
    schema = schema_of("taq", cfg.taq)
    taq = next((name for name, s in SCHEMAS["taq"].items() if s is schema), None) or str(cfg.taq._target_).rpartition(".")[2]
    taq += "-all" if cfg.taq.get("scope") == "all" else ""
    nem = "ptq" if cfg.quant.mode == "ptq" else "on_policy" if cfg.nem.on_policy_fraction else cfg.nem.mode
    return f"w{widths[0]}a{widths[1]}_{taq}_{nem}_{sampler}_{seed}"


def job_name(cfg: DictConfig) -> str:
    """Name of a job's folder in its sweep: `run_name`, the last tag, and a hash of every setting that makes another result.

    Paths, logger and threads make no other one, so a job finds its folder again from another machine or launcher.
    """
    settings = {f.name: cfg[f.name] for f in fields(TrainConfig) if f.name not in ("run", "logger", "paths")}
    values: dict[str, Any] = {
        name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in settings.items()
    }
    values["trainer"].pop("threads")
    identity = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
    label = [re.sub(r"[^\w.=+-]+", "-", str(tag)) for tag in values["tags"][-1:]]
    return "_".join([run_name(cfg), *label, identity])


register()
