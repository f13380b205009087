"""Commands typed in forked children of one process that has imported everything: what they print, leave and do."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM = ("cli.build", "training.run", "evaluation.evaluate", "evaluation.sample", "diagnosis.diagnose", "reporting.write")
WARM += ("metrics.inception", "metrics.resnet20", "data.images", "data.cifar10", "data.celeba", "data.imagenet64", "cost")
COMMANDS = ("train", "evaluate", "sample", "diagnose", "report", "cost", "convert", "dashboard", "__main__")

WALL_SECONDS, CPU_SECONDS = 120, 35
"""After so long a child is killed: it hung, or it goes on where it should have ended."""

MEMORY = 4 * 2**30
"""Bytes that a child may take beside what the warm process has."""

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "shutil.rmtree"}
STARTS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "os.fork",
    "os.startfile",
    "socket.connect",
    "pty.spawn",
}


@dataclass(frozen=True)
class Answer:
    """How a command ended.

    Attributes:
        status: exit status; negative where a signal ended it (it hung).
        seconds: of the processor.
        changed: files below the sandbox that are new, gone or other than before.
        events: (what, where) of the processes, connections and writes that Python's audit hooks saw.
    """

    status: int
    out: str
    err: str
    seconds: float
    changed: list[str]
    events: list[tuple[str, str]]


class Sandbox:
    """A folder with a home, inputs of the commands, and a working folder for each of them."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.inputs, self.home, self.work = self.root / "inputs", self.root / "home", self.root / "work"
        for folder in (self.inputs, self.home, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    def state(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file and folder; links are not followed."""
        return {
            path.relative_to(self.root).as_posix(): (0, 0)
            if path.is_dir()
            else (path.lstat().st_size, path.lstat().st_mtime_ns)
            for place in (self.inputs, self.home, self.work)
            for path in place.rglob("*")
        }

    def run(self, command: str | Callable[[], Any], words: Sequence[str] = (), watched: bool = False) -> Answer:
        """Type `python -m qdm_lightning.<command> <words>` in the working folder, or call a function there.

        Args:
            watched: note what Python's audit hooks see.
        """
        scratch = self.root / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        before = self.state()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _type(self, scratch, command, list(words), watched)
        _, status, used = _ended(child)
        after = self.state()
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        events = (scratch / "events").read_text("utf-8").splitlines() if (scratch / "events").is_file() else []
        texts = [(scratch / name).read_text("utf-8", "replace") for name in ("out", "err")]
        seen = [tuple(json.loads(line)) for line in events]
        return Answer(os.waitstatus_to_exitcode(status), *texts, used.ru_utime + used.ru_stime, changed, seen)

    def clear(self) -> None:
        """Empty the working folder and the home."""
        for folder in (self.work, self.home):
            shutil.rmtree(folder)
            folder.mkdir()


def _ended(child: int) -> Any:
    end = time.monotonic() + WALL_SECONDS
    while time.monotonic() < end:
        ended = os.wait4(child, os.WNOHANG)
        if ended[0]:
            return ended
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    return os.wait4(child, 0)


def _type(sandbox: Sandbox, scratch: Path, command: str | Callable[[], Any], words: list[str], watched: bool) -> None:
    """In the child: run the command and end with its status."""
    status = 1
    try:
        os.setsid()
        for number, name in ((0, os.devnull), (1, scratch / "out"), (2, scratch / "err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(n, "wb", closefd=False), "utf-8", line_buffering=True) for n in (1, 2)
        )
        used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        os.environ.update(HOME=str(sandbox.home), HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")
        os.environ.pop("XDG_CACHE_HOME", None)
        (scratch / "tmp").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch / "tmp")
        os.chdir(sandbox.work)
        sys.argv = [str(command), *words]
        sys.dont_write_bytecode = True
        sys.orig_argv = [sys.executable, "-m", f"qdm_lightning{'' if command == '__main__' else '.' + str(command)}", *words]
        main = importlib.import_module(f"qdm_lightning.{command}").main if isinstance(command, str) else command
        if watched:
            _watch(scratch)
        status = _status(main)
    except BaseException:  # noqa: BLE001 whatever it is, the child must not go on as the parent
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _status(main: Callable[[], Any]) -> int:
    try:
        returned = main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return returned or 0


def _watch(scratch: Path) -> None:
    """Write down every process, connection and write from now on, but for those in the scratch folder."""
    log = os.open(scratch / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    kept = str(scratch)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS:
            what = str(arguments[:2])
        elif event in WRITES or (event == "open" and _writes(arguments[2])):
            what = str(arguments[0])
        else:
            return
        if not what.startswith((kept, "/dev/null")) and not what.isdigit():
            os.write(log, (json.dumps([event, what]) + "\n").encode())

    sys.addaudithook(note)


def _writes(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def warm_up() -> None:
    """Import what the commands import, once for all children."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    matplotlib = importlib.import_module("matplotlib")
    os.environ["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # its cache of fonts takes seconds, and a home
    for name in (*WARM, *COMMANDS):
        importlib.import_module(f"qdm_lightning.{name}")


def _code() -> str:
    """A hash of what is tested and of the tests: results of other code do not count."""
    top, digest = Path(__file__).parents[2], hashlib.sha256()
    for folder in ("src", "conf", "tests/faults"):
        for file in sorted((top / folder).rglob("*.[py]*")):
            if file.suffix in (".py", ".yaml"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def results(
    name: str, cases: Iterable[tuple[str, Callable[[Sandbox], dict[str, Any]]]], prepare: Callable[[Sandbox], None]
) -> Iterator[dict[str, Any]]:
    """Command line of a table of cases: try those that have not passed before, and yield what came out of each.

    Args:
        name: of the file of results.
        cases: (id, does the case and returns its result with `fault`, empty where all is well).
        prepare: makes the inputs.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, help="folder for inputs and results; the same command goes on there")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try every Nth alone")
    args = parser.parse_args()
    keep, chosen = args.keep, [*cases][:: args.every]
    with contextlib.ExitStack() as stack:
        root = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qdm_faults_")))
        root.mkdir(parents=True, exist_ok=True)
        file = root / f"{name}.jsonl"
        lines = file.read_text("utf-8").splitlines() if file.is_file() else []
        code = _code()
        passed = {
            record["id"]: record for record in map(json.loads, lines) if not record["fault"] and record.get("code") == code
        }
        warm_up()
        sandbox = Sandbox(root / name)
        prepare(sandbox)
        with file.open("a", encoding="utf-8") as out:
            for key, attempt in chosen:
                record = passed.get(key) or {"id": key, "code": code, **attempt(sandbox)}
                if key not in passed:
                    print(json.dumps(record), file=out, flush=True)
                yield record
