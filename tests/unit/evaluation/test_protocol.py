import json

import pytest
from rich.console import Console

from qdm_lightning.evaluation.protocol import check_same, comparable, results_in, table

SAMPLER = {"kind": "ddim", "steps": 50, "spacing": "uniform", "eta": 0.0, "variance": "fixed_large", "clip_sample": True}


def record(name="run", count=1000, **scores):
    return {
        "identity": name,
        "name": name,
        "folder": name,
        "network": "student",
        "bits": [4, 4],
        "origin": {"weights": "ema"},
        "sampler": SAMPLER,
        "protocol": {"num_samples": count, "reference": "a" * 64},
        "scores": scores,
    }


def shown(result):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(result)
    return captured.get()


def test_one_protocol_shares_a_table():
    text = shown(table([record(fd_digits=3.25, score=5.0, score_std=0.5), record("other", fd_digits=4.5)]))
    assert "student W4A4, ema" in text
    assert "ddim50" in text
    assert "3.25" in text
    assert "5 ± 0.5" in text
    assert "protocol" not in text


def test_different_protocols_do_not():
    records = [record(fd_digits=3.0), record("ptq4dm", 10000, fd_digits=2.0)]
    with pytest.raises(
        ValueError, match=r"ptq4dm was measured by another protocol \(num_samples 1000 against 10000\).*force=true"
    ):
        table(records)
    assert "do not compare" in shown(table(records, force=True))
    check_same(records, force=True)


def test_records_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no evaluation.json: python -m qdm_lightning.evaluate"):
        results_in(tmp_path)
    for name, count in (("a", 1000), ("b", 50000)):
        (tmp_path / "evaluations" / name).mkdir(parents=True)
        (tmp_path / "evaluations" / name / "evaluation.json").write_text(json.dumps(record(name, count)))
    assert [r["name"] for r in results_in(tmp_path)] == ["a", "b"]
    assert [r["name"] for r in results_in(tmp_path / "evaluations" / "b")] == ["b"]
    wanted = record()["protocol"]
    assert [r["name"] for r in comparable(tmp_path, wanted, force=False)] == ["a"]
    assert [r["name"] for r in comparable(tmp_path, wanted, force=True)] == ["a", "b"]
    with pytest.raises(ValueError, match="num_samples 10000 against"):
        comparable(tmp_path, {**wanted, "num_samples": 10000}, force=False)
    (tmp_path / "evaluations" / "a" / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        results_in(tmp_path)
