"""`python -m qdm_lightning.report DIR... [--baseline LABEL] [--out DIR]`: finished runs as results.md and results.csv.

DIR is a run, or a folder of runs such as a sweep's. Runs that differ in their seed alone make one row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from qdm_lightning.config import CONFIG_FILE
from qdm_lightning.reporting.summary import Run, cells, flatten, markdown, write_csv


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Finished runs in and below `folders`.

    Raises:
        FileNotFoundError: a folder that is not there, or none with a finished run.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give a run, or a folder of runs such as outputs/..._sweep")
        for path in sorted(folder.rglob("metrics.json")):
            if (path.parent / CONFIG_FILE).is_file():
                settings = flatten(OmegaConf.to_container(OmegaConf.load(path.parent / CONFIG_FILE), resolve=False))
                runs.append(Run(path.parent, settings, json.loads(path.read_text("utf-8"))))
    if not runs:
        raise FileNotFoundError(f"no finished run (a folder with metrics.json) below {', '.join(map(str, folders))}")
    return runs


def report(folders: Sequence[Path], out: Path, baseline: str | None = None) -> str:
    """Write results.md and results.csv into `out`; returns the Markdown.

    Raises:
        FileNotFoundError: see `find_runs`.
        ValueError: no cell has the baseline's label.
    """
    found = cells(find_runs(folders))
    chosen = next((cell for cell in found if cell.label == baseline), None)
    if baseline and chosen is None:
        raise ValueError(f"--baseline {baseline!r} is no row: choose one of {', '.join(repr(cell.label) for cell in found)}")
    text = markdown(found, chosen)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(text, "utf-8")
    write_csv(out / "results.csv", found)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(prog="python -m qdm_lightning.report", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--baseline", metavar="LABEL", help="row to which the others' differences are taken, paired by seed")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the first DIR)")
    options = parser.parse_args(argv)
    try:
        print(report(options.folders, options.out or options.folders[0], options.baseline), end="")
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
