"""Bad input to every command: status 2, one line on stderr, nothing left, within five seconds of the processor.

    python tests/faults/bad_input.py [--keep FOLDER]

`{A}` stands for the folder of inputs that `prepare` makes.
"""

from __future__ import annotations

import json
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from bad_input_table import TABLE
from forked import Sandbox, results

STORED_RUN = Path(__file__).parents[1] / "assets" / "stored_run_0_1"

SECONDS, SECONDS_WITH_NETWORK = 5, 30
"""Limits of the processor's time; the second where a network must be read or built first."""

CACHES = ("home/.cache", "home/.cache/qdm_lightning")
"""The user's, which decoded pictures may be kept in."""

NETWORK = "[network] "
"""Begins the expected line of a case for which a network is read or built."""


def prepare(sandbox: Sandbox) -> None:
    """Pictures, checkpoints, runs and options, whole and damaged."""
    import numpy as np
    import torch
    from PIL import Image

    top = sandbox.inputs
    if (top / "done").is_file():
        return
    shutil.rmtree(top)
    shutil.copytree(STORED_RUN, top / "run", copy_function=shutil.copyfile)
    random = np.random.default_rng(0)
    for folder, count in (("pics", 12), ("one", 1), ("two", 2), ("four", 4), ("truncated", 8), ("sizes", 8)):
        (top / folder).mkdir()
        for index in range(count):
            edge = 8 + (folder == "sizes") * index
            Image.fromarray(random.integers(0, 255, (edge, edge), dtype=np.uint8)).save(top / folder / f"{index}.png")
    (top / "truncated" / "3.png").write_bytes((top / "truncated" / "3.png").read_bytes()[:60])
    for folder in ("empty", "nested/empty", "conf/quant", "conf_tag/quant", "conf_text/quant", "conf_binary/quant", "notes"):
        (top / folder).mkdir(parents=True)
    (top / "notes" / "a.txt").write_text("no picture")
    (top / "conf" / "quant" / "broken.yaml").write_text("weight_bits: [4\n")
    (top / "conf_tag" / "quant" / "tag.yaml").write_text("weight_bits: !!python/object/apply:os.getpid []\n")
    (top / "conf_text" / "quant" / "words.yaml").write_text("only words\n")
    (top / "conf_binary" / "quant" / "binary.yaml").write_bytes(bytes(range(256)))
    (top / "text.txt").write_text("no checkpoint\n")
    (top / "text.ckpt").write_text("no checkpoint\n")
    (top / "text.npz").write_text("no arrays\n")
    (top / "empty.ckpt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, top / "foreign.ckpt")
    torch.save([1, 2, 3], top / "list.ckpt")
    torch.save(Path("x"), top / "pickle.ckpt")
    np.savez(top / "floats.npz", images=np.zeros((4, 8, 8)))
    np.savez(top / "several.npz", a=np.zeros((4, 8, 8), np.uint8), b=np.zeros(3))
    np.savez(top / "moments.npz", mu=np.zeros(3), sigma=np.eye(4))
    (top / "no_run").mkdir()
    (top / "no_run" / "config.yaml").write_text("seed: 0\n")
    for name, damage in {"cut": lambda text: text[:700], "list": lambda _: "[1, 2]", "empty_config": lambda _: ""}.items():
        shutil.copytree(top / "run", top / name)
        (top / name / "config.yaml").write_text(damage((top / "run" / "config.yaml").read_text()))
    shutil.copytree(top / "run", top / "no_teacher", ignore=shutil.ignore_patterns("teacher"))
    shutil.copytree(top / "run", top / "no_metrics", ignore=shutil.ignore_patterns("metrics.json"))
    for name, content in {"metrics_text": "words", "metrics_list": "[]", "metrics_empty": "{}"}.items():
        shutil.copytree(top / "run", top / name)
        (top / name / "metrics.json").write_text(content)
    unet = json.loads((top / "run" / "teacher" / "unet" / "config.json").read_text())
    shutil.copytree(top / "run" / "teacher", top / "classes")
    (top / "classes" / "unet" / "config.json").write_text(json.dumps({**unet, "_class_name": "UNet2DConditionModel"}))
    shutil.copytree(top / "run" / "teacher", top / "json_cut")
    (top / "json_cut" / "unet" / "config.json").write_text('{"_class_name"')
    shutil.copytree(top / "run" / "teacher", top / "oblong")
    (top / "oblong" / "unet" / "config.json").write_text(json.dumps({**unet, "sample_size": [8, 16]}))
    (top / "done").touch()


def attempt(command: str, words: str, said: str, sandbox: Sandbox) -> dict[str, Any]:
    """Type it, and say what is wrong with the answer, if anything."""
    answer = sandbox.run(command, shlex.split(words.replace("{A}", str(sandbox.inputs))))
    limit = SECONDS_WITH_NETWORK if said.startswith(NETWORK) else SECONDS
    said = said.removeprefix(NETWORK).replace("{A}", str(sandbox.inputs))
    left = [name for name in answer.changed if not name.startswith("home/.cache/qdm_lightning/datasets") and name not in CACHES]
    faults = {
        f"status {answer.status}": answer.status != 2,
        f"{len(answer.err.splitlines())} lines": len(answer.err.splitlines()) != 1 or not answer.err.startswith("error: "),
        "something on stdout": bool(answer.out) and limit == SECONDS,
        f"not said: {said}": said not in answer.err,
        f"left: {left[:4]}": bool(left),
        f"{answer.seconds:.1f} s": answer.seconds > limit,
    }
    if answer.changed:
        sandbox.clear()
    fault = "; ".join(fault for fault, applies in faults.items() if applies)
    return {"fault": fault, "err": answer.err[-600:], "seconds": round(answer.seconds, 2)}


def cases() -> dict[str, Any]:
    """Each case by its id, which is what is typed."""
    return {
        f"{command} {words}": partial(attempt, command, words, said)
        for command, inputs in TABLE.items()
        for words, said in inputs.items()
    }


def main() -> None:
    """Try all of them."""
    good = total = 0
    for record in results("bad_input", cases().items(), prepare):
        total, good = total + 1, good + (not record["fault"])
        if record["fault"]:
            print(f"{record['id']}\n    {record['fault']}\n    {record['err'][-300:]}", flush=True)
    print(f"bad inputs named: {good} of {total}")


if __name__ == "__main__":
    main()
