"""What a run shows in the terminal: stages with rate and time left, and at the end a table and what to type next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Column, Table

from qdm_lightning.base import checks, signals
from qdm_lightning.base.ranks import rank

PLAIN_LINES = 10
"""Lines that a stage prints where there is no terminal to redraw."""


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours and days where there are any.

    >>> duration(5), duration(75), duration(3 * 3600 + 61), duration(25 * 3600)
    ('0:05', '1:15', '3:01:01', '1 day, 1:00:00')
    """
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")


class Stage:
    """A stage under way: a line at each tenth of it, and one at its end.

    Args:
        say: prints a line.
        clock: seconds.
        name: as it is shown.
        total: units of the whole stage.
        unit: name of a unit, such as `steps`.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float], name: str, total: int, unit: str) -> None:
        self._say, self._clock, self._begin = say, clock, clock()
        self.name, self.total, self.unit = name, total, unit
        self._done, self._before, self._printed, self._fields = 0, 0, -1, dict[str, Any]()

    def advance(self, n: int = 1, **fields: Any) -> None:
        """`n` more units are done; `fields`, such as `loss`, are shown from now on. A signal that came ends the work here."""
        signals.check()
        self._done += n
        self._fields |= fields
        self._show(self._done - n)

    def skip(self, n: int) -> None:
        """`n` units were done before, by the run that this one goes on with: they count, but not for the rate."""
        self._done = self._before = n

    def _show(self, last: int) -> None:
        """Show `_done`, which was `last` so far."""
        if self.total and self._done * PLAIN_LINES // self.total > last * PLAIN_LINES // self.total:
            self.print()

    def print(self) -> None:
        """A line, unless the last one says the same."""
        if self._printed != self._done:
            self._printed = self._done
            spent, new = self._clock() - self._begin, self._done - self._before
            rest = self.total - self._done
            left = f"{duration(spent / new * rest)} left" if new and rest > 0 else duration(spent)
            rate, shown = self._rate_and_fields()
            self._say(f"{self.name}: {self._done}/{self.total} {self.unit}, " + ", ".join(filter(None, (rate, left, shown))))

    def _rate_and_fields(self) -> tuple[str, str]:
        """Units done by this run per second, and the fields."""
        seconds = self._clock() - self._begin
        rate = f"{(self._done - self._before) / seconds:.3g}" if seconds > 0 else "-"
        fields = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in self._fields.items())
        return f"{rate} {self.unit}/s", "  ".join(fields)


class _Bar(Stage):
    """A bar among others on a terminal, in place of lines."""

    def __init__(self, shown: bars.Progress, *stage: Any) -> None:
        super().__init__(*stage)
        self._bars, self._task = shown, shown.add_task(self.name, total=self.total, rate="", shown="")

    def skip(self, n: int) -> None:
        super().skip(n)
        self._bars.reset(self._task, completed=n)

    def _show(self, last: int) -> None:
        rate, shown = self._rate_and_fields()
        self._bars.update(self._task, completed=self._done, rate=rate, shown=shown)


class Progress:
    """Shows the stages of a run: bars on a terminal, about ten lines a stage elsewhere, nothing with `mode="silent"`.

    Args:
        mode: `bars`, `plain`, `silent`, or None: bars on a terminal, plain elsewhere, silent on all ranks but the first.
        console: where to write; None is stdout.
        clock: seconds.

    Attributes:
        started: True once a first stage began.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self, mode: str | None = None, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(soft_wrap=True)
        self.mode = mode or ("silent" if rank() else "bars" if self.console.is_terminal else "plain")
        checks.one_of("mode", self.mode, ("bars", "plain", "silent"))
        self.started, self._clock = False, clock
        self._bars: bars.Progress | None = None

    def say(self, text: str) -> None:
        """Print a line between the stages, or above the bars; nothing with `mode="silent"`."""
        if self.mode != "silent":
            self.console.print(checks.visible(text), markup=False, highlight=False)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Stage]:
        """Show a stage of `total` units (such as `steps`) while the block runs; stages may lie inside one another."""
        self.started = True
        stage = (self.say, self._clock, name, total, unit)
        if self.mode != "bars":
            plain = Stage(*stage)
            yield plain
            plain.print()
        elif self._bars is not None:  # below the bars of the outermost stage
            yield _Bar(self._bars, *stage)
        else:
            columns = (
                bars.SpinnerColumn(finished_text="[green]✓"),
                bars.TextColumn("{task.description:20}"),
                bars.BarColumn(bar_width=24),
                bars.MofNCompleteColumn(),
                bars.TextColumn("{task.fields[rate]}"),
                bars.TimeElapsedColumn(),
                bars.TextColumn("left"),
                bars.TimeRemainingColumn(),
                bars.TextColumn("[dim]{task.fields[shown]}"),
            )
            try:
                with bars.Progress(*columns, console=self.console, refresh_per_second=4) as self._bars:
                    yield _Bar(self._bars, *stage)
            finally:
                self._bars = None


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-" if value is None else str(value)


def closing_table(metrics: Mapping[str, Any]) -> Table:
    """Table `teacher | student | ratio` of the measurements (floats) in `metrics` (as in metrics.json)."""
    teacher, student = metrics.get("teacher") or {}, metrics.get("student") or {}
    columns = ("teacher", "student", "ratio") if student else ("teacher",)
    table = Table("", *(Column(name, justify="right") for name in columns))
    for name in dict.fromkeys([*teacher, *student]):
        values = (teacher.get(name), student.get(name))
        floats = [value for value in values if isinstance(value, float)]
        ratio = f"{floats[1] / floats[0]:.2f}" if len(floats) == 2 and floats[0] else "-"
        if floats:
            table.add_row(name, *(*map(_number, values), ratio)[: len(columns)])
    return table


def print_closing(
    metrics: Mapping[str, Any], run_dir: Path, following: Sequence[tuple[str, str]] = (), console: Console | None = None
) -> None:
    """Print the table, where the pictures are, and what to type next.

    Args:
        metrics: as in metrics.json.
        run_dir: folder of the run.
        following: (command, what it does).
    """
    if rank():
        return
    console = console or Console(soft_wrap=True)
    console.print(closing_table(metrics))
    rows = " (teacher above student, same seeds)" if metrics.get("student") else ""
    floor = [f"{name} {_number(value)} of as many real images" for name, value in metrics.get("floor_at_size", {}).items()]
    trial = ["a trial: these numbers mean nothing"] if metrics.get("trial") else []
    unmeasured = [str(metrics["unmeasured"])] if "unmeasured" in metrics else []
    lines = [*trial, *unmeasured, *floor, f"pictures: {run_dir / 'samples.png'}{rows}", f"all else: {run_dir}"]
    console.print("\n".join([*lines, *following_lines(following)]), markup=False, highlight=False)


def console() -> Console:
    """The terminal; a file or pipe, which has no width of its own, gets 200 columns."""
    screen = Console(soft_wrap=True)
    return screen if screen.is_terminal else Console(soft_wrap=True, width=200)


def following_lines(following: Sequence[tuple[str, str]]) -> list[str]:
    """What to type next, as lines to print; `following` has (command, what it does)."""
    wide = max((len(command) for command, _ in following), default=0)
    return ["next:", *(f"  {command:{wide}}  {what}" for command, what in following)] if following else []
