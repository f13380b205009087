"""Cells, intervals, differences and the gap against scipy's own figures; what a report must not mix, drop or hide."""

import csv
import io
import json
import math
import shutil

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from scipy import stats

from qdm_lightning.metrics.estimate import Estimate
from qdm_lightning.reporting.collect import collect
from qdm_lightning.reporting.summary import difference, gap_closed, summarize
from qdm_lightning.reporting.tables import csv_text, excess_table, markdown, measure_table
from qdm_lightning.runs.formats import ADDED


def read(*folders, baseline=None):
    contents = collect(folders)
    groups, notes = summarize(contents.results, baseline)
    return contents, groups, notes


def cell(group, label):
    return next(cell for cell in group.cells if cell.label == label)


def test_intervals_are_students():
    values = [1.0, 2.0, 4.0]
    estimate = Estimate.of(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert math.isnan(Estimate.of([1.0]).half_width)


def test_every_cell_of_an_ablation(whole_sweep, sweep):
    contents, (group,), notes = read(whole_sweep)
    assert [c.label for c in group.cells][:4] == ["w4a4 none", "w4a4 TaQ", "w4a4 NeM", "w4a4 TaQ+NeM"]
    assert len(group.cells) == 12
    assert notes == []
    assert [name for name, _ in contents.unfinished] == ["sweep/34_w2a2_NeM_seed2", "sweep/36_never"]
    rows = list(csv.DictReader(io.StringIO(csv_text([group]))))
    for bits in (4, 3, 2):
        for method in ("TaQ", "NeM", "TaQ+NeM"):
            seeds = range(2 if (bits, method) == (2, "NeM") else 3)
            ours, theirs = (np.array([sweep.value(bits, m, seed) for seed in seeds]) for m in (method, "none"))
            interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
            row = next(r for r in rows if (r["cell"], r["measure"]) == (f"w{bits}a{bits} {method}", "fd_digits"))
            assert row["baseline"] == f"w{bits}a{bits} none"
            assert (int(row["n"]), int(row["pairs"])) == (len(seeds), len(seeds))
            assert float(row["difference"]) == pytest.approx(np.mean(ours - theirs))
            limits = [float(row["difference_low_95"]), float(row["difference_high_95"])]
            assert limits == pytest.approx([interval.low, interval.high])
            teacher = np.array([3.9 + seed / 100 for seed in seeds])
            closed = 100 * (theirs.mean() - ours.mean()) / (theirs.mean() - teacher.mean())
            assert float(row["gap_closed_percent"]) == pytest.approx(closed)
            assert float(row["std"]) == pytest.approx(np.std(ours, ddof=1))
            assert [float(row[f"seed_{seed}"]) for seed in seeds] == list(ours)
            assert float(row["speedup_linear"]) == 32 / bits - 0.1


def test_a_baseline_of_ones_own(whole_sweep):
    _, (group,), _ = read(whole_sweep, baseline="NeM")
    assert group.baselines["w3a3 TaQ"].label == "w3a3 NeM"
    _, (group,), _ = read(whole_sweep, baseline="w4a4 TaQ")
    assert {base.label for base in group.baselines.values()} == {"w4a4 TaQ"}
    with pytest.raises(ValueError, match="baseline=nothing is no cell: choose one of 'w4a4 none'"):
        read(whole_sweep, baseline="nothing")


def test_differences_take_shared_seeds_alone(sweep):
    for seed in (0, 1, 2):
        sweep.run(4, "NeM", seed)
    for seed in (1, 2, 3):
        sweep.run(4, "none", seed)
    _, (group,), _ = read(sweep.root)
    nem, none = cell(group, "w4a4 NeM"), cell(group, "w4a4 none")
    gap = difference(nem, none, "fd_digits")
    assert gap is not None
    assert gap.n == 2
    assert gap.mean == np.mean([sweep.value(4, "NeM", s) - sweep.value(4, "none", s) for s in (1, 2)])
    table = measure_table(group, "fd_digits")
    assert [row[5].text for row in table.rows] == ["is the baseline", "w4a4 none (2 of 3 seeds)"]


def test_a_single_seed_has_no_interval(sweep):
    sweep.run(4, "none", 0)
    sweep.run(4, "TaQ", 0)
    _, (group,), _ = read(sweep.root)
    for row in measure_table(group, "fd_digits").rows:
        assert [row[1].text, row[3].text, row[4].text] == ["1", "– (n = 1)", "– (n = 1)"]  # noqa: RUF001
    assert measure_table(group, "fd_digits").rows[1][7].text == "– (n = 1)"  # noqa: RUF001


def test_how_far_above_the_teacher_is_paired_by_seed(sweep):
    teachers = {0: 2.0, 1: 2.5, 2: 3.0}
    for seed, teacher in teachers.items():
        run = sweep.run(4, "NeM", seed)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["teacher"]["fd_digits"] = teacher
        (run / "metrics.json").write_text(json.dumps(metrics))
    _, groups, _ = read(sweep.root)
    excess = [100 * (sweep.value(4, "NeM", seed) - teacher) / 2.5 for seed, teacher in teachers.items()]
    low, high = stats.ttest_1samp(excess, 0).confidence_interval(0.95)
    (row,) = (row for row in csv.DictReader(io.StringIO(csv_text(groups))) if row["measure"] == "fd_digits")
    found = [float(row[f"above_teacher_{name}"]) for name in ("percent", "low_95", "high_95")]
    assert found == pytest.approx([np.mean(excess), low, high])
    (shown,) = excess_table(groups[0], "fd_digits").rows
    assert [entry.text for entry in shown] == ["w4a4 NeM", "3", f"{np.mean(excess):+.1f}", f"[{low:+.1f}, {high:+.1f}]"]


@pytest.mark.parametrize(("of_none", "of_taq", "closes"), [(3.9, 3.9, True), (99.0, 99.0, False), (3.9, 1.0, False)])
def test_no_gap_where_the_teacher_is_not_nearer_or_another(of_none, of_taq, closes, sweep):
    for method, teacher in (("none", of_none), ("TaQ", of_taq)):
        run = sweep.run(4, method, 0)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["teacher"]["fd_digits"] = teacher
        (run / "metrics.json").write_text(json.dumps(metrics))
    _, (group,), _ = read(sweep.root)
    assert (gap_closed(cell(group, "w4a4 TaQ"), cell(group, "w4a4 none"), "fd_digits") is not None) == closes


def test_a_mark_is_where_the_interval_leaves_out_zero(whole_sweep):
    _, (group,), _ = read(whole_sweep, baseline="TaQ")
    marks = {row[0].text: row[6].mark for row in measure_table(group, "fd_digits").rows}
    assert set(marks.values()) == {"", "lower", "higher"}
    for label, mark in marks.items():
        gap = difference(cell(group, label), group.baselines[label], "fd_digits")
        assert mark == ("lower" if gap.high < 0 else "higher" if gap.low > 0 else "")


def test_a_name_is_no_formula_in_a_spreadsheet(sweep):
    run = sweep.run(4, "none", 0)
    (run / "metrics.json").write_text((run / "metrics.json").read_text().replace('"fd_digits"', '"=1+1"'))
    _, groups, _ = read(sweep.root)
    assert "'=1+1" in {row["measure"] for row in csv.DictReader(io.StringIO(csv_text(groups)))}


@pytest.mark.parametrize(
    ("name", "value", "apart"),
    [
        ("num_samples", 64, True),
        ("sampler.steps", 10, True),
        ("metrics._target_", "other.Network", True),
        ("data._target_", "other.Data", True),
        ("diffusion.beta_schedule", "cosine", True),
        ("trainer.max_steps", 1200, False),
        ("data.batch_size", 8, False),
    ],
)
def test_protocols_are_kept_apart_and_other_settings_make_cells(sweep, name, value, apart):
    sweep.run(4, "none", 0)
    sweep.run(4, "none", 1, settings={name: value})
    _, groups, _ = read(sweep.root)
    assert len(groups) == (2 if apart else 1)
    assert sum(len(group.cells) for group in groups) == 2
    if not apart:
        assert [c.label for c in groups[0].cells] == [f"w4a4 none {name}={v}" for v in sorted(_values(sweep, name), key=str)]


def _values(sweep, name):
    return {run.settings[name] for run in collect([sweep.root]).runs}


def test_real_data_that_differ_are_told_by_the_floor(sweep):
    sweep.run(4, "none", 0)
    run = sweep.run(4, "none", 1)
    (run / "metrics.json").write_text((run / "metrics.json").read_text().replace("4.548263548685554", "4.8"))
    assert len(read(sweep.root)[1]) == 2


def test_paths_threads_and_tags_make_no_cell(sweep):
    sweep.run(4, "none", 0)
    sweep.run(4, "none", 1, settings={"paths.output": "x", "trainer.threads": 4, "tags": ["a"]})
    _, (group,), _ = read(sweep.root)
    assert [sorted(c.results) for c in group.cells] == [[0, 1]]


def test_variants_are_named(sweep):
    sweep.run(4, "TaQ", 0)
    sweep.run(4, "TaQ", 0, settings={"taq._target_": "qdm_lightning.quantization.taq.GroupedActivation"})
    sweep.run(4, "NeM", 0)
    sweep.run(4, "NeM", 0, settings={"nem.mode": "add"})
    _, (group,), _ = read(sweep.root)
    labels = {c.label for c in group.cells}
    assert labels == {"w4a4 TaQ(normalize)", "w4a4 TaQ(scale)", "w4a4 NeM(replace)", "w4a4 NeM(add)"}


def test_classes_of_one_name_in_two_modules_are_told_apart(sweep):
    """A class says which target it is where it is the only one of its name; elsewhere its whole path does."""
    for target in ("a.Mine", "b.Mine", "b.Other"):
        sweep.run(4, "none", 0, settings={"model._target_": target})
        sweep.run(4, "TaQ", 0, settings={"taq._target_": target})
    sweep.run(3, "none", 0, settings={"model._target_": "a.Mine"})
    _, (group,), notes = read(sweep.root)
    assert notes == []
    assert sorted(c.label for c in group.cells) == [
        "w3a3 none",
        "w4a4 TaQ(Mine) taq=a.Mine",
        "w4a4 TaQ(Mine) taq=b.Mine",
        "w4a4 TaQ(Other)",
        "w4a4 none model=Other",
        "w4a4 none model=a.Mine",
        "w4a4 none model=b.Mine",
    ]


def test_what_takes_no_step_does_not_mimic(sweep):
    """Post-training runs carry a NeM mode that nothing used; the student's own trajectory is a variant of NeM."""
    for name, method, settings in [
        ("lsq", "none", {}),
        ("nem", "NeM", {"nem.on_policy_fraction": 0.0}),
        ("on_policy", "NeM", {"nem.on_policy_fraction": 0.25}),
        ("mse", "NeM", {"quant.mode": "ptq", "quant.calibrator": {"_target_": "calibration.MSESearch"}}),
        ("minmax", "NeM", {"quant.mode": "ptq", "quant.calibrator": {"_target_": "calibration.MinMax"}}),
        ("timestep", "TaQ+NeM", {"quant.mode": "ptq", "quant.calibrator": {"_target_": "calibration.MSESearch"}}),
    ]:
        sweep.run(4, method, 0, name=name, settings=settings)
    _, (group,), _ = read(sweep.root)
    assert [c.label for c in group.cells] == [
        "w4a4 none",
        "w4a4 NeM(on policy)",
        "w4a4 NeM(replace)",
        "w4a4 PTQ quant.calibrator=MSESearch",
        "w4a4 PTQ quant.calibrator=MinMax",
        "w4a4 PTQ+TaQ",
    ]
    assert {base.label for base in group.baselines.values()} == {"w4a4 none"}


def test_the_same_seed_twice_is_said_and_folders_count_once(sweep):
    sweep.run(4, "none", 0, name="a")
    sweep.run(4, "none", 0, name="b")
    contents, (group,), notes = read(sweep.root, sweep.root / "a", sweep.root)
    assert len(contents.runs) == 2
    assert group.cells[0].results[0].run.folder.name == "b"
    assert notes == ["sweep/a/metrics.json: sweep/b is the same cell and seed, and counts"]


def test_evaluations_are_protocols_of_their_own(sweep, evaluate):
    for seed in (0, 1):
        run = sweep.run(4, "none", seed)
        evaluate(run, 10, 7.0 + seed)
        evaluate(run, 10, 5.0, "teacher")
        evaluate(run, 20, 6.0 + seed)
        evaluate(run, 20, 9.0 + seed, rounding="none")
    _, groups, _ = read(sweep.root)
    assert len(groups) == 4
    assert [g.cells[0].values("fd_digits") for g in groups[1:2]] == [{0: 7.0, 1: 8.0}]
    assert groups[1].cells[0].values("fd_digits", "teacher") == {0: 5.0, 1: 5.0}
    assert groups[2].cells[0].values("fd_digits", "teacher") == {}
    (run / "evaluations" / "student_ddim10_0" / "evaluation.json").write_text("{")
    contents, groups, _ = read(sweep.root)
    assert len(contents.notes) == 1
    assert "student_ddim10_0/evaluation.json is damaged" in contents.notes[0]


def test_a_value_that_is_not_finite_is_said(sweep):
    run = sweep.run(4, "none", 0)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["student"]["fd_digits"] = math.nan
    (run / "metrics.json").write_text(json.dumps(metrics))
    contents, groups, _ = read(sweep.root)
    assert "| not finite (nan) |" in markdown(groups, contents)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.json", "{", "metrics.json is damaged"),
        ("metrics.json", "[]", "metrics.json is damaged: it holds no JSON object"),
        ("metrics.json", '{"seed": 0, "teacher": {"fd": "x"}, "floor": {}}', "metrics.json is no run's record"),
        ("metrics.json", '{"seed": 0, "teacher": {}, "floor": {}, "student": {"nem_error": 1}}', "must be a list"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "a: 1", "config.yaml is no run's configuration"),
    ],
)
def test_damaged_records_are_named(sweep, file, text, message):
    sweep.run(4, "none", 0)
    (sweep.run(4, "none", 1) / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(sweep.root)


def test_folders_without_a_finished_run(sweep, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read(tmp_path / "none")
    (sweep.run(4, "none", 0) / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no finished run .* 1 unfinished: sweep/00_w4a4_none_seed0"):
        read(sweep.root)


def test_a_full_precision_run_and_one_without_configuration(sweep):
    run = sweep.run(4, "none", 0)
    float_run = sweep.run(4, "none", 0, name="z_float", settings={"quant.weight_bits": 32, "quant.act_bits": 32})
    metrics = json.loads((float_run / "metrics.json").read_text())
    del metrics["student"]
    (float_run / "metrics.json").write_text(json.dumps(metrics))
    shutil.copytree(run, sweep.root / "bare")
    (sweep.root / "bare" / "config.yaml").unlink()
    contents, (group,), _ = read(sweep.root)
    assert (group.cells[0].label, group.cells[0].values("fd_digits")) == ("fp32", {0: 3.9})
    assert contents.notes == ["sweep/bare has a metrics.json but no config.yaml: left out"]


def test_settings_of_an_older_version_have_the_names_of_this_one(sweep, evaluate):
    for seed, old in enumerate((False, True)):
        size, edge = ("micro_batch", "edge_bits") if old else ("batch_size", "first_last_bits")
        run = sweep.run(4, "none", seed, settings={f"quant.{edge}": 8})
        config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
        config["sampler"] = {"kind": "ddim", "steps": 50, size: 16}
        (run / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
        evaluate(run, 10, 7.0)
        [file] = run.glob("evaluations/*/evaluation.json")
        record = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps(record | {"sampler": {**record["sampler"], size: 16}}), "utf-8")
    _, groups, _ = read(sweep.root)
    assert [[(c.label, sorted(c.results)) for c in group.cells] for group in groups] == [[("w4a4 none", [0, 1])]] * 2


def test_numbers_survive_as_omegaconf_writes_them(sweep):
    run = sweep.run(4, "none", 0)
    config = OmegaConf.create({"quant": {"weight_bits": 4, "act_bits": 4}, "lr": 1e-5, "big": 1e20, "compile": "off"})
    OmegaConf.save(config, run / "config.yaml")
    settings = collect([run]).runs[0].settings
    assert settings == {"quant.weight_bits": 4, "quant.act_bits": 4, "lr": 1e-5, "big": 1e20, "compile": "off"} | ADDED
