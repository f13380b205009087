"""`python -m qdm_lightning.sample`: pictures of chosen seeds. Image i is the same whatever other seeds are asked for.

`sample(run, ["seeds=0-63"])` is the same from Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qdm_lightning.cli.earlier_run import RunCommand, RunConfig
from qdm_lightning.evaluation.spec import SampleConfig

if TYPE_CHECKING:
    from qdm_lightning.evaluation.sample import Pictures

EXAMPLES = (
    ("run=outputs/NAME seeds=0-63", "64 pictures of the student and a grid"),
    ("run=outputs/NAME seeds=[7,100-120] sampler.steps=10 out=pictures", "chosen seeds, fewer steps, a folder of your own"),
    ("run=outputs/NAME seeds=0-3 trajectory=true", "and their way through the steps, teacher above student"),
    ("run=outputs/NAME seeds=0-49999 shard=3/8", "the third of eight jobs"),
    ("file=student.onnx runtime=openvino", "from an exported file, without the run"),
)
"""For `--help`: arguments, and what they do."""


@dataclass(kw_only=True)
class SampleRootConfig(RunConfig, SampleConfig):
    """Root of `conf/sample.yaml`."""


def do(experiment: Any, settings: SampleRootConfig, progress: Any) -> Pictures:
    """Draw with the run's network, or with an exported file; see `evaluation.sample.draw_pictures`."""
    from qdm_lightning.evaluation.sample import draw_pictures

    if settings.file is None:
        from qdm_lightning.evaluation.subject import Subject

        return draw_pictures(Subject.restored(experiment, settings), settings, progress)
    import torch

    from qdm_lightning.evaluation.exported import ExportedSubject

    if settings.threads:
        torch.set_num_threads(settings.threads)
    return draw_pictures(ExportedSubject.opened(settings, settings.sampler), settings, progress)


def stored(model: str) -> dict[str, Any]:
    """What an exported file says in the place of a run's configuration."""
    from qdm_lightning.runtimes.files import read_exported

    return {"sampler": read_exported(model).metadata["sampler"]}


def show(result: Pictures, settings: SampleRootConfig) -> None:
    """Print where the pictures are, and what to type next."""
    from qdm_lightning.display.progress import following_lines

    print(f"{result.drawn} pictures drawn, {result.present} were there: {result.folder}")
    if result.grid is not None:
        print(f"grid: {result.grid}")
    if settings.run is not None:
        print("\n".join(following_lines([(f"python -m qdm_lightning.evaluate run={settings.run}", "the run's scores")])))


sample = RunCommand("sample", SampleRootConfig, do, show, EXAMPLES, from_file=stored)
main = sample.main

if __name__ == "__main__":
    main()
