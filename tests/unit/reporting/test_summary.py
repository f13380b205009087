"""The table over seeds, against scipy's own interval, and the report command."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from qdm_lightning.report import main
from qdm_lightning.reporting.summary import Estimate, cells, difference

VALUES = {("w4a4", "qdm"): [3.0, 3.5, 2.5], ("w4a4", "lsq"): [4.0, 4.25, 4.0], ("w3a3", "qdm"): [9.0, 8.0, 10.0]}


@pytest.fixture
def sweep(tmp_path):
    for (bits, tag), values in VALUES.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"{bits}_{tag}_{seed}"
            folder.mkdir()
            width, mode = bits[1], "replace" if tag == "qdm" else "off"
            config = (
                f"seed: {seed}\ntags: [x, {tag}]\nquant: {{weight_bits: {width}, act_bits: {width}}}\nnem: {{mode: {mode}}}\n"
            )
            (folder / "config.yaml").write_text(config)
            student = {"fd_digits": value, "image_mse": value / 100, "nem_error": [0.1, 0.3], "val_loss": 1.0}
            metrics = {"floor": {"fd_digits": 1.0}, "teacher": {"fd_digits": 2.0}, "student": student}
            (folder / "metrics.json").write_text(json.dumps({**metrics, "seed": seed, "seconds": {"student": 5}}))
    return tmp_path


def test_intervals_are_students():
    values = [1.0, 2.0, 4.0]
    estimate = Estimate.of(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert estimate.mean - estimate.half_width == pytest.approx(low)
    assert estimate.mean + estimate.half_width == pytest.approx(high)
    assert math.isnan(Estimate.of([1.0]).deviation)


def test_the_report_of_a_sweep(sweep, capsys):
    assert main([str(sweep), "--baseline", "w4a4 lsq"]) == 0
    shown = capsys.readouterr().out
    assert shown == (sweep / "results.md").read_text()
    assert "| w4a4 qdm | 3 | 3 ± 0.5 |" in shown
    paired = np.array(VALUES["w4a4", "qdm"]) - np.array(VALUES["w4a4", "lsq"])
    assert f"{paired.mean():+.3g} ± {Estimate.of(paired).half_width:.2g} (95 %)" in shown
    rows = (sweep / "results.csv").read_text().splitlines()
    assert len(rows) == 10
    assert rows[0] == "cell,seed,run,fd_digits,image_mse,nem_error,seconds"


def test_differences_take_shared_seeds_alone(sweep):
    from qdm_lightning.report import find_runs

    found = {cell.label: cell for cell in cells(find_runs([sweep]))}
    assert sorted(found) == ["w3a3 qdm", "w4a4 lsq", "w4a4 qdm"]
    found["w4a4 lsq"].runs.pop()
    gap = difference(found["w4a4 qdm"], found["w4a4 lsq"], "fd_digits")
    assert gap is not None
    assert gap.n == 2


def test_bad_input_is_one_line(tmp_path, sweep, capsys):
    for arguments in ([str(tmp_path / "none")], [str(sweep), "--baseline", "nonsense"]):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
