import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdm_lightning.evaluation.spec import (
    EvaluationConfig,
    RestoreConfig,
    SampleConfig,
    format_seeds,
    parse_seeds,
    parse_shard,
)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30, unique=True))
def test_seeds_come_back_from_their_text(seeds):
    assert parse_seeds(format_seeds(seeds)) == seeds


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("a", "seeds=a is not understood at 'a': write seeds=0-63"),
        ("5-3", "is not understood at '5-3'"),
        ("-1", "is not understood"),
        ("", "is not understood"),
        ("0-4294967296", r"lie in \[0, 4294967295\]"),
        ("0-20000000", "at most 10,000,000"),
        ("0-9,5", "has 5 twice"),
    ],
)
def test_bad_seeds(seeds, message):
    with pytest.raises(ValueError, match=message):
        parse_seeds(seeds)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "a", "1/0", "1", "1/2/3"])
def test_bad_shards(shard):
    with pytest.raises(ValueError, match="write shard=k/n"):
        parse_shard(shard)


@pytest.mark.parametrize(
    ("schema", "settings", "message"),
    [
        (RestoreConfig, {"network": "pupil"}, "network=pupil is not allowed"),
        (RestoreConfig, {"weights": "x"}, "weights=x is not allowed"),
        (RestoreConfig, {"checkpoint": "missing.ckpt"}, "checkpoint=missing.ckpt: no such file"),
        (RestoreConfig, {"accelerator": "abacus"}, "accelerator=abacus is not allowed"),
        (RestoreConfig, {"threads": -1}, "threads=-1"),
        (RestoreConfig, {"compile": "maybe"}, "compile=maybe"),
        (EvaluationConfig, {"num_samples": 1}, "num_samples=1"),
        (EvaluationConfig, {"num_samples": 10, "seeds": "0-63"}, "seeds=0-63 are 64 images: leave out one"),
        (EvaluationConfig, {"seed": 1, "seeds": "0-63"}, "leave out one"),
        (EvaluationConfig, {"seed": -1}, "seed=-1"),
        (EvaluationConfig, {"merge": True, "shard": "1/2"}, "leave out shard="),
        (EvaluationConfig, {"devices": 0}, "devices=0"),
        (
            EvaluationConfig,
            {"scores": "fid"},
            "scores=fid is not allowed: choose one of fd, fd_inf, is, kid, kid_all",
        ),
        (EvaluationConfig, {"scores": []}, "asks for nothing"),
        (EvaluationConfig, {"reference": "missing.npz"}, "reference=missing.npz: no such file"),
        (SampleConfig, {"trajectory_seeds": 0}, "trajectory_seeds=0"),
        (SampleConfig, {"seeds": None}, "seeds=None is not understood"),
        (SampleConfig, {"seeds": []}, "is not understood"),
        (SampleConfig, {"shard": "9/8"}, "write shard=k/n"),
    ],
)
def test_bad_settings(schema, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        schema(**settings)


def test_images_per_file():
    assert [EvaluationConfig().images_per_file(m) for m in (1, 16, 48, 64, 100)] == [64, 64, 96, 64, 100]
    assert EvaluationConfig(chunk=96).images_per_file(48) == 96
    with pytest.raises(ValueError, match=r"chunk=100 is not allowed: a multiple of sampler.batch_size=48"):
        EvaluationConfig(chunk=100).images_per_file(48)
