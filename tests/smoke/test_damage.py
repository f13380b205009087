"""Some of `tests/faults/damage.py`: a half-done run and its cache, damaged, are gone on with or named."""

import json
import subprocess
import sys
from pathlib import Path

FAULTS = Path(__file__).parents[1] / "faults"

CODE = """
import json, sys
from pathlib import Path
from damage import Case, Damage
from kills import warm

warm()
damage = Damage(Path(sys.argv[1]), 0, ["half"])
cases = [Case(*words) for words in json.loads(sys.argv[2])]
print(json.dumps([damage.why(case) for case in cases]))
"""
"""In a process of its own: the commands are run in forked ones, which must be single-threaded and as good as new."""

CASES = [
    ("resume", "half/checkpoints/last.ckpt", "truncated"),
    ("resume", "half/checkpoints/best.ckpt", "flipped"),
    ("rows", "half/metrics.csv", "row 3"),
]


def test_damage_is_recognised(tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FAULTS)
    assert done.returncode == 0, done.stderr
    assert dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True)) == dict.fromkeys(CASES, "")
