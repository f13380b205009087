"""The tables of a report as plain text cells, and their Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from qdm_lightning.reporting.collect import Found, Result, Run
from qdm_lightning.reporting.summary import IGNORED, Cell, Estimate, Group, difference, gap_closed, varying

ABSENT = "–"  # noqa: RUF001 - an en dash stands for no value
COSTS = ("macs", "bytes", "float_bytes", "speedup.linear", "speedup.bops", "speedup.bops64")
FORMULAS = {
    "95 % interval": "mean ± t(0.975, n - 1) · deviation / √n over the n seeds of a cell (Student's t; deviation with n - 1)",
    "difference": "mean of cell - baseline over the seeds that both have, with the same interval: paired by seed",
    "gap closed": "100 · (baseline - cell) / (baseline - teacher) of the distance, in percent; each is the mean over the seeds "
    "that cell and baseline share; no value where the teacher is not nearer than the baseline, or teachers differ",
    "nem_error": "L_NeM = ||eps_FP(x_t, t) - eps_Q(x_t, t)||² on the held-out set, mean over ten ranges of t",
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


@dataclass(frozen=True)
class Table:
    """A caption, a head, and rows whose first entry names them; `words` where most entries are no numbers."""

    caption: str
    head: list[str]
    rows: list[list[Entry]]
    words: bool = False


def _digits(value: float, digits: int = 4, sign: str = "") -> str:
    """So many significant digits, zeros at the end included, so that a column is one precision."""
    return f"{value:{sign}#.{digits}g}".removesuffix(".")


def number(value: float, digits: int = 4) -> Entry:
    """`value` to `digits` significant digits; what is not finite is said."""
    return Entry(_digits(value, digits) if math.isfinite(value) else f"not finite ({value})", value)


def _interval(estimate: Estimate, signed: bool = False) -> Entry:
    if estimate.n < 2:
        return Entry(f"{ABSENT} (n = 1)")
    sign = "+" if signed else ""
    return Entry(f"[{_digits(estimate.low, sign=sign)}, {_digits(estimate.high, sign=sign)}]", estimate.half_width)


def measure_table(group: Group, measure: str) -> Table:
    """A row a cell: seeds, mean, deviation, interval, difference to the baseline with its interval, gap closed."""
    gaps = measure in group.distances and any(cell.teacher(measure) for cell in group.cells)
    versus = list(dict.fromkeys(cell.label for cell in group.baselines.values()))
    head = ["cell", "n", "mean", "deviation", "95 % interval"]
    if versus:
        head += ["baseline", "difference", "95 % of the difference", *(["gap closed, %"] if gaps else [])]
    rows = []
    for cell in group.cells:
        values = cell.values(measure)
        if not values:
            continue
        estimate = Estimate.of(values.values())
        deviation = number(estimate.deviation, 2) if estimate.n > 1 else Entry(f"{ABSENT} (n = 1)")
        row = [Entry(cell.label), Entry(str(estimate.n), estimate.n), number(estimate.mean), deviation, _interval(estimate)]
        if versus:
            row += _versus(cell, group.baselines.get(cell.label), measure, gaps)
        rows.append(row)
    return Table(f"{measure}, protocol {group.name}", head, rows)


def _versus(cell: Cell, baseline: Cell | None, measure: str, gaps: bool) -> list[Entry]:
    blank = [Entry(ABSENT)] * (3 if gaps else 2)
    if baseline is None:
        return [Entry("none of its kind"), *blank]
    if baseline is cell:
        return [Entry("is the baseline"), *blank]
    gap = difference(cell, baseline, measure)
    if gap is None:
        return [Entry(f"{baseline.label}: no common seed"), *blank]
    own = len(cell.values(measure))
    pairs = f" ({gap.n} of {own} seeds)" if gap.n < own else ""
    mark = "" if gap.n < 2 or not (gap.low > 0 or gap.high < 0) else "lower" if gap.mean < 0 else "higher"
    shown = Entry(_digits(gap.mean, sign="+"), gap.mean, mark) if math.isfinite(gap.mean) else number(gap.mean)
    row = [Entry(baseline.label + pairs), shown, _interval(gap, signed=True)]
    if gaps:
        closed = gap_closed(cell, baseline, measure)
        row.append(Entry(ABSENT) if closed is None else Entry(f"{closed:.1f}", closed))
    return row


def reference_table(group: Group) -> Table | None:
    """What bounds the distances: the teacher's over the seeds, and that between two halves of the real images."""
    rows = []
    for name in group.distances:
        values = sorted({(result.run.seed, result.teacher[name]) for result in group.results if name in result.teacher})
        if values:
            estimate = Estimate.of(value for _, value in values)
            rows.append(
                [
                    Entry(f"teacher, {name}"),
                    Entry(str(estimate.n), estimate.n),
                    number(estimate.mean),
                    number(estimate.deviation, 2) if estimate.n > 1 else Entry(f"{ABSENT} (n = 1)"),
                ]
            )
        floors = sorted({result.floor[name] for result in group.results if name in result.floor})
        if floors:
            halves = f"two halves of the real images, {name}"
            rows.append([Entry(halves), Entry(ABSENT), number(floors[0]), Entry(ABSENT)])
    return Table(f"What bounds the distances, protocol {group.name}", ["", "n", "mean", "deviation"], rows) if rows else None


def cost_table(cells: Sequence[Cell]) -> Table | None:
    """Cost of an image and step, and bytes stored; None where no run has a student."""
    rows = []
    for cell in cells:
        found = [cell.cost(name) for name in COSTS]
        if any(found):
            rows.append([Entry(cell.label), *map(_cost, COSTS, found)])
    head = ["cell", "MACs", "bytes stored", "bytes in float32", "speed-up, linear", "speed-up, bops", "speed-up, bops64"]
    return Table("Cost of a student for one image and step", head, rows) if rows else None


def _cost(name: str, values: Sequence[float]) -> Entry:
    if not values:
        return Entry(ABSENT)
    texts = [f"{value:.2f}" if name.startswith("speedup") else f"{value:,.0f}" for value in values]
    return Entry(" to ".join([texts[0], texts[-1]]) if len(texts) > 1 else texts[0], values[0])


def settings_table(cells: Sequence[Cell]) -> Table:
    """Settings in which the runs differ, a row a cell; several values in one cell are all given."""
    runs = [result.run for cell in cells for result in cell.results.values()]
    names = varying(runs)
    rows = []
    for cell in cells:
        row = [Entry(cell.label)]
        for name in names:
            texts = dict.fromkeys(str(result.run.settings.get(name, "not set")) for result in cell.results.values())
            row.append(Entry(", ".join(texts)))
        rows.append(row)
    return Table("Settings that differ between the cells", ["cell", *names], rows, words=True)


def common_settings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Settings that all runs share; those of the machine alone (paths, loggers, threads) are left out."""
    names = sorted({name for run in runs for name in run.settings if not name.startswith(IGNORED)} - set(varying(runs)))
    return [(name, str(runs[0].settings.get(name))) for name in names if name != "teacher.seed"]


def runs_table(groups: Sequence[Group]) -> Table:
    """Every result that counts: a row a run and protocol."""
    measures = list(dict.fromkeys(measure for group in groups for measure in group.measures))
    rows = []
    for group in groups:
        for cell in group.cells:
            for seed, result in sorted(cell.results.items()):
                values = [number(result.scores[m]) if m in result.scores else Entry(ABSENT) for m in measures]
                seconds = Entry(f"{result.run.seconds:.0f}", result.run.seconds)
                shown = [Entry(cell.label), Entry(str(seed), seed), Entry(group.name), *values, seconds, Entry(_commit(result))]
                rows.append([*shown, Entry(f"{result.run.name}/{result.source}")])
    head = ["cell", "seed", "protocol", *measures, "seconds of the run", "commit", "file"]
    return Table("Results that count, by run", head, rows, words=True)


def _commit(result: Result) -> str:
    git = result.record.get("git")
    if not isinstance(git, dict):
        return ABSENT
    return f"{str(git.get('commit'))[:9]}{' + changes' if git.get('changed') else ''}"


def surroundings(group: Group) -> list[str]:
    """Versions and hardware in which the results of a table differ, a line each: the reader judges."""
    found: dict[str, set[str]] = {}
    for result in group.results:
        for part in ("versions", "hardware"):
            for name, value in (result.record.get(part) or {}).items():
                found.setdefault(f"{part}: {name}", set()).add(str(value))
    return [f"{name} {' and '.join(sorted(values))}" for name, values in found.items() if len(values) > 1]


def protocol_differences(group: Group, groups: Sequence[Group]) -> list[str]:
    """Entries of the group's protocol that tell it from the others: who measured, and what differs among those that did so."""
    alike = [other for other in groups if other.protocol["measured"] == group.protocol["measured"]]
    names = dict.fromkeys(name for other in alike for name in other.protocol)
    differing = [name for name in names if len({repr(other.protocol.get(name)) for other in alike}) > 1]
    return ["measured", *differing] if len(groups) > 1 else []


def markdown(groups: Sequence[Group], found: Found) -> str:
    """The tables of every protocol, their formulas, and what was left out."""
    lines = [f"# {len(found.runs)} runs", ""]
    if found.unfinished:
        lines += [f"## {len(found.unfinished)} failed or unfinished", ""]
        lines += [f"* {_plain(name)}: {_plain(state)}" for name, state in found.unfinished] + [""]
    for note in found.notes:
        lines += [f"* left out: {_plain(note)}"]
    for group in groups:
        lines += ["", f"## Protocol {group.name}: {_plain(group.title)}", ""]
        differing = protocol_differences(group, groups)
        if differing:
            told = [f"{name} {_plain(str(group.protocol[name]))}" for name in differing if name in group.protocol]
            lines += [f"Not comparable with other protocols; what differs: {', '.join(told)}.", ""]
        lines += [f"Differing surroundings: {_plain(line)}." for line in surroundings(group)]
        for table in (*(measure_table(group, measure) for measure in group.measures), reference_table(group)):
            if table is not None:
                lines += [*_markdown(table), ""]
    cost = cost_table(all_cells(groups))
    lines += [*([*_markdown(cost), ""] if cost else []), *(f"* {name}: {text}" for name, text in FORMULAS.items())]
    return "\n".join(lines) + "\n"


def all_cells(groups: Sequence[Group]) -> list[Cell]:
    """A cell for each label, in order, with the first result of every seed."""
    found: dict[str, Cell] = {}
    for group in groups:
        for cell in group.cells:
            whole = found.setdefault(cell.label, Cell(cell.bits, cell.method, cell.rest))
            whole.results = {**cell.results, **whole.results}
    return list(found.values())


def _plain(text: str) -> str:
    """Text in which Markdown and HTML find nothing to interpret."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.split())


def _markdown(table: Table) -> list[str]:
    """The table below its caption."""
    rows = [table.head, ["---"] * len(table.head), *([entry.text for entry in row] for row in table.rows)]
    return [f"**{_plain(table.caption)}**", "", *(f"| {' | '.join(map(_plain, row))} |" for row in rows)]


def csv_text(groups: Sequence[Group]) -> str:
    """A row for each protocol, cell and measure: over seeds, against the baseline, cost, and the value of each seed."""
    seeds = sorted({seed for group in groups for cell in group.cells for seed in cell.results})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ["mean", "deviation", "low_95", "high_95"]
    versus = ["baseline", "pairs", "difference", "difference_low_95", "difference_high_95", "gap_closed_percent"]
    costs = [name.replace(".", "_") for name in COSTS]
    writer.writerow(["protocol", "title", "cell", "measure", "n", *names, *versus, *costs, *(f"seed_{seed}" for seed in seeds)])
    for group in groups:
        for cell in group.cells:
            cost = [_one(cell.cost(name)) for name in COSTS]
            for measure in group.measures:
                values = cell.values(measure)
                if values:
                    estimate = Estimate.of(values.values())
                    row = [_safe(group.name), _safe(group.title), _safe(cell.label), _safe(measure), estimate.n]
                    row += [estimate.mean, *_finite(estimate.deviation, estimate.low, estimate.high)]
                    row += [*_csv_versus(group, cell, measure), *cost, *(values.get(seed, "") for seed in seeds)]
                    writer.writerow(row)
    return stream.getvalue()


def _csv_versus(group: Group, cell: Cell, measure: str) -> list[object]:
    baseline = group.baselines.get(cell.label)
    if baseline is None or baseline is cell:
        return [_safe(baseline.label) if baseline else "", *[""] * 5]
    gap = difference(cell, baseline, measure)
    closed = gap_closed(cell, baseline, measure) if measure in group.distances else None
    if gap is None:
        return [_safe(baseline.label), 0, *[""] * 4]
    shown = [gap.mean, *_finite(gap.low, gap.high)]
    return [_safe(baseline.label), gap.n, *shown, "" if closed is None else closed]


def _finite(*values: float) -> list[object]:
    return [value if math.isfinite(value) else "" for value in values]


def _one(values: Sequence[float]) -> object:
    """The one value, whole where it is, or from the least to the largest."""
    if len(values) == 1:
        return int(values[0]) if values[0].is_integer() else values[0]
    return f"{values[0]:g} to {values[-1]:g}" if values else ""


def _safe(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
