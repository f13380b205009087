"""The tables of a report as plain text cells, and their Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from qdm_lightning.metrics.estimate import Estimate
from qdm_lightning.reporting.collect import Contents, Result, Run
from qdm_lightning.reporting.labels import IGNORED, grouped, varying
from qdm_lightning.reporting.summary import Cell, Group, above_teacher, all_cells, difference, gap_closed

ABSENT = "–"  # noqa: RUF001 - an en dash stands for no value
COSTS = ("macs", "bytes", "float_bytes", "speedup.linear", "speedup.bops", "speedup.bops64")
FORMULAS = {
    "95 % interval": "mean ± t(0.975, n - 1) · std / √n over the n seeds of a cell (Student's t; std with n - 1)",
    "difference": "mean of cell - baseline over the seeds that both have, with the same interval: paired by seed",
    "above teacher": "100 · (cell - teacher) / mean of the teacher's distance, in percent, paired by seed, with its interval",
    "gap closed": "100 · (baseline - cell) / (baseline - teacher) of the distance, in percent; each is the mean over the seeds "
    "that cell and baseline share; no value where the teacher is not nearer than the baseline, or teachers differ",
    "nem_error": "L_NeM = ||eps_FP(x_t, t) - eps_Q(x_t, t)||² on the validation set, mean over ten ranges of t",
    "image_mse": "mean squared difference between student's and teacher's image of the same seed, pixels in [-1, 1]",
    "linear": "speed-up in theory by MACs · b/32, b the wider of a product's two operands",
    "bops": "speed-up in theory by bit operations: MACs · b · b', full precision as 32 · 32",
    "bops64": "speed-up in theory by bit operations / 64 + what stays float",
}
"""What the words of a report mean, exactly."""


@dataclass(frozen=True)
class Entry:
    """A table's cell: text, a number to sort by where it is one, and `lower` or `higher` where an interval excludes 0."""

    text: str
    number: float | None = None
    mark: str = ""

    @property
    def sort_key(self) -> str:
        """What JavaScript sorts by: a number where it is one."""
        return "" if self.number is None or not math.isfinite(self.number) else repr(float(self.number))


@dataclass(frozen=True)
class Table:
    """A caption, a head, and rows whose first entry names them; `words` where most entries are no numbers."""

    caption: str
    head: list[str]
    rows: list[list[Entry]]
    words: bool = False


SINGLE = Entry(f"{ABSENT} (n = 1)")
"""In place of what a single seed does not have."""


def _digits(value: float, digits: int = 4, sign: str = "") -> str:
    """So many significant digits, zeros at the end included, so that a column is one precision."""
    return f"{value:{sign}#.{digits}g}".removesuffix(".")


def number(value: float, digits: int = 4) -> Entry:
    """`value` to `digits` significant digits; what is not finite is said."""
    return Entry(_digits(value, digits) if math.isfinite(value) else f"not finite ({value})", value)


def _interval(estimate: Estimate, sign: str = "") -> Entry:
    if estimate.n < 2:
        return SINGLE
    return Entry(f"[{_digits(estimate.low, sign=sign)}, {_digits(estimate.high, sign=sign)}]", estimate.half_width)


def _statistics(estimate: Estimate) -> list[Entry]:
    """The entries of `n`, `mean` and `std`."""
    std = number(estimate.std, 2) if estimate.n > 1 else SINGLE
    return [Entry(str(estimate.n), estimate.n), number(estimate.mean), std]


def measure_table(group: Group, measure: str) -> Table:
    """A row a cell: seeds, mean, std, interval, difference to the baseline with its interval, gap closed."""
    gaps = measure in group.distances and any(cell.values(measure, "teacher") for cell in group.cells)
    head = ["cell", "n", "mean", "std", "95 % interval"]
    if group.baselines:
        head += ["baseline", "difference", "95 % of the difference", *(["gap closed, %"] if gaps else [])]
    rows = []
    for cell in group.measured(measure):
        estimate = cell.estimate(measure)
        versus = _versus(cell, group.baselines.get(cell.label), measure, gaps) if group.baselines else []
        rows.append([Entry(cell.label), *_statistics(estimate), _interval(estimate), *versus])
    return Table(f"{measure}, protocol {group.name}", head, rows)


def _versus(cell: Cell, baseline: Cell | None, measure: str, gaps: bool) -> list[Entry]:
    gap = difference(cell, baseline, measure) if baseline and baseline is not cell else None
    if baseline is None or gap is None:
        reason = (
            "is the baseline" if baseline is cell else f"{baseline.label}: no common seed" if baseline else "none of its kind"
        )
        return [Entry(reason), *[Entry(ABSENT)] * (3 if gaps else 2)]
    own = len(cell.values(measure))
    pairs = f" ({gap.n} of {own} seeds)" if gap.n < own else ""
    mark = "lower" if gap.high < 0 else "higher" if gap.low > 0 else ""  # neither where they are NaN, for one seed
    shown = Entry(_digits(gap.mean, sign="+"), gap.mean, mark) if math.isfinite(gap.mean) else number(gap.mean)
    closed = gap_closed(cell, baseline, measure) if gaps else None
    closure = [Entry(ABSENT) if closed is None else Entry(f"{closed:.1f}", closed)] if gaps else []
    return [Entry(baseline.label + pairs), shown, _interval(gap, "+"), *closure]


def excess_table(group: Group, distance: str) -> Table | None:
    """How far each cell lies above its teacher, percent; None where no teacher was measured."""
    found = [(cell, above_teacher(cell, distance)) for cell in group.measured(distance)]
    rows = [
        [Entry(cell.label), Entry(str(above.n), above.n), Entry(f"{above.mean:+.1f}", above.mean), _percent(above)]
        for cell, above in found
        if above is not None and math.isfinite(above.mean)
    ]
    head = ["cell", "n", "above teacher, %", "95 % interval"]
    return Table(f"{distance} above the teacher's, protocol {group.name}", head, rows) if rows else None


def _percent(estimate: Estimate) -> Entry:
    return SINGLE if estimate.n < 2 else Entry(f"[{estimate.low:+.1f}, {estimate.high:+.1f}]", estimate.half_width)


def reference_table(group: Group) -> Table | None:
    """What bounds the distances: the teacher's over the seeds, and that of real images."""
    rows = []
    for name in group.distances:
        teacher, floor = group.teacher(name), group.floor(name)
        if teacher:
            rows.append([Entry(f"teacher, {name}"), *_statistics(teacher)])
        if floor is not None:
            rows.append([Entry(f"{floor[0]}, {name}"), Entry(ABSENT), number(floor[1]), Entry(ABSENT)])
    return Table(f"What bounds the distances, protocol {group.name}", ["", "n", "mean", "std"], rows) if rows else None


def cost_table(cells: Sequence[Cell]) -> Table | None:
    """Cost of an image and step, and bytes stored; None where no run has a student."""
    rows = [[Entry(cell.label), *(_cost(cell, name) for name in COSTS)] for cell in cells if any(map(cell.cost, COSTS))]
    head = ["cell", "MACs", "bytes stored", "bytes in float32", "speed-up, linear", "speed-up, bops", "speed-up, bops64"]
    return Table("Cost of a student for one image and step", head, rows) if rows else None


def _cost(cell: Cell, name: str) -> Entry:
    values = cell.cost(name)
    texts = [f"{value:.2f}" if name.startswith("speedup") else f"{value:,.0f}" for value in (*values[:1], *values[1:][-1:])]
    return Entry(" to ".join(texts), values[0]) if values else Entry(ABSENT)


def settings_table(cells: Sequence[Cell]) -> Table:
    """Settings in which the runs differ, a row a cell; several values in one cell are all given."""
    names = varying([run for cell in cells for run in cell.runs])
    rows = [
        [
            Entry(cell.label),
            *(Entry(", ".join(dict.fromkeys(str(run.settings.get(name, "not set")) for run in cell.runs))) for name in names),
        ]
        for cell in cells
    ]
    return Table("Settings that differ between the cells", ["cell", *names], rows, words=True)


def common_settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Settings that all runs share; those of the machine alone (paths, loggers, threads) are left out."""
    names = sorted({name for run in runs for name in run.settings if not name.startswith(IGNORED)} - set(varying(runs)))
    return [(name, str(runs[0].settings.get(name))) for name in names if name != "teacher.seed"]


def runs_table(groups: Sequence[Group]) -> Table:
    """Every result that counts: a row a run and protocol."""
    measures = list(dict.fromkeys(measure for group in groups for measure in group.measures))
    head = ["cell", "seed", "protocol", *measures, "seconds of the run", "commit", "file"]
    rows = [
        [
            Entry(cell.label),
            Entry(str(seed), seed),
            Entry(group.name),
            *(number(result.scores[name]) if name in result.scores else Entry(ABSENT) for name in measures),
            Entry(f"{result.run.seconds:.0f}", result.run.seconds),
            Entry(_commit(result)),
            Entry(f"{result.run.name}/{result.source}"),
        ]
        for group in groups
        for cell in group.cells
        for seed, result in sorted(cell.results.items())
    ]
    return Table("Results that count, by run", head, rows, words=True)


def _commit(result: Result) -> str:
    git = result.record.get("git")
    return f"{str(git.get('commit'))[:9]}{' + changes' if git.get('changed') else ''}" if isinstance(git, dict) else ABSENT


def surroundings(group: Group) -> list[str]:
    """Versions and hardware in which the results of a table differ, a line each: the reader judges."""
    facts = dict.fromkeys(
        (f"{part}: {name}", str(value))
        for result in group.results
        for part in ("versions", "hardware")
        for name, value in (result.record.get(part) or {}).items()
    )
    by_name = grouped(facts, lambda fact: fact[0])
    return [f"{name} {' and '.join(sorted(value for _, value in own))}" for name, own in by_name.items() if len(own) > 1]


def protocol_differences(group: Group, groups: Sequence[Group]) -> list[str]:
    """Entries of the group's protocol that tell it from the others: who measured, and what differs among those that did so."""
    alike = [other for other in groups if other.protocol["measured"] == group.protocol["measured"]]
    names = dict.fromkeys(name for other in alike for name in other.protocol)
    differing = [name for name in names if len({repr(other.protocol.get(name)) for other in alike}) > 1]
    return ["measured", *differing] if len(groups) > 1 else []


def markdown(groups: Sequence[Group], contents: Contents) -> str:
    """The tables of every protocol, their formulas, and what was left out."""
    lines = [f"# {len(contents.runs)} runs", ""]
    if contents.unfinished:
        lines += [f"## {len(contents.unfinished)} failed or unfinished", ""]
        lines += [f"* {_plain(name)}: {_plain(state)}" for name, state in contents.unfinished] + [""]
    lines += [f"* left out: {_plain(note)}" for note in contents.notes]
    for group in groups:
        lines += ["", f"## Protocol {group.name}: {_plain(group.title)}", ""]
        entries = [name for name in protocol_differences(group, groups) if name in group.protocol]
        if entries:
            differing = ", ".join(f"{name} {_plain(str(group.protocol[name]))}" for name in entries)
            lines += [f"Not comparable with other protocols; what differs: {differing}.", ""]
        lines += [f"Differing surroundings: {_plain(line)}." for line in surroundings(group)]
        for name in group.measures:
            lines += _markdown(measure_table(group, name))
        lines += [line for name in group.distances for line in _markdown(excess_table(group, name))]
        lines += _markdown(reference_table(group))
    lines += [*_markdown(cost_table(all_cells(groups))), *(f"* {name}: {text}" for name, text in FORMULAS.items())]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text in which Markdown and HTML find nothing to interpret."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.split())


def _markdown(table: Table | None) -> list[str]:
    """The table below its caption, and an empty line; nothing without a table."""
    if table is None:
        return []
    return [f"**{_plain(table.caption)}**", "", *markdown_table(table.head, [[e.text for e in row] for row in table.rows]), ""]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, in whose cells nothing is left to interpret."""
    return [f"| {' | '.join(map(_plain, row))} |" for row in (head, ["---"] * len(head), *rows)]


def csv_text(groups: Sequence[Group]) -> str:
    """A row for each protocol, cell and measure: over seeds, against the baseline, cost, and the value of each seed."""
    seeds = sorted({seed for group in groups for cell in group.cells for seed in cell.results})
    names = ["protocol", "title", "cell", "measure", "n", "mean", "std", "low_95", "high_95", "baseline", "pairs", "difference"]
    names += ["difference_low_95", "difference_high_95", "gap_closed_percent"]
    names += [
        "above_teacher_percent",
        "above_teacher_low_95",
        "above_teacher_high_95",
        *(name.replace(".", "_") for name in COSTS),
    ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*names, *(f"seed_{seed}" for seed in seeds)], lineterminator="\n")
    writer.writeheader()
    for group in groups:
        writer.writerows(_csv_row(group, cell, name) for cell in group.cells for name in group.measures if cell.values(name))
    return stream.getvalue()


def _csv_row(group: Group, cell: Cell, measure: str) -> dict[str, object]:
    """Column to value, without the columns that have none."""
    estimate, baseline = cell.estimate(measure), group.baselines.get(cell.label)
    texts = {"protocol": group.name, "title": group.title, "cell": cell.label, "measure": measure}
    texts |= {"baseline": baseline.label} if baseline else {}
    row = {
        **{name: f"'{text}" if text.startswith(("=", "+", "-", "@")) else text for name, text in texts.items()},  # no formula
        **{f"seed_{seed}": value for seed, value in cell.values(measure).items()},
        **{name.replace(".", "_"): _spread(cell.cost(name)) for name in COSTS},
        "n": estimate.n,
        "mean": estimate.mean,
        "std": _finite(estimate.std),
        "low_95": _finite(estimate.low),
        "high_95": _finite(estimate.high),
    }
    if measure in group.distances and (above := above_teacher(cell, measure)):
        row |= {
            "above_teacher_percent": _finite(above.mean),
            "above_teacher_low_95": _finite(above.low),
            "above_teacher_high_95": _finite(above.high),
        }
    if baseline and baseline is not cell:
        gap = difference(cell, baseline, measure)
        row["pairs"] = gap.n if gap else 0
        if gap:
            row |= {
                "difference": gap.mean,
                "difference_low_95": _finite(gap.low),
                "difference_high_95": _finite(gap.high),
                "gap_closed_percent": gap_closed(cell, baseline, measure) if measure in group.distances else None,
            }
    return row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spread(values: Sequence[float]) -> object:
    """The one value, whole where it is, or from the least to the largest."""
    if len(values) == 1:
        return int(values[0]) if values[0].is_integer() else values[0]
    return f"{values[0]:g} to {values[-1]:g}" if values else None
