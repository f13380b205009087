"""`python -m qdm_lightning.train`: a teacher, its quantized student, and a measurement of both.

`train(["quant=w3a3"])` is the same from Python: what would be typed, as a list. `qdm_lightning.run_training` is this function.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qdm_lightning.cli.training import Training, train

if TYPE_CHECKING:
    from qdm_lightning.training.run import Result

__all__ = ["EXAMPLES", "main", "train"]

EXAMPLES = (
    ("(nothing)", "the W4A4 student with TaQ and NeM on the embedded digits, minutes on a CPU"),
    ("quant=w3a3 seed=1", "fewer bits, another seed; the teacher is shared"),
    ("experiment=digits_baseline", "the same budget without TaQ and NeM"),
    ("data=images data.path=DIR data.image_size=16 model=unet_small", "your own pictures"),
    ("teacher=pretrained teacher.path=DIR", "a diffusers folder as teacher"),
    ("quant=fp32", "a teacher alone"),
    ("-m seed=0,1,2 quant=w4a4,w3a3", "six runs; hydra.sweep.dir=DIR gives them a folder, where the same command goes on"),
    ("-m experiment=ablation/taq_nem seed=0,1,2 hydra/launcher=joblib", "a table of the paper, a job for each core"),
    ("run=outputs/NAME", "go on with an interrupted run"),
    ("debug=trial", "the whole way with two steps and 16 images: does everything work?"),
)
"""For `--help`: arguments, and what they do."""


def show(result: Result, typed: Sequence[str] | None = None) -> None:
    """Print what a run came to, and what to type next: `typed`, its flags and overrides, stay; None: they are not known."""
    from qdm_lightning.display.progress import print_closing

    command, words = "python -m qdm_lightning.train", [word for word in typed or () if not word.startswith("hydra")]

    def again(kept: Callable[[str], bool], *instead: str) -> str:
        return shlex.join([*command.split(), *(word for word in words if kept(word.lstrip("+"))), *instead])

    following = [(f"{command} --help", "everything else")]
    if "student" not in result.metrics:
        images = ("--", "data", "model", "diffusion", "metrics")
        teacher = again(lambda word: word.startswith(images), "teacher=checkpoint", f"teacher.path={result.run_dir}")
        following = [(teacher, "a student of this teacher")]
    elif typed is not None:
        baseline = again(lambda word: not word.startswith(("taq", "nem")), "taq=off", "nem=off")
        fewer = again(lambda word: not word.startswith("quant="), "quant=w3a3")
        following[:0] = [
            *([] if {"taq=off", "nem=off"} <= {*words} else [(baseline, "the same student without TaQ and NeM, same teacher")]),
            *([] if "quant=w3a3" in words else [(fewer, "fewer bits, same teacher")]),
        ]
    print_closing(result.metrics, result.run_dir, following)


def main() -> None:
    """Console script `qdm-train`."""
    Training("train", EXAMPLES, show).main()


if __name__ == "__main__":
    main()
