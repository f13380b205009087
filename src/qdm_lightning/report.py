"""`python -m qdm_lightning.report DIR... [out=DIR] [baseline=CELL]`: finished runs as report.html, results.md and results.csv.

`report(folders, out, baseline)` is the same from Python. Nothing is trained or sampled, and torch is not loaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qdm_lightning.base.checks import UserError
from qdm_lightning.cli.schema import CONF_DIR

BAD_INPUT = 2
FILES = ("report.html", "results.csv", "results.md")
HELP = """\
Finished runs as one HTML file and as tables: mean, deviation and 95 % interval over seeds, differences to a baseline.

usage: python -m qdm_lightning.report DIR... [out=DIR] [baseline=CELL]

  DIR            a run, or a folder of runs such as a sweep's; runs that differ in their seed alone are one cell
  out=DIR        where report.html, results.csv and results.md are written; the first DIR when not given
  baseline=CELL  what differences are taken to, paired by seed: a cell (baseline='w4a4 TaQ'), or a method at the same bits
                 (baseline=NeM); without it the cell of the same bits that has neither TaQ nor NeM

Examples (after python -m qdm_lightning.report):
  outputs/SWEEP                       the table and the page of a sweep, in its folder
  outputs/SWEEP outputs/OTHER out=r   two sweeps in one report, written into r
  outputs/SWEEP baseline=TaQ          what NeM adds to TaQ

Results of different protocols (images, feature network, sampler, real data) stand in tables of their own, jobs that failed
or did not finish are listed, and evaluations of a run (python -m qdm_lightning.evaluate) are taken in beside its own."""


@dataclass(frozen=True)
class Arguments:
    """What was typed."""

    folders: list[Path]
    out: Path | None = None
    baseline: str | None = None


def parse(words: Sequence[str]) -> Arguments:
    """Folders and settings. Raises UserError at anything else."""
    folders, settings = [], {}
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            raise UserError(f"{word} is not understood: type folders, out=<folder> or baseline=<cell>; --help says more")
        if not (equals and re.fullmatch(r"\w+", name)):
            folders.append(Path(word).expanduser())
            continue
        if name not in ("out", "baseline"):
            raise UserError(f"{name} is not a setting: there are out=<folder> and baseline=<cell> (a folder: ./{word})")
        if not value or name in settings:
            raise UserError(
                f"{name}= needs one value, and is given once: for example {name}={'report' if name == 'out' else 'NeM'}"
            )
        settings[name] = value
    if not folders:
        raise UserError("no folder is given: type python -m qdm_lightning.report outputs/SWEEP; --help says more")
    out = Path(settings["out"]).expanduser() if "out" in settings else None
    return Arguments(folders, out, settings.get("baseline"))


def report(folders: Sequence[Path], out: Path | None = None, baseline: str | None = None) -> str:
    """Write report.html, results.csv and results.md into `out`, or into the first folder; returns the Markdown.

    Args:
        folders: runs, or folders of runs.
        baseline: a cell's label, or a method that is taken at equal bits; None takes `none` at equal bits.

    Raises:
        FileNotFoundError: a folder that is not there, or none with a finished run.
        ValueError: a damaged record, or no cell of that name; nothing was written then.
        OSError: the files cannot be written.
    """
    from qdm_lightning.base.files import write_whole
    from qdm_lightning.reporting.collect import collect
    from qdm_lightning.reporting.html import page
    from qdm_lightning.reporting.summary import summarize
    from qdm_lightning.reporting.tables import csv_text, markdown

    target = out or folders[0]
    if out is not None and any(path.is_file() for path in (out, *out.parents)):
        raise NotADirectoryError(f"out={out} is no folder: give one, or a name that is free")
    found = collect(folders, _load)
    groups, notes = summarize(found.results, _variants(), baseline)
    found.notes += notes
    text = markdown(groups, found)
    contents = (page(groups, found), csv_text(groups), text)
    for name, content in zip(FILES, contents, strict=True):
        write_whole(target / name, content.encode("utf-8"))
    return text


def _load(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


def _variants() -> dict[str, str]:
    """Classes of TaQ to the names of their options."""
    files = sorted((CONF_DIR / "taq").glob("*.yaml"))
    return {str(target): file.stem for file in files if (target := _load(file).get("_target_"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line on stderr for bad input."""
    words = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(words):
        print(HELP)
        return 0
    try:
        arguments = parse(words)
        print(report(arguments.folders, arguments.out, arguments.baseline), end="")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    folder = arguments.out or arguments.folders[0]
    print("\nwritten: " + ", ".join(str(folder / name) for name in FILES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
