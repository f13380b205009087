"""What a run shows, against a console in memory and a clock that is moved by hand."""

import io

import pytest
from rich.console import Console

from qdm_lightning.base.ranks import rank
from qdm_lightning.display.progress import Progress, closing_table, print_closing


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def text(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_plain_lines_at_each_tenth_with_rate_and_time_left(console):
    clock = Clock()
    progress = Progress("plain", console, clock)
    with progress.stage("student", 300, "steps") as stage:
        for step in range(300):
            clock.now += 0.5
            stage.advance(loss=1 / (step + 1))
    lines = text(console).splitlines()
    assert len(lines) == 10
    assert lines[0] == "student: 30/300 steps, 2 steps/s, 2:15 left, loss 0.03333"
    assert lines[-1] == "student: 300/300 steps, 2 steps/s, 2:30, loss 0.003333"


@pytest.mark.parametrize("total", [1, 3, 7, 10, 11, 95, 1234])
def test_plain_prints_at_most_a_dozen_lines_and_the_last_unit(total, console):
    with Progress("plain", console).stage("sampling", total, "steps") as stage:
        for _ in range(total):
            stage.advance()
    lines = text(console).splitlines()
    assert 1 <= len(lines) <= 12
    assert f"{total}/{total} steps" in lines[-1]


def test_what_was_done_before_does_not_count_for_the_rate(console):
    clock = Clock()
    with Progress("plain", console, clock).stage("student", 100, "steps") as stage:
        stage.skip(80)
        clock.now = 10.0
        stage.advance(10)
    assert text(console) == "student: 90/100 steps, 1 steps/s, 0:10 left\n"


@pytest.mark.parametrize("mode", ["plain", "bars", "silent"])
def test_stages_inside_one_another_and_after_an_error(mode, console):
    progress = Progress(mode, console)
    assert not progress.started
    with pytest.raises(RuntimeError), progress.stage("student", 2, "steps") as outer:  # noqa: PT012
        outer.advance(loss="0.1")
        with progress.stage("sampling", 1, "steps") as inner:
            inner.advance()
        progress.say("a line with [brackets]")
        raise RuntimeError
    with progress.stage("next", 1, "steps") as stage:
        stage.skip(1)
    assert progress.started
    shown = text(console)
    assert all((word in shown) == (mode != "silent") for word in ("sampling", "next", "a line with [brackets]"))


def test_bars_name_the_stage_rate_and_fields(console):
    clock = Clock()
    with Progress("bars", console, clock).stage("calibration", 4, "batches") as stage:
        clock.now = 2.0
        stage.advance(4, error=0.25)
    line = " ".join(text(console).split())
    for part in ("calibration", "4/4", "2 batches/s", "left", "error 0.25"):
        assert part in line


def test_mode_is_chosen_by_terminal_and_rank(monkeypatch, console):
    assert Progress(console=console).mode == "plain"
    assert Progress(console=Console(file=io.StringIO(), force_terminal=True)).mode == "bars"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert rank() == 1
    assert Progress(console=console).mode == "silent"
    with pytest.raises(ValueError, match="bars, plain, silent"):
        Progress("loud")


METRICS = {
    "floor": {"fd_digits": 4.55},
    "floor_at_size": {"fd_digits": 2.8},
    "teacher": {"fd_digits": 10.0},
    "student": {"bits": [4, 4], "steps": 1200, "fd_digits": 15.0, "image_mse": 0.03, "nem_error": [1.0, 2.0]},
    "seconds": {"teacher": 1.0},
}


def test_table_of_teacher_student_ratio(console):
    console.print(closing_table(METRICS))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text(console).splitlines() if "│" in line]
    assert rows == [["fd_digits", "10", "15", "1.50"], ["image_mse", "-", "0.03", "-"]]


def test_table_of_a_teacher_alone(console):
    table = closing_table({"floor": {}, "teacher": {"fd_digits": 10.0}})
    assert [column.header for column in table.columns] == ["", "teacher"]


def test_closing_says_where_and_what_next(console, tmp_path, monkeypatch):
    print_closing(METRICS, tmp_path, [("qdm-train quant=w3a3", "fewer bits")], console)
    shown = text(console)
    assert "fd_digits 2.8 of as many real images\n" in shown
    assert f"pictures: {tmp_path / 'samples.png'} (teacher above student, same seeds)\n" in shown
    assert "  qdm-train quant=w3a3  fewer bits\n" in shown
    assert "trial" not in shown
    monkeypatch.setenv("RANK", "1")
    print_closing(METRICS, tmp_path, console=console)
    assert text(console) == shown


def test_closing_warns_of_a_trials_numbers(console, tmp_path):
    print_closing({**METRICS, "trial": True}, tmp_path, console=console)
    assert "a trial: these numbers mean nothing\n" in text(console)
