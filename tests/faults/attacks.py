"""Hostile runs, students, networks, checkpoints, arrays, pictures and records, each tried with a command that reads it.

    python tests/faults/attacks.py [--keep FOLDER]

An attack is refused where nothing of its own ran, no process was started, no connection made, nothing written outside the run's
folder and the user's cache, and the command ended with status 2 and one line; where there is nothing to refuse (a name with
escapes, a stored cache elsewhere), the command may do its work instead.
"""

from __future__ import annotations

import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from attack_table import Attack, attacks
from forked import Answer, Sandbox, results

CONTROLS = {*range(32), *range(127, 160)} - {9, 10}
ALLOWED = ("git",)
"""Processes that our own records start: the commit of the checkout."""


def prepare(sandbox: Sandbox) -> None:
    """Nothing: each attack makes its own files."""


def attempt(attack: Attack, sandbox: Sandbox) -> dict[str, Any]:
    """Make the files, type the command, and say what came through, if anything."""
    folder, outside = sandbox.inputs / "attack", sandbox.inputs / "outside"
    for place in (folder, outside):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    attack.make(folder)
    names = {"{F}": str(folder), "{O}": str(outside)}
    words = attack.words
    for short, full in names.items():
        words = words.replace(short, full)
    typed = attack.call and partial(attack.call, folder)
    answer = sandbox.run(typed or attack.command, shlex.split(words), watched=True)
    faults = {
        "it ran": bool([*sandbox.root.rglob("canary*")]),
        f"started: {_started(answer)[:1]}": bool(_started(answer)),
        f"written: {_written(answer, sandbox)[:2]}": bool(_written(answer, sandbox)),
        f"status {answer.status}": answer.status != 2 and not (attack.harmless and answer.status == 0),
        f"{len(answer.err.splitlines())} lines": answer.status == 2 and len(answer.err.splitlines()) != 1,
        "Traceback": "Traceback" in answer.err,
        "advises weights_only=False": "weights_only" in answer.err.replace("weights_only=True", ""),
        "control characters": bool({*map(ord, answer.out + answer.err)} & CONTROLS),
    }
    sandbox.clear()
    return {"fault": "; ".join(fault for fault, applies in faults.items() if applies), "err": answer.err[-500:]}


def _started(answer: Answer) -> list[str]:
    from forked import STARTS

    return [
        f"{event} {what}"
        for event, what in answer.events
        if event in STARTS and not what.startswith(tuple(f"('{n}" for n in ALLOWED))
    ]


def _written(answer: Answer, sandbox: Sandbox) -> list[str]:
    """What lies neither in the run's folder, nor in the working folder, nor in the user's cache."""
    kept = [sandbox.inputs / "attack", sandbox.work, sandbox.home / ".cache"]
    seen = [
        what
        for event, what in answer.events
        if event == "open" and what.startswith("/") and not what.startswith(("/dev", "/proc"))
    ]
    changed = [str(sandbox.root / name) for name in answer.changed]
    strange = [path for path in {*seen, *changed} if not any(Path(path).is_relative_to(place) for place in kept)]
    return sorted(path for path in strange if path not in (str(sandbox.home), str(sandbox.inputs / "outside")))


def cases() -> dict[str, Any]:
    """Each attack by its name."""
    return {name: partial(attempt, attack) for name, attack in attacks().items()}


def main() -> None:
    """Try all of them."""
    good = total = 0
    for record in results("attacks", cases().items(), prepare):
        total, good = total + 1, good + (not record["fault"])
        if record["fault"]:
            print(f"{record['id']}\n    {record['fault']}\n    {record['err'][-300:]}", flush=True)
    print(f"attacks refused: {good} of {total}")


if __name__ == "__main__":
    main()
