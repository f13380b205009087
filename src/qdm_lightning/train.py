"""`python -m qdm_lightning.train`: a teacher, its quantized student, and a measurement of both.

`train(["quant=w3a3"])` is the same from Python: what would be typed, as a list. `qdm_lightning.run_training` is this function.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
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
    """Print what a run came to, and what to type next: `typed`, its overrides, stay; None says nothing of them (`run=`)."""
    from qdm_lightning.display.progress import print_closing

    command = "python -m qdm_lightning.train"

    def again(gone: tuple[str, ...], *instead: str) -> str:
        kept = [word for word in typed or () if not word.lstrip("+").startswith(("hydra", *gone))]
        return shlex.join([*command.split(), *kept, *instead])

    following = [(f"{command} --help", "everything else")]
    if "student" not in result.metrics:
        following = [(f"{command} teacher=checkpoint teacher.path={result.run_dir}", "a student of this teacher")]
    elif typed is not None:
        following[:0] = [
            (again(("taq", "nem"), "taq=off", "nem=off"), "the same student without TaQ and NeM, same teacher"),
            (again(("quant=",), "quant=w3a3"), "fewer bits, same teacher"),
        ]
    print_closing(result.metrics, result.run_dir, following)


def main() -> None:
    """Console script `qdm-train`."""
    Training("train", EXAMPLES, show).main()


if __name__ == "__main__":
    main()
