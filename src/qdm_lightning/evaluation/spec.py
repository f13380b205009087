"""Settings of `evaluate` and `sample`, and what every command has that restores a network of a run. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from qdm_lightning.base.checks import at_least, between, folder, one_of
from qdm_lightning.diffusion.spec import SEEDS
from qdm_lightning.quantization.spec import EXECUTIONS
from qdm_lightning.runtimes.spec import RUNTIMES, runtime_of
from qdm_lightning.training.spec import MOST_THREADS

SCORES = ("fd", "fd_inf", "is", "kid", "kid_all", "prc", "dc", "cmmd")
"""Frechet distance, extrapolated to infinitely many images, Inception Score, kernel distance over subsets and over all images,
precision and recall, density and coverage, CMMD."""

MOST_REPEATS = 100

MOST_SEEDS = 10_000_000


def parse_seeds(value: Any) -> list[int]:
    """Seeds of images, in the order given: an integer, `first-last` (both included), or a list of these.

    Raises:
        ValueError: not of that form, none or too many, a seed outside [0, 2^32), or one given twice.

    >>> parse_seeds("0-3,9"), parse_seeds(5), parse_seeds([7, "1-2"])
    ([0, 1, 2, 3, 9], [5], [7, 1, 2])
    """
    seeds: list[int] = []
    for part in ",".join(map(str, value if isinstance(value, list | tuple) else [value])).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last:
            raise ValueError(f"seeds={value} is not understood at {part!r}: write seeds=0-63, or seeds=[0-63,100]")
        if last >= SEEDS or last - first >= MOST_SEEDS - len(seeds):
            raise ValueError(f"seeds={value}: seeds lie in [0, {SEEDS - 1}], at most {MOST_SEEDS:,} of them")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        twice = next(a for a, b in pairwise(sorted(seeds)) if a == b)
        raise ValueError(f"seeds={value} has {twice} twice: one seed is one image")
    return seeds


def parse_labels(value: Any) -> list[int] | None:
    """Class labels: an integer or a list of them; None is none.

    Raises:
        ValueError: anything else.

    >>> parse_labels(3), parse_labels([3, 1, 3]), parse_labels(None)
    ([3], [3, 1, 3], None)
    """
    if value is None:
        return None
    labels = list(value) if isinstance(value, list | tuple) else [value]
    if not labels or any(type(label) is not int for label in labels):
        raise ValueError(f"class_labels={value} is not understood: write class_labels=3, or class_labels=[3,5]")
    return labels


def listed(value: Any) -> list[str]:
    """One or several names as a list; None is none.

    >>> listed(None), listed("a"), listed(["a", "b"])
    ([], ['a'], ['a', 'b'])
    """
    return [] if value is None else [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def format_seeds(seeds: Sequence[int]) -> str:
    """The shortest text that `parse_seeds` reads back.

    >>> format_seeds([0, 1, 2, 3, 9, 7])
    '0-3,9,7'
    """
    # within a run of consecutive seeds, seed minus position is the same
    runs = [[seed for _, seed in run] for _, run in groupby(enumerate(seeds), lambda item: item[1] - item[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def parse_shard(value: str | None) -> slice:
    """What the shard `k/n` takes of a list, every n-th item from the k-th on; None takes all of it.

    Raises:
        ValueError: not of that form, or k outside 1..n.

    >>> list(range(20))[parse_shard("3/8")], list(range(3))[parse_shard(None)]
    ([2, 10, 18], [0, 1, 2])
    """
    match = re.fullmatch(r"(\d+)/(\d+)", "1/1" if value is None else str(value))
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard={value} is not allowed: write shard=k/n with k in 1..n, for example shard=3/8")
    return slice(int(match[1]) - 1, None, int(match[2]))


def checked(default: Any, check: Callable[..., object], **how: Any) -> Any:
    """A setting of which `check(name, value, **how)` raises an error where a value other than the default is bad."""
    return field(default=default, metadata={"check": partial(check, **how)})


@dataclass(kw_only=True)
class RestoreConfig:
    """Which network of a run, and where it computes.

    Args:
        network: `student` or `teacher`; None takes the student where the run has one.
        weights: the student's weights, `ema` (what a run measures at its end) or `raw` (as the optimizer left them).
        checkpoint: the student's checkpoint, `best`, `last`, or a .ckpt file.
        accelerator: as in `lightning.Trainer`.
        threads: CPU threads of torch; None as the run was trained (0: torch's own choice). Changes the last bits of an image.
        compile: compile fake quantization? `auto`, `on`, `off`; None as the run was trained. Changes the last bits of an image.
        execution: the student's quantization `simulated` in float, or `integer`: on integer codes, on the CPU.
    """

    network: str | None = checked(None, one_of, allowed=("student", "teacher"))
    weights: str = checked("ema", one_of, allowed=("ema", "raw"))
    checkpoint: str = "best"
    accelerator: str = checked("auto", one_of, allowed=("auto", "cpu", "gpu", "cuda", "mps"))
    threads: int | None = checked(None, between, low=0, high=MOST_THREADS)
    compile: str | None = checked(None, one_of, allowed=("auto", "on", "off"))
    execution: str = checked("simulated", one_of, allowed=EXECUTIONS)

    def __post_init__(self) -> None:
        for setting in fields(self):
            if "check" in setting.metadata and getattr(self, setting.name) != setting.default:
                setting.metadata["check"](setting.name, getattr(self, setting.name))
        if self.checkpoint not in ("best", "last") and not Path(self.checkpoint).expanduser().is_file():
            raise FileNotFoundError(f"checkpoint={self.checkpoint}: no such file; type checkpoint=best, last, or a .ckpt file")


@dataclass(kw_only=True)
class SubjectConfig(RestoreConfig):
    """A network of a run, or a file that `python -m qdm_lightning.export` made of one.

    Args:
        file: .onnx or .xml; None takes the run's own network.
        runtime: executes the file, `onnxruntime` or `openvino`; None takes that of its format. Changes last bits of images.
        class_labels: of a class-conditional network: one class for all images, or a list from which the image of seed s takes
            number s modulo its length; None takes all classes in this way.
    """

    file: str | None = None
    runtime: str | None = checked(None, one_of, allowed=tuple(RUNTIMES))
    class_labels: Any = field(default=None, metadata={"check": lambda name, value: parse_labels(value)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file is None:
            if self.runtime is not None:
                raise ValueError(f"runtime={self.runtime} executes an exported file: type file=FILE too, or leave it out")
            return
        of_run = {name: getattr(self, name) for name in ("network", "weights", "checkpoint", "compile", "execution")}
        for setting in fields(RestoreConfig):
            if of_run.get(setting.name, setting.default) != setting.default:
                raise ValueError(f"{setting.name}={of_run[setting.name]} chooses within a run, file={self.file} is one network")
        if self.class_labels is not None:
            raise ValueError(f"class_labels={self.class_labels} is not for file={self.file}: an exported network takes none")
        if self.accelerator not in ("auto", "cpu"):
            raise ValueError(f"accelerator={self.accelerator} is not allowed with file=: the runtimes run on the CPU")
        self.runtime = runtime_of(self.file, self.runtime)


@dataclass(kw_only=True)
class EvaluationConfig(SubjectConfig):
    """One evaluation: how many images of which seeds, which scores, and this process's share of the work.

    Args:
        num_samples: images; None takes the number of `seeds`, or else the run's own.
        seed: images 0..num_samples-1 of this run seed (see `image_seeds`); None takes the run's own.
        seeds: the images' own seeds instead, `0-49999` or a list.
        repeats: score so many disjoint sets of `num_samples` images: mean, and its 95 % interval.
        shard: `k/n`: do the k-th of n shares, score nothing. The command without it does what is missing, then scores.
        merge: score what is there; an error where an image is missing.
        devices: processes that share the work, each with a device of its own.
        chunk: images in one file, a multiple of `sampler.batch_size`; None: the least one from 64 up.
        keep_images: keep the images beside their features, so that other scores need no new images.
        scores: one or several of `SCORES`; None takes all that the images and the network allow.
        reference: statistics of the real images (.npz with `mu` and `sigma`) instead of the run's training images.
        against: one or several folders of runs or of evaluations that share the closing table.
        force: put results of different protocols into one table all the same.
        out: folder of the result; None makes one below `<run>/evaluations`.
    """

    num_samples: int | None = checked(None, between, low=2, high=MOST_SEEDS)
    seed: int | None = checked(None, between, low=0, high=SEEDS - 1)
    seeds: Any = None
    repeats: int = checked(1, between, low=1, high=MOST_REPEATS)
    shard: str | None = checked(None, lambda name, value: parse_shard(value))
    merge: bool = False
    devices: int = checked(1, between, low=1, high=MOST_THREADS)
    chunk: int | None = None
    keep_images: bool = True
    scores: Any = None
    reference: str | None = None
    against: Any = None
    force: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = None if self.seeds is None else len(parse_seeds(self.seeds))
        if self.out is not None:
            folder("out", self.out)
        both = f"num_samples={self.num_samples}, but seeds={self.seeds} are {count} images: leave out one of them"
        refused = {
            f"seeds={self.seeds} is one image: scores need at least 2, for example seeds=0-49999": count == 1,
            "against=[] names no run: leave it out": self.against is not None and not listed(self.against),
            both: count is not None and self.num_samples not in (None, count),
            "seed= picks the images of a run seed, seeds= names the images themselves: leave out one of them": (
                self.seeds is not None and self.seed is not None
            ),
            f"repeats={self.repeats} takes the images of a run seed, seeds= names them: leave out one of them": (
                self.seeds is not None and self.repeats > 1
            ),
            "devices= shares work among processes, each of which would need the file: leave it out with file=": (
                self.file is not None and self.devices > 1
            ),
            "merge=true scores what all shards left: leave out shard=": self.merge and self.shard is not None,
            f"scores=[] asks for nothing: choose from {', '.join(SCORES)}": self.scores is not None and not listed(self.scores),
        }
        for message, applies in refused.items():
            if applies:
                raise ValueError(message)
        for score in listed(self.scores):
            one_of("scores", score, SCORES)
        if self.reference is not None and not Path(self.reference).expanduser().is_file():
            raise FileNotFoundError(f"reference={self.reference}: no such file; an .npz with arrays mu and sigma is wanted")

    def images_per_file(self, batch_size: int) -> int:
        """`chunk`, or its default. Raises ValueError unless it is a multiple of `batch_size`."""
        chunk = -(-64 // batch_size) * batch_size if self.chunk is None else self.chunk
        if chunk < 1 or chunk % batch_size:
            raise ValueError(f"chunk={chunk} is not allowed: a multiple of sampler.batch_size={batch_size} is wanted")
        return chunk


@dataclass(kw_only=True)
class SampleConfig(SubjectConfig):
    """Pictures of chosen seeds.

    Args:
        seeds: the images' own seeds, `0-63` or a list.
        shard: `k/n`: draw the k-th of n shares alone; the command without it draws what is missing, and the grid.
        trajectory: also draw x_t and the predicted x_0 over the steps, teacher above student.
        trajectory_seeds: how many of the seeds get such a picture.
        out: folder of the pictures; None makes one below `<run>/images`.
    """

    seeds: Any = field(default="0-63", metadata={"check": lambda name, value: parse_seeds(value)})
    shard: str | None = checked(None, lambda name, value: parse_shard(value))
    trajectory: bool = False
    trajectory_seeds: int = checked(4, at_least, minimum=1)
    out: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None:
            folder("out", self.out)
