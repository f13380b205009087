"""`python -m qdm_lightning.report DIR... [out=DIR] [baseline=CELL]`: finished runs as report.html, results.md and results.csv.

`reporting.write.write_report` is the same from Python. Nothing is trained or sampled, and torch is not loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from qdm_lightning.base.checks import UserError, one_line, visible
from qdm_lightning.base.pipes import while_read

HELP = """\
Finished runs as one HTML file and as tables: mean, std and 95 % interval over seeds, differences to a baseline.

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


EXAMPLES = {"out": "report", "baseline": "NeM"}
"""Settings, with a value for each."""


def parse(words: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Folders, and settings by name. Raises UserError at anything else."""
    folders, settings = [], dict[str, str]()
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            raise UserError(f"{word} is not understood: type folders, out=<folder> or baseline=<cell>; --help says more")
        if not (equals and name.isidentifier()):
            folders.append(Path(word).expanduser())
        elif name not in EXAMPLES:
            raise UserError(f"{name} is not a setting: there are out=<folder> and baseline=<cell> (a folder: ./{word})")
        elif not value or name in settings:
            raise UserError(f"{name}= needs one value, and is given once: for example {name}={EXAMPLES[name]}")
        else:
            settings[name] = value
    if not folders:
        raise UserError("no folder is given: type python -m qdm_lightning.report outputs/SWEEP; --help says more")
    return folders, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line on stderr for bad input."""
    words = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(words):
        with while_read():
            print(HELP)
        return 0
    try:
        folders, settings = parse(words)
        from qdm_lightning.reporting.write import write_report  # takes a second to load, which bad input need not wait for

        out = Path(settings["out"]).expanduser() if "out" in settings else None
        text, files = write_report(folders, out, settings.get("baseline"))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    with while_read():
        print(visible(text) + "\nwritten: " + visible(", ".join(map(str, files))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
