"""The HTML file: well formed, escaped, alone; and alive in headless Chromium."""

import html.parser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from qdm_lightning.display.image_grids import read_rows
from qdm_lightning.report import main
from qdm_lightning.reporting.write import write_report

VOID = {"meta", "link", "img", "br", "input"}
EVIL = "</script><script>console.error('evil')</script><img src=x onerror=console.error(1)>\"'&$x$"


class Reader(html.parser.HTMLParser):
    """Keeps tags balanced, and collects ids, references, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), (tag, attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("src", "href", "xlink:href") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


def parsed(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(whole_sweep, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    write_report([whole_sweep], out)
    return out / "report.html"


def test_the_file_is_well_formed_and_alone(page):
    reader = parsed(page.read_text("utf-8"))
    assert len(set(reader.ids)) == len(reader.ids)
    for link in reader.links:
        assert link.startswith("data:") or link[1:] in reader.ids, link
    assert not re.search(r"https?:|@import|url\((?!#)", page.read_text("utf-8"))
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("table") == tags.count("caption") >= 6
    assert all(attributes.get("alt") for tag, attributes in reader.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in reader.tags if tag == "svg")
    assert tags.count("svg") == 4
    assert tags.count("img") == 3 * 13 - 1
    assert tags.count("h1") == 1
    words = " ".join(reader.words)
    assert "Failed or unfinished: 2" in words
    assert "34_w2a2_NeM_seed2" in words
    assert "100 · (baseline - cell) / (baseline - teacher)" in words


def test_the_same_runs_give_the_same_bytes(page, whole_sweep, tmp_path):
    write_report([whole_sweep], tmp_path)
    assert (tmp_path / "report.html").read_bytes() == page.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.csv", "results.md"]


def test_rows_of_a_grid_are_what_was_saved(whole_sweep):
    run = next(whole_sweep.glob("00_*"))
    rows = read_rows(run / "samples.png", 2)
    with Image.open(run / "samples.png") as grid:
        assert [row.size for row in rows] == [(grid.width, 64), (grid.width, 64)]
        whole = grid.convert("RGB")
    assert rows[1].tobytes() == whole.crop((0, 86 + 18, whole.width, 86 + 18 + 64)).tobytes()
    with pytest.raises(ValueError, match="no grid of 5 rows"):
        read_rows(run / "samples.png", 5)


def test_what_files_say_is_text(sweep, tmp_path):
    sweep.run(4, "none", 0, settings={"extra": EVIL})
    sweep.run(4, "none", 0, settings={"extra": "plain"})
    sweep.run(3, "none", 0, name="<b>bold")
    (sweep.root / "<i>lean").mkdir()
    (sweep.root / "<i>lean" / "config.yaml").write_text("")
    write_report([sweep.root], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text("utf-8")
    reader = parsed(text)
    assert text.count("<script>") == text.count("</script>") == 1
    assert {tag for tag, _ in reader.tags} & {"b", "i"} == set()
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert any(EVIL in word for word in reader.words)
    assert "<b>" not in (tmp_path / "out" / "results.md").read_text("utf-8")


def test_what_is_lacking_is_said(sweep, tmp_path):
    whole, damaged = sweep.run(4, "none", 0), sweep.run(4, "none", 1)
    (whole / "samples.png").unlink()
    (damaged / "samples.png").write_bytes(b"no picture")
    (damaged / "metrics.csv").write_text("step,train/loss\nx,y\n")
    (damaged / "diagnosis").mkdir()
    (damaged / "diagnosis" / "diagnosis.json").write_text("{}")
    write_report([sweep.root], tmp_path / "out")
    words = " ".join(parsed((tmp_path / "out" / "report.html").read_text("utf-8")).words)
    assert f"{whole.name}/samples.png is missing" in words
    assert f"{damaged.name}/samples.png cannot be read" in words
    assert f"{damaged.name}/metrics.csv is damaged" in words
    assert f"{damaged.name}/diagnosis/diagnosis.json is no diagnosis of ours" in words


def test_steps_are_drawn_across_protocols_that_are_alike_otherwise(sweep, evaluate, tmp_path):
    run = sweep.run(4, "none", 0)
    for steps in (10, 20):
        evaluate(run, steps, 8.0)
    evaluate(run, 40, 8.0, num_samples=8)
    write_report([sweep.root], tmp_path)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "fd_digits against sampling steps, protocols B, C." in text
    assert "fd_digits against sampling steps, protocols B, C, D" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no folder is given"),
        (["{none}"], "is not a folder"),
        (["{root}", "--baseline", "x"], "--baseline is not understood"),
        (["{root}", "base=x"], "base is not a setting"),
        (["{root}", "out="], "out= needs one value"),
        (["{root}", "out=a", "out=b"], "is given once"),
        (["{root}", "baseline=x"], "baseline=x is no cell"),
        (["{root}", "out={root}/multirun.yaml"], "multirun.yaml is a file"),
    ],
)
def test_bad_input_is_one_line(arguments, message, whole_sweep, tmp_path, capsys):
    before = sorted(whole_sweep.rglob("*"))
    words = [word.format(root=whole_sweep, none=tmp_path / "none") for word in arguments]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(whole_sweep.rglob("*")) == before


def browse(file: Path, folder: Path, script: str = "", *flags: str) -> tuple[str, str]:
    """The DOM after loading `file` (a copy with `script` at its end), and what the browser logged."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        reason = "no chromium, chromium-browser or google-chrome on PATH: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    copy = folder / "page.html"
    copy.write_text(file.read_text("utf-8").replace("</body>", f"<script>{{ {script} }}</script></body>"), "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", *flags]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0", "--dump-dom", copy.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout, ended.stderr


CLICKS = """
const means = [...document.querySelectorAll("table")][0];
const button = means.querySelectorAll("thead button")[2];
const order = () => [...means.tBodies[0].rows].map((row) => row.cells[2].dataset.sort).join(" ");
const said = [order()];
button.click(); said.push(order(), button.parentElement.getAttribute("aria-sort"));
button.click(); said.push(order(), button.parentElement.getAttribute("aria-sort"));
means.querySelectorAll("thead button")[6].click();
said.push([...means.tBodies[0].rows].slice(-3).map((row) => row.cells[5].textContent).join(" "));
const paper = () => getComputedStyle(document.body).backgroundColor;
const theme = document.getElementById("theme");
for (let k = 0; k < 2; k++) { theme.click(); said.push(theme.textContent, paper()); }
said.push(document.documentElement.scrollWidth <= window.innerWidth);
document.body.innerHTML = `<pre>${said.join("\\n")}</pre>`;
"""


def test_in_chromium_tables_sort_and_the_theme_changes(page, tmp_path):
    dom, log = browse(page, tmp_path, CLICKS, "--window-size=500,900")
    assert "CONSOLE" not in log, log
    said = re.search(r"<pre>(.*?)</pre>", dom, re.S)
    assert said, dom
    first, up, rising, down, falling, last, *rest = said[1].split("\n")
    values = [float(value) for value in first.split()]
    assert len(values) == 12
    assert values != sorted(values)
    assert ([float(v) for v in up.split()], rising) == (sorted(values), "ascending")
    assert ([float(v) for v in down.split()], falling) == (sorted(values, reverse=True), "descending")
    assert last == "is the baseline is the baseline is the baseline"
    assert rest == ["Theme: light", "rgb(255, 255, 255)", "Theme: dark", "rgb(20, 24, 29)", "true"]


def test_chromium_would_have_told_of_an_error(page, tmp_path):
    _, log = browse(page, tmp_path, "console.error('told'); missing();")
    assert "told" in log
    assert "missing is not defined" in log


def test_a_run_without_curves_and_one_bit_width(sweep, tmp_path):
    (sweep.run(4, "none", 0) / "metrics.csv").unlink()
    write_report([sweep.root], tmp_path)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "Loss curves" not in text
    sweep.run(4, "TaQ", 0)
    write_report([sweep.root], tmp_path)
    assert "w4a4, validation: L_NeM" in (tmp_path / "report.html").read_text("utf-8")
