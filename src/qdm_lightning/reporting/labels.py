"""What a cell is called: bits, method, and the settings that tell it from the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qdm_lightning.quantization.spec import TAQ
from qdm_lightning.reporting.collect import Run

IGNORED = (
    *("seed", "run", "paths.", "logger.", "tags", "callbacks."),
    *("teacher.retrain", "trainer.threads", "data.cache", "data.verify"),
)
"""Beginnings of settings that do not make another cell."""

MEASURED = ("sampler.", "num_samples", "metrics.", "execution")
"""Beginnings of settings that belong to the protocol: they do not make another cell either."""

NONE = "none"
"""Method of a trained cell without TaQ and NeM."""

T = TypeVar("T")


def identity(data: Any) -> str:
    """A text that is the same for the same plain data."""
    return json.dumps(data, sort_keys=True, default=str)


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items by their key, in the order of first appearance."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def varying(runs: Sequence[Run], ignored: tuple[str, ...] = IGNORED) -> list[str]:
    """Settings that differ between the runs, `_target_`s first; those that begin with `ignored` are left out."""
    if all(run.settings.get("teacher.seed") == run.seed for run in runs):  # each seed its own teacher
        ignored = (*ignored, "teacher.seed")
    names = {name for run in runs for name in run.settings if not name.startswith(ignored)}
    return sorted((name for name in names if _differs(runs, name)), key=lambda name: (not name.endswith("_target_"), name))


def _differs(runs: Sequence[Run], name: str) -> bool:
    return len({identity(run.settings.get(name)) for run in runs}) > 1


def labels(runs: Sequence[Run]) -> dict[Path, tuple[str, str, str]]:
    """(bits, method, rest) by run folder: equal for the same cell, different for any two cells.

    `rest` names a setting only where bits, method and the settings before do not tell its values apart, and a `_target_` by its
    class alone where no other one is called so.
    """
    several = {name for name, variant in VARIANTS.items() if len({variant(run) for run in runs} - {""}) > 1}
    parts = {run.folder: [*_method(run, several), ""] for run in runs}
    for name in varying(runs, (*IGNORED, *MEASURED)):
        classes = [target.rpartition(".")[2] for target in {str(run.settings.get(name)) for run in runs}]
        for alike in grouped(runs, lambda run: tuple(parts[run.folder])).values():
            for run in alike if _differs(alike, name) else ():
                value = str(run.settings.get(name))
                short = value.rpartition(".")[2] if name.endswith("_target_") else value
                parts[run.folder][2] += f" {name.removesuffix('._target_')}={short if classes.count(short) == 1 else value}"
    return {folder: (bits, method, rest) for folder, (bits, method, rest) in parts.items()}


def _method(run: Run, several: Collection[str]) -> tuple[str, str]:
    """Bits and method (see `Cell`); variants are named for those of TaQ and NeM that have `several`."""
    weight, act = run.settings["quant.weight_bits"], run.settings["quant.act_bits"]
    if weight == act == 32:
        return "fp32", ""
    parts = ["PTQ"] if run.settings.get("quant.mode") == "ptq" else []
    parts += [f"{name}({variant(run)})" if name in several else name for name, variant in VARIANTS.items() if variant(run)]
    return f"w{weight}a{act}", "+".join(parts) or NONE


def _taq(run: Run) -> str:
    """The variant's name as it is typed, or its class; empty without one."""
    target = str(run.settings.get("taq._target_") or "")
    names = {getattr(kind, "_target_", ""): name for name, kind in TAQ.items() if name != "off"}
    return names.get(target, target.rpartition(".")[2])


def _nem(run: Run) -> str:
    """The mode, or `on policy`; empty without one, also where nothing is trained."""
    mode = "on policy" if run.settings.get("nem.on_policy_fraction") else str(run.settings.get("nem.mode", "off"))
    return "" if mode == "off" or run.settings.get("quant.mode") == "ptq" else mode


VARIANTS = {"TaQ": _taq, "NeM": _nem}
"""What a method is made of, and how the variant of a run is found."""
