import json

import pytest
from rich.console import Console

from qdm_lightning.evaluation.protocol import comparable, read_result, table

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


def test_a_table_of_different_protocols_says_so():
    text = shown(table([record(fd_digits=3.0), record("ptq4dm", 10000, fd_digits=2.0)]))
    assert "do not compare" in text
    assert "10000 images, aaaaaaaaaaaa" in text


def test_records_of_a_folder(tmp_path):
    wanted = record()["protocol"]
    with pytest.raises(FileNotFoundError, match=r"holds no evaluation.json: python -m qdm_lightning.evaluate"):
        comparable(tmp_path, wanted, force=True)
    for name, count in (("a", 1000), ("b", 50000)):
        (tmp_path / "evaluations" / name).mkdir(parents=True)
        (tmp_path / "evaluations" / name / "evaluation.json").write_text(json.dumps(record(name, count)))
    assert [r["name"] for r in comparable(tmp_path, wanted, force=False)] == ["a"]
    assert [r["name"] for r in comparable(tmp_path, wanted, force=True)] == ["a", "b"]
    assert [r["name"] for r in comparable(tmp_path / "evaluations" / "b", wanted, force=True)] == ["b"]
    with pytest.raises(ValueError, match=r"b was measured by another protocol \(num_samples 1000 against 50000\).*force=true"):
        comparable(tmp_path / "evaluations" / "b", wanted, force=False)
    with pytest.raises(ValueError, match=r"a was measured by another protocol \(num_samples 10000 against 1000\)"):
        comparable(tmp_path, {**wanted, "num_samples": 10000}, force=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ("[]", "is damaged: it holds no JSON object"), ('{"scores": {}}', "is no record")],
)
def test_what_is_no_record(tmp_path, text, message):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_result(tmp_path / "evaluation.json")
