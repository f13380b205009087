"""Finished runs as report.html, results.csv and results.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qdm_lightning.base import checks
from qdm_lightning.base.files import write_whole
from qdm_lightning.reporting.collect import collect
from qdm_lightning.reporting.html import page
from qdm_lightning.reporting.summary import summarize
from qdm_lightning.reporting.tables import csv_text, markdown


def write_report(folders: Sequence[Path], out: Path | None = None, baseline: str | None = None) -> tuple[str, list[Path]]:
    """Write the report into `out`, or into the first folder. Nothing is trained or sampled.

    Args:
        folders: runs, or folders of runs.
        out: folder, which is made if it is not there.
        baseline: a cell's label, or a method that is taken at equal bits; None takes `none` at equal bits.

    Returns:
        The Markdown, and the files that were written.

    Raises:
        FileNotFoundError: a folder that is not there, or none with a finished run.
        ValueError: a damaged record, no cell of that name, or `out` is no folder; nothing was written then.
        OSError: the files cannot be written.
    """
    if out is not None:
        checks.folder("out", str(out))
    contents = collect(folders)
    groups, notes = summarize(contents.results, baseline)
    contents.notes += notes
    text = checks.visible(markdown(groups, contents))  # names come out of files; the page escapes them itself
    files = {"report.html": page(groups, contents), "results.csv": checks.visible(csv_text(groups)), "results.md": text}
    for name, content in files.items():
        write_whole((out or folders[0]) / name, content.encode("utf-8"), checksum=False)
    return text, [(out or folders[0]) / name for name in files]
