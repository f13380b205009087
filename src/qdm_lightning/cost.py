"""`python -m qdm_lightning.cost`: what a student costs, layer by layer, before it is trained.

`cost(cfg)` is the same from Python; `quantization.cost.cost(model, ...)` counts any module.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.base.files import write_whole
from qdm_lightning.cli import app as cli
from qdm_lightning.cli.build import build_student, plain
from qdm_lightning.cli.messages import explain, is_bad_input
from qdm_lightning.cli.schema import TrainConfig, root_node

if TYPE_CHECKING:
    from torch import nn

    from qdm_lightning.quantization.cost_report import CostReport

EXAMPLES = (
    ("model=unet_cifar10 quant=w4a4", "the paper's network: 6.222 GMACs an image and step"),
    ("model=unet_cifar10 quant.qkv_bits=8 quant.probs_bits=8", "7.78x: our reconstruction of the paper's 7.8x"),
    ("model=pretrained model.path=DIR quant=w3a3 json=cost.json", "a diffusers folder; the figures as plain data too"),
    ("-m quant=w8a8,w4a4,w2a2", "one after another"),
)
"""For `--help`: arguments, and what they do."""

CONVENTIONS = {
    "linear": "MACs x b/32, b the wider of a product's two operands",
    "bops": "MACs x b x b' against 32 x 32",
    "bops64": "bit operations / 64 + what stays float",
}
"""For the table: convention, and what it counts."""


@dataclass(kw_only=True)
class CostConfig(TrainConfig):
    """Root of `conf/cost.yaml`: a run's settings, of which `model`, `quant` and `taq` matter.

    Args:
        json: file for the figures as plain data; None writes none.
        image_shape: channels, height and width of the image that is counted; None takes what the model is made for.
    """

    json: str | None = None
    image_shape: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape(self.image_shape)


def check_shape(shape: Sequence[int] | None) -> None:
    """Raise ValueError unless `shape` is None or (channels, height, width)."""
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise ValueError(f"image_shape={list(shape)} is not allowed: give [channels,height,width], for example [3,32,32]")


def cost(cfg: DictConfig) -> CostReport:
    """Count what the student that `cfg` describes costs for one image and step.

    Args:
        cfg: composed from `conf/cost.yaml`, or `conf/train.yaml`.

    Raises:
        UserError: bad input.
    """
    import torch

    from qdm_lightning.quantization.cost import cost as count

    asked = cfg.get("image_shape")
    try:
        build_model, quant, quantizers = build_student(cfg)
        model = build_model()
        inputs = (torch.zeros(1, *_image_shape(model, asked)), torch.zeros(1, dtype=torch.int64))
        return count(model, quant, inputs, quantizers=quantizers)
    except Exception as error:
        if asked is not None and type(error) is RuntimeError:
            raise UserError(f"image_shape={asked} does not fit the network: {error}") from error
        if is_bad_input(error):
            raise UserError(explain(error)) from error
        raise


def _image_shape(model: nn.Module, asked: Sequence[int] | None) -> tuple[int, ...]:
    if asked is not None:
        return tuple(asked)
    config: Any = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise UserError(
            f"{type(model).__name__} does not tell the size of its images: type image_shape=[channels,height,width]"
        )
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def _check() -> Callable[[DictConfig], None]:
    """The checks of a job; it remembers the files of a sweep's other jobs."""
    files: set[Path] = set()

    def check(cfg: DictConfig) -> None:
        if cfg.run is not None:
            raise UserError(f"run={cfg.run}: the cost of a run stands in its metrics.json; here, type the settings of one")
        check_shape(cfg.image_shape)
        build_student(cfg)
        if cfg.json is None:
            return
        file = Path(cfg.json).expanduser().resolve()
        if file.is_dir() or any(folder.is_file() for folder in file.parents):
            raise UserError(f"json={cfg.json} cannot be written: give the name of a file in a folder")
        if file in files:
            raise UserError(
                f"json={cfg.json} would hold the last job alone: name what differs, json='cost_${{quant.act_bits}}.json'"
            )
        files.add(file)

    return check


def _task(cfg: DictConfig) -> None:
    from qdm_lightning.display.progress import following_lines

    report = cost(cfg)
    _show(report)
    if cfg.json is not None:
        settings: dict[str, Any] = {name: plain(cfg[name]) for name in ("model", "quant", "taq")}
        settings["image_shape"] = None if cfg.image_shape is None else list(cfg.image_shape)
        file = Path(cfg.json).expanduser()
        try:
            write_whole(file, (json.dumps(report.as_dict() | settings, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"json={cfg.json} cannot be written: {error.strerror}") from error
        print(f"written: {file}")
    following = [("python -m qdm_lightning.train", "with the same overrides, but json= and image_shape=, trains that student")]
    print("\n".join(following_lines(following)))


def _show(report: CostReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    head, body, total = report.cells()
    table = Table(box=box.SIMPLE, show_footer=True)
    for index, (name, footer) in enumerate(zip(head, total, strict=True)):
        table.add_column(name, footer, justify="left" if index < 2 else "right", overflow="fold")
    for line in body:
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or pipe has no width of its own
    console.print(table)
    kinds = ", ".join(f"{kind} {macs / 1e9:.3f}" for kind, macs in report.as_dict()["macs_by_kind"].items())
    smaller = report.float_bytes / report.bytes if report.bytes else 1
    lines = [
        f"an image and step: {report.macs / 1e9:.3f} GMACs ({kinds}), {report.parameters:,} parameters",
        f"stored: {report.bytes / 1e6:.2f} MB, in float32 {report.float_bytes / 1e6:.2f} MB, {smaller:.2f} times as much",
        "theoretical speed-up over float32, by convention:",
        *(f"  {name:6} {factor:6.2f}x  {CONVENTIONS[name]}" for name, factor in report.speedup().items()),
    ]
    console.print("\n".join(lines), markup=False, highlight=False)


@functools.cache
def _scratch() -> str:
    """A folder for what Hydra writes; it is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="qdm_cost_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


ConfigStore.instance().store(name="base_cost", node=root_node(CostConfig))
OmegaConf.register_new_resolver("qdm.scratch", _scratch, replace=True)


def main() -> None:
    """`python -m qdm_lightning.cost`."""
    cli.run("cost", _task, check=_check(), examples=EXAMPLES)


if __name__ == "__main__":
    main()
