"""Some of the attacks of `make test-faults`: hostile runs, students, pictures and records, typed in one process's children."""

import json
import subprocess
import sys

import attacks
import pytest

EVERY = 26


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    keep = tmp_path_factory.mktemp("attacks")
    command = [sys.executable, attacks.__file__, "--every", str(EVERY), "--keep", str(keep)]
    subprocess.run(command, check=True, capture_output=True)
    records = map(json.loads, (keep / "attacks.jsonl").read_text().splitlines())
    return {record["id"]: record for record in records}


@pytest.mark.parametrize("attack", [*attacks.cases()][::EVERY])
def test_refused(attack, tried):
    assert tried[attack]["fault"] == "", tried[attack]["err"]


def test_the_table_is_whole():
    assert len(attacks.cases()) >= 105
