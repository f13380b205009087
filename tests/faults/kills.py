"""Kills at seeded moments: a command that is killed and typed again leaves what an uninterrupted one leaves, bit for bit.

    python tests/faults/kills.py [--count 100] [--seed 0] [--keep FOLDER]

A case starts a tiny command as a process of its own, forked from this one, which has imported everything and computed nothing.
There the calls that make up a run are counted: steps of training, calibration and sampling, checkpoints, syncs and renames. At
one of them, drawn by case and seed, the process kills itself: by SIGKILL, also in the middle of a checkpoint's file; by SIGTERM
or SIGINT, whose status, line and checkpoint are checked. A third of the cases are killed a second time as they go on. Results
go into `results.jsonl`, case by case; the same command with `--keep` goes on there.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

TINY = shlex.split(
    "model.block_out_channels=[8,16] model.norm_num_groups=4 data.batch_size=8 teacher.max_steps=6 trainer.max_steps=7 "
    "trainer.val_every=3 trainer.log_every=1 trainer.val_images=16 trainer.compile=off trainer.accelerator=cpu "
    "trainer.threads=1 quant.calibration_batches=2 sampler.steps=3 sampler.batch_size=8 num_samples=16 paths.cache=cache"
)

ON_POLICY = (
    "taq=ema taq.groups=4 nem=on_policy nem.on_policy_buffer=20 nem.on_policy_refresh=2 trainer.sample_every=2 logger=none"
)
MIN_MAX = "quant.calibrator._target_=qdm_lightning.quantization.calibration.MinMax"
VARIANTS = {
    "normalize": f"logger=none trainer.sample_every=2 {MIN_MAX}",
    "on_policy": ON_POLICY,
    "wandb": f"trainer.sample_every=3 trainer.log_every=2 {MIN_MAX}",
    "ptq": "quant.mode=ptq logger=none",
    "teacher": "logger=none",
    "fp32": "quant=fp32 logger=none",
}
"""What the commands train, by name. The last two train their teacher, the others find it in the cache."""

COMMANDS = {"evaluate": "evaluate run=run num_samples=24 chunk=8 logger=none", "sample": "sample run=run seeds=0-23"}
"""Commands about an earlier run."""

MOMENTS: dict[str, tuple[str, tuple[str, ...], Callable[[str], bool]]] = {
    "training": ("train", ("normalize", "on_policy", "wandb"), lambda e: e.startswith("advance student")),
    "checkpoint": ("train", ("on_policy", "normalize", "teacher"), lambda e: ".ckpt" in e),
    "calibration": ("train", ("normalize", "on_policy", "ptq"), lambda e: e.startswith("advance calibration")),
    "teacher": ("train", ("teacher", "fp32"), lambda e: e.startswith("advance teacher") or "leader" in e or "unet" in e),
    "sampling": ("train", ("normalize", "on_policy", "fp32", "ptq", "wandb"), lambda e: e.startswith("advance sampling")),
    "files": ("train", ("normalize", "ptq", "wandb"), lambda e: ".ckpt" not in e and not e.startswith("advance")),
    "results": ("train", ("normalize", "on_policy", "fp32"), lambda e: "metrics." in e or "samples.png" in e),
    "any": ("train", tuple(VARIANTS), lambda e: True),
    "evaluate": ("evaluate", ("normalize",), lambda e: True),
    "sample": ("sample", ("normalize",), lambda e: True),
    "sweep": ("sweep", ("normalize",), lambda e: True),
}
"""Kinds of moments: the command, the variants that have them, and which of the counted calls they are."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass
class Ended:
    """How a process ended, what it said on stderr, and the calls that it counted."""

    status: int
    err: str
    events: list[str]


class Counter:
    """Counts calls in this process, and kills it at one of them."""

    def __init__(self, at: int | None, number: int) -> None:
        self.at, self.number, self.events = at, number, list[str]()

    def __call__(self, event: str, half: Callable[[], None] | None = None) -> None:
        self.events.append(event)
        if len(self.events) - 1 == self.at:
            if half is not None and self.number == signal.SIGKILL:
                half()
            os.kill(os.getpid(), self.number)

    def patch(self) -> None:
        import torch

        from qdm_lightning.display.progress import Stage

        advance, save, replace, rename, fsync = Stage.advance, torch.save, Path.replace, Path.rename, os.fsync

        def advanced(stage: Any, n: int = 1, **fields: Any) -> None:
            advance(stage, n, **fields)
            self(f"advance {stage.name} {stage._done}")

        def saved(content: Any, path: Any, *args: Any, **options: Any) -> None:
            file = Path(getattr(path, "name", path))
            self(f"save {file.name}", lambda: file.write_bytes(b"half of it" * 1000))
            save(content, path, *args, **options)

        def replaced(path: Path, target: Any) -> Path:
            self(f"rename to {Path(target).name}")
            return replace(path, target)

        def renamed(path: Path, target: Any) -> Path:
            self(f"rename to {Path(target).name}")
            return rename(path, target)

        def synced(handle: int) -> None:
            self("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
            fsync(handle)

        Stage.advance, torch.save, Path.replace, Path.rename, os.fsync = advanced, saved, replaced, renamed, synced  # type: ignore[assignment,method-assign,misc]


def warm() -> None:
    """Import what the commands use. Nothing is computed, so that a forked process is as good as a new one."""
    import lightning.pytorch  # noqa: F401
    import wandb  # noqa: F401

    import qdm_lightning.cli.build
    import qdm_lightning.diagnosis.diagnose
    import qdm_lightning.evaluate
    import qdm_lightning.evaluation.evaluate
    import qdm_lightning.evaluation.sample
    import qdm_lightning.sample
    import qdm_lightning.train
    import qdm_lightning.training.run  # noqa: F401


def command(words: list[str], folder: Path, at: int | None = None, number: int = 0) -> Ended:
    """Run `python -m qdm_lightning.<words>` in `folder`, in a process that gets signal `number` at call `at`; wait for it."""
    err, events = folder / "err", folder / "events"
    events.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.chdir(folder)
            for name, handle in (("out", 1), ("err", 2)):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            counter = Counter(at, number)
            counter.patch()
            status = _main(words)
            events.write_text(json.dumps(counter.events))
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    seen = json.loads(events.read_text()) if events.is_file() else []
    return Ended(os.waitstatus_to_exitcode(status), err.read_text(), seen)


def _main(words: list[str]) -> int:
    import traceback
    from importlib import import_module

    module = import_module(f"qdm_lightning.{words[0]}")
    sys.argv = sys.orig_argv = [str(module.__file__), *words[1:]]
    try:
        return int(module.main() or 0)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
        return 1


def compare(one: Any, two: Any, at: str = "") -> str:
    """Where two pieces of plain data with tensors differ; empty if nowhere."""
    import torch

    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return f"{at}: {sorted(map(str, one.keys() ^ two.keys()))}"
        return next(filter(None, (compare(one[k], two[k], f"{at}/{k}") for k in one)), "")
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        return next(filter(None, (compare(a, b, f"{at}/{i}") for i, (a, b) in enumerate(zip(one, two, strict=True)))), "")
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return "" if one.dtype == two.dtype and torch.equal(one, two) else f"{at}: tensors differ"
    return "" if one == two or (one != one and two != two) else f"{at}: {str(one)[:60]}, not {str(two)[:60]}"


TIMES = {"seconds", "step_seconds", "resumed_from", "peak_memory_bytes", "finished", "run", "name", "trained_by", "git"}
"""What two runs with the same result may have different in their records."""


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in TIMES}
    return [plain(v) for v in value] if isinstance(value, list) else value


def state(root: Path) -> dict[str, Any]:
    """What must be equal of all that lies in a folder, by path."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        name = file.relative_to(root).as_posix()
        if name.startswith("cache/references/"):  # of evaluate, where the run that was copied has its cache
            continue
        if file.suffix == ".ckpt":
            import torch

            found[name] = torch.load(file, map_location="cpu", weights_only=True)
        elif file.suffix == ".npz":
            import numpy as np

            with np.load(file) as arrays:
                found[name] = {k: arrays[k].tolist() for k in arrays.files if k not in ("meta", "sha256")}
        elif file.suffix == ".json":
            found[name] = plain(json.loads(file.read_text()))
        elif file.suffix in (".csv", ".safetensors", ".png", ".txt") and "wandb/" not in name:
            found[name] = pixels(file) if file.suffix == ".png" else file.read_bytes()
        elif file.suffix == ".tmp" or ".tmp/" in name:
            found[name] = "left over"
    return found


def pixels(file: Path) -> bytes:
    from PIL import Image

    with Image.open(file) as picture:
        return picture.tobytes()


class Kills:
    """The cases of one seed. References are made once each, below `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        (folder / "cases").mkdir(parents=True, exist_ok=True)

    def reference(self, name: str) -> Path:
        """Folder in which a command ran to its end uninterrupted, its counted calls beside it."""
        root = self.folder / f"reference_{name}"
        if not (root / "counted").is_file():
            shutil.rmtree(root, ignore_errors=True)
            ended = command(self.prepared(name, root), root)
            if ended.status:
                raise RuntimeError(f"the uninterrupted {name} ended with {ended.status}: {ended.err[-2000:]}")
            (root / "counted").write_text(json.dumps(ended.events))
        return root

    def prepared(self, name: str, root: Path) -> list[str]:
        """Make a new folder for a command of that name; the command."""
        if name in COMMANDS:
            made = self.reference("normalize")
            shutil.copytree(made / "run", root / "run")  # which names the cache beside the original
            shutil.rmtree(made / "cache" / "references", ignore_errors=True)  # made again, so that a kill can meet it
            return COMMANDS[name].split()
        root.mkdir()
        if name not in ("teacher", "fp32"):
            shutil.copytree(self.reference("teacher") / "cache" / "teachers", root / "cache" / "teachers")
        return ["train", *TINY, *VARIANTS[name].split(), "hydra.run.dir=run"]

    def case(self, number: int, moments: Sequence[str], only: Sequence[str]) -> dict[str, Any]:
        """Run a case; its record, whose `why` is empty where the kill was survived."""
        draw = random.Random(f"{self.seed} {number}")
        moment = moments[number % len(moments)]
        kind, variants, wanted = MOMENTS[moment]
        variant, how = draw.choice([v for v in variants if v in only] or variants), SIGNALS[number // len(moments) % 3]
        root = self.folder / "cases" / str(number)
        shutil.rmtree(root, ignore_errors=True)
        record: dict[str, Any] = {"case": number, "moment": moment, "variant": variant, "signal": how.name}
        if kind == "sweep":
            return record | self.sweep(root, how, draw)
        name = variant if kind == "train" else kind
        reference = self.reference(name)
        events: list[str] = json.loads((reference / "counted").read_text())
        at = draw.choice([n for n, event in enumerate(events) if wanted(event)])
        record["event"] = events[at]
        record["why"] = survived(self.prepared(name, root), root, at, how, draw) or different(reference, root)
        if not record["why"]:
            shutil.rmtree(root)
        return record

    def sweep(self, root: Path, how: signal.Signals, draw: random.Random) -> dict[str, Any]:
        """A sweep of two jobs, killed some time after a file of its first job is there, typed again, and compared."""
        reference, words = self.folder / "reference_sweep", ["-m", *TINY, "logger=none", "seed=0,1", "hydra.sweep.dir=sweep"]
        typed = [sys.executable, "-m", "qdm_lightning.train", *words]

        def run(folder: Path, wait_for: str | None = None, seconds: float = 0.0) -> tuple[int, str]:
            with (folder / "err").open("w") as err:
                started = subprocess.Popen(typed, cwd=folder, stdout=subprocess.DEVNULL, stderr=err)
                while wait_for and started.poll() is None and not list(folder.glob(wait_for)):
                    time.sleep(0.05)
                if wait_for:
                    time.sleep(seconds)
                    started.send_signal(how)
                return started.wait(), (folder / "err").read_text()

        if not (reference / "done").is_file():
            shutil.rmtree(reference, ignore_errors=True)
            shutil.copytree(self.reference("teacher") / "cache" / "teachers", reference / "cache" / "teachers")
            if run(reference)[0]:
                raise RuntimeError(f"the uninterrupted sweep failed: {(reference / 'err').read_text()[-2000:]}")
            (reference / "done").touch()
        shutil.copytree(self.reference("teacher") / "cache" / "teachers", root / "cache" / "teachers")
        wait_for, seconds = (
            draw.choice(("config.yaml", "checkpoints/last.ckpt", "metrics.csv", "metrics.json")),
            3 * draw.random(),
        )
        status, err = run(root, f"sweep/*/{wait_for}", seconds)
        why = wrong_end(status, err, how)
        if not why:
            status, err = run(root)
            why = f"typed again it ended with {status}: {err[-500:]}" if status else different(reference, root)
        if not why:
            shutil.rmtree(root)
        return {"event": f"{seconds:.2f} s after a {wait_for}", "why": why}


def wrong_end(status: int, err: str, how: signal.Signals) -> str:
    """What was wrong with the way in which a signal ended a process; it may have been done before."""
    lines = err.strip().splitlines()
    if status == 0:
        return ""
    if how == signal.SIGKILL:
        return "" if status == -how else f"ended with {status}: {err[-500:]}"
    if status != 128 + how or not all(line.startswith("interrupted; to go on: python -m qdm_lightning.") for line in lines):
        return f"ended with {status}, and said: {err[-1500:]}"
    return ""


def survived(words: list[str], root: Path, at: int, how: signal.Signals, draw: random.Random) -> str:
    """Kill a command, some a second time as it goes on, then let it end; empty, or what went wrong."""
    for again in (False, True) if draw.random() < 1 / 3 else (False,):
        ended = command(words, root, draw.randrange(at + 1) if again else at, how)
        why = wrong_end(ended.status, ended.err, how)
        if why:
            return why
        if ended.status > 0:  # what it says itself
            said = ended.err.strip().partition("python -m qdm_lightning.")[2]
            words = shlex.split(said)
        elif words[0] == "train" and draw.random() < 0.5:
            begun = (root / "run" / "config.yaml", root / "cache" / "CACHEDIR.TAG")  # without: no cache of ours to `run=`
            words = ["train", "run=run"] if all(file.is_file() for file in begun) else words
    ended = command(words, root)
    return f"{' '.join(words)} ended with {ended.status}: {ended.err[-2000:]}" if ended.status else ""


def different(reference: Path, root: Path) -> str:
    """How what two folders hold differs; empty if it does not."""
    why = compare(state(reference), state(root))
    for identity in root.rglob("wandb_id"):
        folders = [folder.name for folder in identity.parent.glob("wandb/offline-run-*")]
        why = why or ("" if all(f.endswith(identity.read_text().strip()) for f in folders) else f"W&B ids: {folders}")
    return why


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills at seeded moments, survived bit for bit.")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder of the results and of the cases that failed; the same one goes on")
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS), help="only these kinds of moments")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of what these train, where there is"
    )
    args = parser.parse_args()
    folder = args.keep.absolute() if args.keep else Path(tempfile.mkdtemp(prefix="kills_"))
    kills, results = Kills(folder, args.seed), folder / f"results_{args.seed}.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    known = {record["case"]: record for record in records}
    warm()
    for number in range(args.count):
        if number not in known:
            known[number] = kills.case(number, args.moments, args.variants)
            with results.open("a") as stream:
                stream.write(json.dumps(known[number]) + "\n")
        record = known[number]
        shown = " ".join(str(record[k]) for k in ("moment", "variant", "signal", "event"))
        print(f"{number:3} {'FAILED' if record['why'] else 'ok    '} {shown} {record['why']}", flush=True)
    kept = [known[number] for number in range(args.count)]
    survivors = sum(not record["why"] for record in kept)
    if not args.keep and survivors == args.count:
        shutil.rmtree(folder)
    print(f"kills survived: {survivors} of {args.count}")
    raise SystemExit(survivors != args.count)


if __name__ == "__main__":
    main()
