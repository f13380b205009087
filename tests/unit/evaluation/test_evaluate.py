"""An evaluation is a function of checkpoint, seeds and protocol: not of shards, order, interruptions or damage."""

import json
import random
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch

from qdm_lightning.base.checks import UserError
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.models.image_sampler import ImageSampler

SETTINGS = ["num_samples=88", "chunk=16"]
TIMES = {"finished", "seconds", "git", "run", "name"}


def measured(run, *overrides):
    return evaluate(run, [*SETTINGS, *overrides], Progress("silent"))


def same(a, b):
    assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}


def count_drawn(monkeypatch):
    drawn, draw = [], ImageSampler.draw

    def counting(self, seeds, *args):
        drawn.extend(seeds)
        return draw(self, seeds, *args)

    monkeypatch.setattr(ImageSampler, "draw", counting)
    return drawn


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    return measured(tiny_run, f"out={tmp_path_factory.mktemp('whole')}").record


def test_it_scores_what_the_run_scored(tiny_run, tmp_path):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    for who in ("student", "teacher"):
        record = evaluate(tiny_run, [f"network={who}", f"out={tmp_path / who}"], Progress("silent")).record
        assert record["scores"]["fd_digits"] == pytest.approx(metrics[who]["fd_digits"], rel=1e-9)
        assert record["floor"]["fd_digits"] == pytest.approx(metrics["floor"]["fd_digits"], rel=1e-9)
        assert record["images"]["count"] == 64


def test_the_record(whole, tiny_run):
    of_features = {f"{name}_digits" for name in ("precision", "recall", "density", "coverage")}
    assert set(whole["scores"]) == {"fd_digits", "score_digits", "score_digits_std", "kd_digits_all", *of_features}
    assert whole["left_out"] == {
        "fd_inf": "130 images are needed, not 88: type num_samples=130 or more",
        "kid": "1000 images are needed, not 88: type num_samples=1000 or more",
    }
    halves = whole["floor"]["fd_digits"]
    assert whole["floor_at_size"]["fd_digits"] == pytest.approx(halves * (1 / 88 + 1 / 1500) / (2 / 750))
    assert whole["images"]["seeds"] == "0-87"
    assert whole["origin"]["file"] == "checkpoints/best.ckpt"
    assert (whole["origin"]["weights"], len(whole["origin"]["sha256"])) == ("ema", 64)
    assert (whole["reference"]["count"], len(whole["reference"]["source"])) == (1500, 64)
    assert len(whole["metric"]["weights_sha256"]) == 64
    assert whole["protocol"]["rounding"].startswith("uint8: round")
    assert whole["protocol"]["resize"] is None
    assert (whole["sampler"]["steps"], whole["network_calls"]) == (4, 4)
    assert {"torch", "python"} <= set(whole["versions"])
    assert {"sampling", "features", "scores"} == set(whole["seconds"])
    assert datetime.fromisoformat(whole["finished"]).utcoffset() == timedelta(0)
    assert whole["drawn_on"][0]["threads"] == 1


@pytest.mark.parametrize("count", [2, 3])
def test_shards_in_any_order_make_the_same(count, run_copy, whole, monkeypatch):
    drawn = count_drawn(monkeypatch)
    order = list(range(1, count + 1))
    random.Random(count).shuffle(order)
    for shard in order[1:]:
        assert measured(run_copy, f"shard={shard}/{count}").record is None
    with pytest.raises(UserError, match=r"of 88 images are missing, the first has seed .*leave out merge=true"):
        measured(run_copy, "merge=true")
    measured(run_copy, f"shard={order[0]}/{count}")
    assert sorted(drawn) == list(range(88))
    same(measured(run_copy, "merge=true").record, whole)
    assert len(drawn) == 88
    assert json.loads((run_copy / "evaluation.json").read_text())["identity"] == whole["identity"]


def test_repeats_are_scored_on_disjoint_sets_of_images(run_copy, whole):
    alone = [whole["scores"], measured(run_copy, "seeds=88-175").record["scores"]]
    done = measured(run_copy, "repeats=2")
    record = done.record
    assert (record["images"]["seeds"], record["images"]["count"], record["protocol"]) == ("0-175", 176, whole["protocol"])
    for name, found in record["repeats"]["scores"].items():
        values = [scores[name] for scores in alone]
        assert found["values"] == values
        assert record["scores"][name] == found["mean"] == pytest.approx(np.mean(values))
        t_of_one_degree = 12.7062047
        assert found["half_width"] == pytest.approx(t_of_one_degree * np.std(values, ddof=1) / np.sqrt(2), rel=1e-8)
    assert "n88x2" in done.folder.name
    assert json.loads((run_copy / "evaluation.json").read_text())["repeats"]["count"] == 2


def test_done_is_done(run_copy, monkeypatch):
    first = measured(run_copy)
    drawn = count_drawn(monkeypatch)
    assert measured(run_copy).record == first.record
    more = evaluate(run_copy, ["num_samples=96", "chunk=16"], Progress("silent"))
    assert drawn == list(range(80, 96))  # whole chunks are shared with the smaller evaluation
    assert more.folder != first.folder


def test_damage_is_found_and_made_again(run_copy, whole, capsys):
    measured(run_copy, "shard=1/1")
    files = sorted(run_copy.rglob("features_digits_*/*.npz"))
    images = sorted(run_copy.rglob("images/*.npz"))
    assert (len(files), len(images)) == (6, 6)
    files[2].write_bytes(files[2].read_bytes()[:-30])
    files[4].unlink()
    broken = bytearray(images[4].read_bytes())
    broken[400] ^= 1
    images[4].write_bytes(bytes(broken))
    with pytest.raises(UserError, match="is damaged"):
        measured(run_copy, "merge=true")
    same(evaluate(run_copy, SETTINGS, Progress("plain")).record, whole)
    assert capsys.readouterr().out.count("it is made again") == 2


def test_other_surroundings_are_a_warning_that_the_record_keeps(run_copy, whole, monkeypatch):
    measured(run_copy, "shard=1/2")
    monkeypatch.setattr(
        "qdm_lightning.evaluation.feature_cache.drawn_on", lambda image_sampler: {**whole["drawn_on"][0], "threads": 7}
    )
    record = measured(run_copy).record
    assert [place["threads"] for place in record["drawn_on"]] == [1, 7]
    assert record["warnings"] == ["images were drawn in different surroundings (threads): their last bits may differ"]


def test_too_few_images_are_a_warning_that_the_record_keeps(run_copy, capsys):
    record = evaluate(run_copy, ["num_samples=64"], Progress("plain")).record
    line = "64 images for 64 features: their covariance is singular, and the Frechet distance biased upwards"
    assert record["warnings"] == [line]
    assert f"warning: {line}" in capsys.readouterr().out
    assert evaluate(run_copy, ["num_samples=64", "scores=is"], Progress("silent")).record["warnings"] == []


def test_the_reference_ends_complete_whether_computed_or_cached(run_copy, tmp_path, capsys):
    for out in ("computed", "cached"):
        places = [f"paths.cache={tmp_path}", f"out={run_copy / out}"]
        evaluate(run_copy, ["num_samples=16", "scores=fd", *places], Progress("plain"))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reference:")]
        assert lines[-1].startswith("reference: 1500/1500 images")
        assert (len(lines) == 1) == (out == "cached")


def test_images_need_not_be_kept_and_then_serve_other_metrics(run_copy, whole, monkeypatch):
    without = measured(run_copy, "keep_images=false", f"out={run_copy / 'other'}")
    same(without.record, whole)
    assert not list((run_copy / "other").rglob("images"))
    measured(run_copy)
    drawn = count_drawn(monkeypatch)
    again = measured(run_copy, "metrics=custom", f"metrics._target_={__name__}.Pixels").record
    assert not drawn
    of_features = {f"{name}_pixels" for name in ("precision", "recall", "density", "coverage")}
    assert set(again["scores"]) == {"fd_pixels", "fd_pixels_inf", "kd_pixels_all", *of_features}
    assert again["left_out"]["is"] == "pixels has no class logits"


class Pixels(torch.nn.Module):
    name = "pixels"
    dim = 4

    def forward(self, images):
        return images.float().unflatten(3, (4, 2)).mean((1, 2, 4)) / 255


def test_ema_raw_and_best_last_differ_in_the_record(run_copy):
    ema, raw = (measured(run_copy, f"weights={w}", "checkpoint=last").record for w in ("ema", "raw"))
    assert ema["origin"]["sha256"] == raw["origin"]["sha256"]
    assert ema["origin"]["file"] == "checkpoints/last.ckpt"
    assert ema["scores"] != raw["scores"]
    assert ema["identity"] != raw["identity"]
    with pytest.raises(UserError, match="network=teacher keeps no raw weights"):
        measured(run_copy, "weights=raw", "network=teacher")


def test_results_of_other_protocols_are_refused_before_anything_is_drawn(run_copy, monkeypatch):
    measured(run_copy)
    small = evaluate(run_copy, ["num_samples=32"], Progress("silent"))
    drawn = count_drawn(monkeypatch)
    with pytest.raises(UserError, match=r"another protocol \(num_samples 48 against 32\)"):
        evaluate(run_copy, ["num_samples=48", f"against={small.folder}"], Progress("silent"))
    assert not drawn
    forced = evaluate(run_copy, ["num_samples=48", f"against={small.folder}", "force=true"], Progress("silent"))
    assert [r["protocol"]["num_samples"] for r in forced.others] == [32]
    teacher = measured(run_copy, "network=teacher")
    assert [r["network"] for r in teacher.others] == ["student"]
    assert [r["network"] for r in measured(run_copy, "scores=fd").others] == ["teacher"]  # not the student once more


def test_a_result_is_never_overwritten_by_another(run_copy):
    first = measured(run_copy, f"out={run_copy / 'mine'}")
    with pytest.raises(UserError, match=r"holds the result of another evaluation .*give another folder"):
        measured(run_copy, f"out={run_copy / 'mine'}", "sampler.steps=3")
    assert json.loads((run_copy / "mine" / "evaluation.json").read_text()) == first.record


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scores=kid"], "scores=kid cannot be had: 1000 images are needed, not 88"),
        (["quant=w2a2"], "quant=w2a2 belongs to training"),
        (["trainer.max_steps=3"], "trainer.max_steps=3 belongs to training"),
        (["data.flip=true"], "data.flip=true belongs to the run.*data.root="),
        (["data=images"], "data=images belongs to the run"),
        (["sampler.steps=1001"], "at most 1000"),
        (["chunk=17"], "a multiple of sampler.batch_size=16"),
        (["metrics=resnet20"], "type metrics.weights="),
        (["accelerator=cuda"], "accelerator=cuda"),
        (["checkpoint=best", "run=nowhere"], "run=nowhere is not a folder"),
    ],
)
def test_bad_input(overrides, message, run_copy, monkeypatch):
    drawn = count_drawn(monkeypatch)
    with pytest.raises((UserError, ValueError, FileNotFoundError), match=message):
        measured(run_copy, *overrides)
    assert not drawn
    assert not (run_copy / "evaluation.json").exists()


def test_imported_statistics(run_copy, tmp_path, whole):
    np.savez(tmp_path / "published.npz", mu=np.zeros(64), sigma=np.eye(64))
    record = measured(run_copy, f"reference={tmp_path / 'published.npz'}").record
    assert set(record["scores"]) == {"fd_digits", "score_digits", "score_digits_std"}
    assert record["reference"]["count"] is None
    assert record["reference"]["from"] == str(tmp_path / "published.npz")
    assert record["protocol"] != whole["protocol"]
    with pytest.raises(UserError, match="scores=prc cannot be had: the reference holds mean and covariance alone"):
        measured(run_copy, f"reference={tmp_path / 'published.npz'}", "scores=prc")
