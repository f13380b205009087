"""Damage to every file that a command reads back: it is named in one line, or made again equal, or the one before is taken.

    python tests/faults/damage.py [--seed 0] [--keep FOLDER]

A finished run, a half-done one, one that was only calibrated and their caches are made once. A case restores them, damages one
file (cut in half, a bit turned at a seeded place, zeroed, emptied; in `metrics.csv` a bit of each row) and runs a command that
reads it, in a process forked from this one. `bare` cases lack the checksum beside the file, as copies do. What the command came
to is compared with what it comes to where nothing is damaged. Results go into `results.jsonl`, case by case; the same command
with `--keep` goes on there.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import signal
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from kills import TIMES, command, compare, state, warm

TINY = shlex.split(
    "data=images metrics=digits data.image_size=8 data.channels=1 "
    "model=unet_digits model.block_out_channels=[8,16] model.norm_num_groups=4 "
    "data.batch_size=8 teacher.max_steps=4 trainer.max_steps=6 trainer.val_every=2 trainer.log_every=1 trainer.val_images=8 "
    "trainer.compile=off trainer.accelerator=cpu trainer.threads=1 quant.calibration_batches=1 sampler.steps=2 "
    "sampler.batch_size=8 num_samples=8 logger=none"
)
TIMES |= {"warnings", "trained_now", "trained_by", "git"}


@dataclass(frozen=True)
class Reader:
    """A command, the files that it reads (patterns below the folder of all), and what it leaves that must be equal."""

    words: str
    files: tuple[str, ...]
    leaves: str
    without: tuple[str, ...] = ()
    """What is removed before, so that the command does not find its own results."""


TEACHER = ("{run}/teacher/unet/config.json", "{run}/teacher/unet/*.safetensors")
READERS = {
    "resume": Reader(
        "train run={root}/half",
        ("half/config.yaml", "half/checkpoints/*.ckpt", "half/teacher/origin.json", *(f.format(run="half") for f in TEACHER)),
        "half",
    ),
    "rows": Reader("train run={root}/half", ("half/metrics.csv",), "half"),
    "evaluate": Reader(
        "evaluate run={root}/done seed=5 num_samples=16 chunk=8",
        (
            *("done/config.yaml", "done/checkpoints/best.ckpt", *(f.format(run="done") for f in TEACHER)),
            *("done/evaluations/*/evaluation.json", "cache/references/*.npz"),
        ),
        "done/evaluations",
    ),
    "score": Reader(
        "evaluate run={root}/done num_samples=16 chunk=8",
        ("done/evaluations/chunks/*/features_*/*.npz",),
        "done/evaluations",
        without=("done/evaluations/*/evaluation.json",),
    ),
    "take features": Reader(
        "evaluate run={root}/done num_samples=16 chunk=8",
        ("done/evaluations/chunks/*/images/*.npz",),
        "done/evaluations",
        without=("done/evaluations/*/evaluation.json", "done/evaluations/chunks/*/features_*/*.npz"),
    ),
    "calibrated": Reader("evaluate run={root}/ptq num_samples=8", ("ptq/student/**/*.safetensors",), "ptq/evaluations"),
    "sample": Reader("sample run={root}/done seeds=0-2", ("done/images/*/[0-9]*.png",), "done/images"),
    "report": Reader(
        "report {root}/done",
        ("done/config.yaml", "done/metrics.json", "done/samples.png", "done/evaluations/*/evaluation.json"),
        "done/none",
    ),
    "curves": Reader("report {root}/done", ("done/metrics.csv",), "done/none"),
    "new run": Reader(
        "train {tiny} quant=w3a3 hydra.run.dir={root}/new",
        (
            *("cache/datasets/*.npy", "cache/teacher_images/*.safetensors", "cache/teachers/*/teacher.json"),
            *(f"cache/teachers/*/{file}" for file in ("unet/config.json", "unet/*.safetensors", "scheduler/*.json")),
        ),
        "new/student",  # metrics.csv has the teacher's rows where it is trained again
    ),
    "half a teacher": Reader(
        "train {tiny} quant=fp32 paths.cache={root}/half_cache trainer.max_steps=4 hydra.run.dir={root}/new",
        ("half_cache/teachers/*.work/checkpoints/*.ckpt",),
        "new/teacher",
    ),
}

PARTS = ("half", "done", "ptq", "half_cache")
"""Folders that are made; `cache` is made beside them."""

DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": lambda content, draw: content[: len(content) // 2],
    "flipped": lambda content, draw: turned(content, draw.randrange(len(content)), draw),
    "flipped again": lambda content, draw: turned(content, draw.randrange(len(content)), draw),
    "zeroed": lambda content, draw: bytes(len(content)),
    "emptied": lambda content, draw: b"",
}
STRUCTURED = (".ckpt", ".safetensors", ".json", ".npz", ".npy")
"""Endings of files whose truncation shows without a checksum."""


def turned(content: bytes, place: int, draw: random.Random) -> bytes:
    """`content` with one bit of the byte at `place` turned."""
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


@dataclass(frozen=True)
class Case:
    """A file, relative to the folder of all, a kind of damage (`row N` in metrics.csv), and the command that reads it."""

    reader: str
    file: str
    damage: str

    @property
    def name(self) -> str:
        return f"{self.reader}: {self.file} {self.damage}"


class Damage:
    """The cases of one seed, in `folder`: `sound` has the runs as they were made, `work` is restored from it for each case."""

    def __init__(self, folder: Path, seed: int, parts: Collection[str] = PARTS) -> None:
        self.folder, self.seed, self._expected = folder, seed, dict[str, dict[str, object]]()
        self.sound, self.work = folder / "sound", folder / "work"
        self.tiny = shlex.join([*TINY, f"data.path={folder / 'pictures'}", f"paths.cache={self.work / 'cache'}"])
        if not self.sound.is_dir():
            self.make(parts)

    def make(self, parts: Collection[str]) -> None:
        """Runs and caches. The half-done ones are killed after a step past their first checkpoint."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        _pictures(self.folder / "pictures")
        if "half" in parts:
            self.run(f"train {self.tiny} hydra.run.dir={self.work}/half", kill_at="advance student 5")
        if "done" in parts:
            self.run(f"train {self.tiny} hydra.run.dir={self.work}/done")
            self.run(f"evaluate run={self.work}/done num_samples=16 chunk=8")
            self.run(f"sample run={self.work}/done seeds=0-2")
        if "ptq" in parts:
            self.run(f"train {self.tiny} hydra.run.dir={self.work}/ptq quant.mode=ptq")
        if "half_cache" in parts:
            cache = f"hydra.run.dir={self.work}/left quant=fp32 paths.cache={self.work}/half_cache trainer.max_steps=4"
            self.run(f"train {self.tiny} {cache}", kill_at="advance teacher 3")
            shutil.rmtree(self.work / "left")
        self.work.rename(self.sound)

    def run(self, words: str, kill_at: str = "") -> None:
        """Run a command to its end, or until it has been killed at the first call of that name (see `kills`)."""
        before = self.work.with_name("before")
        if kill_at:
            shutil.rmtree(before, ignore_errors=True)
            shutil.copytree(self.work, before)
        ended = command(shlex.split(words), self.work)
        if ended.status:
            raise RuntimeError(f"{words} ended with {ended.status}: {ended.err[-2000:]}")
        if kill_at:
            shutil.rmtree(self.work)
            before.rename(self.work)
            command(shlex.split(words), self.work, ended.events.index(kill_at), signal.SIGKILL)

    def cases(self) -> Iterator[Case]:
        for name, reader in READERS.items():
            for pattern in reader.files:
                files = sorted(file for file in self.sound.glob(pattern) if not file.name.startswith("."))
                if not files:
                    raise RuntimeError(f"nothing to damage: {pattern}")
                for file in files[:2]:
                    yield from self._of(name, file.relative_to(self.sound))

    def _of(self, reader: str, file: Path) -> Iterator[Case]:
        if file.suffix == ".csv":
            rows = len((self.sound / file).read_text().splitlines())
            yield from (Case(reader, str(file), f"row {row}") for row in range(rows))
        yield from (Case(reader, str(file), damage) for damage in DAMAGES)
        if file.suffix in STRUCTURED:
            yield Case(reader, str(file), "bare truncated")
        elif file.suffix == ".yaml":
            yield Case(reader, str(file), "bare emptied")

    def outcome(self, reader: Reader) -> tuple[int, str, dict[str, object]]:
        """Run a reader in `work`: its status, all that it said, and what it left."""
        for file in [file for pattern in reader.without for file in self.work.glob(pattern)]:
            file.unlink()
        ended = command(shlex.split(reader.words.format(root=self.work, tiny=self.tiny)), self.work)
        page = self.work / "done" / "report.html"
        said = "".join(file.read_text() for file in (self.work / "out", page) if file.is_file())
        left = {} if ended.status else state(self.work / reader.leaves)
        return ended.status, said + ended.err, left

    def expected(self, reader: str) -> dict[str, object]:
        """What a reader leaves where nothing is damaged."""
        if reader not in self._expected:
            self.restore()
            status, said, self._expected[reader] = self.outcome(READERS[reader])
            if status:
                raise RuntimeError(f"{reader} ended with {status} where nothing is damaged: {said[-2000:]}")
        return self._expected[reader]

    def restore(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.sound, self.work)

    def why(self, case: Case) -> str:
        """What was wrong with how the case ended; empty where the damage was recognised."""
        expected = self.expected(case.reader)
        self.restore()
        file, draw = self.work / case.file, random.Random(f"{self.seed} {case.name}")
        content = file.read_bytes()
        if case.damage.startswith("row "):
            lines = content.splitlines(keepends=True)
            row = int(case.damage.removeprefix("row "))
            lines[row] = turned(lines[row], draw.randrange(len(lines[row])), draw)
            damaged = b"".join(lines)
        else:
            damaged = DAMAGES[case.damage.removeprefix("bare ")](content, draw)
        file.write_bytes(damaged)
        if case.damage.startswith("bare "):
            (file.parent / f".{file.name}.sha256").unlink()
        status, said, left = self.outcome(READERS[case.reader])
        return judged(file, status, said, compare(expected, left))


def judged(file: Path, status: int, said: str, difference: str) -> str:
    """Empty where the damage was recognised, else what was wrong."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if "Traceback" in said:
        return f"a traceback: {said[-1500:]}"
    named = (f"{place} {how}" for place in (file.name, file.parent) for how in ("is damaged", "cannot be read", "is no"))
    if not any(words in said for words in named):
        return f"nobody named {file}; status {status}: {said[-1500:]}"
    if status == 2 and len(lines) == 1:
        return ""
    if status == 0:
        return difference
    return f"status {status}: {said[-1500:]}"


def _pictures(folder: Path) -> None:
    from PIL import Image

    from qdm_lightning.data.digits import DigitsData

    folder.mkdir(exist_ok=True)
    digits = DigitsData()
    digits.setup()
    for number, pixels in enumerate(digits.train_images[:64, 0].numpy()):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage to every file that a command reads back, recognised.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder of the results; the same one goes on")
    args = parser.parse_args()
    folder = args.keep.absolute() if args.keep else Path(tempfile.mkdtemp(prefix="damage_"))
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / f"results_{args.seed}.jsonl"
    known = dict(json.loads(line) for line in results.read_text().splitlines()) if results.is_file() else {}
    warm()
    damage = Damage(folder, args.seed)
    cases = list(damage.cases())
    for number, case in enumerate(cases):
        if case.name not in known:
            known[case.name] = damage.why(case)
            with results.open("a") as stream:
                stream.write(json.dumps([case.name, known[case.name]]) + "\n")
        why = known[case.name]
        print(f"{number:3} {'FAILED' if why else 'ok    '} {case.name} {why}", flush=True)
    recognised = sum(not known[case.name] for case in cases)
    if not args.keep and recognised == len(cases):
        shutil.rmtree(folder)
    print(f"damages recognised: {recognised} of {len(cases)}")
    raise SystemExit(recognised != len(cases))


if __name__ == "__main__":
    main()
