"""`python -m qdm_lightning.export`: a student as one file that ONNX Runtime or OpenVINO executes on integers.

`export(run, ["format=openvino"])` is the same from Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qdm_lightning.cli.earlier_run import RunCommand, RunConfig
from qdm_lightning.exporting.spec import ExportConfig

if TYPE_CHECKING:
    from qdm_lightning.exporting.export import Export

EXAMPLES = (
    ("run=outputs/NAME", "the student as outputs/NAME/export/student.onnx, checked in the runtimes that are installed"),
    ("run=outputs/NAME format=openvino out=student.xml", "OpenVINO's own format, a file of your own"),
    ("run=outputs/NAME network=teacher", "the full-precision teacher"),
)
"""For `--help`: arguments, and what they do."""


@dataclass(kw_only=True)
class ExportRootConfig(RunConfig, ExportConfig):
    """Root of `conf/export.yaml`."""


def do(*arguments: Any) -> Export:
    """See `exporting.export.export`."""
    from qdm_lightning.exporting.export import export

    return export(*arguments)


def show(result: Export, settings: ExportRootConfig) -> None:
    """Print what was written, how it was checked, and what to type next."""
    from qdm_lightning.display.progress import following_lines

    print(f"written: {result.file}, {result.size / 1e6:.2f} MB")
    for one in result.metadata["verified"]:
        print(
            f"{one['runtime']}: {one['int8']} products on integers, {one['floating']} in float; from equal codes they deviate "
            f"by at most {one['products']:.1e} of their greatest output; {one['codes']:.1e} of the codes differ"
        )
    if result.metadata["network"] == "student" and result.floating:
        print(f"left in float by the run's settings: {', '.join(result.floating)}")
    commands = [
        (f"python -m qdm_lightning.sample file={result.file}", "pictures from the file"),
        (f"python -m qdm_lightning.evaluate run={settings.run} file={result.file}", "its scores"),
    ]
    print("\n".join(following_lines(commands)))


export = RunCommand("export", ExportRootConfig, do, show, EXAMPLES)
main = export.main

if __name__ == "__main__":
    main()
