"""Reports, the comparison and the index: nothing gets in unescaped, nothing is fetched, equal runs give equal bytes."""

import base64
import hashlib
import itertools
import json
import re
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiment import report
from experiment.compare import main as compare
from experiment.figures import new_figure, save_figure
from experiment.report import (
    Compared,
    Estimate,
    Illustration,
    Link,
    Page,
    Sample,
    Table,
    finish_with_report,
    table_html,
)
from experiment.run_folder import open_run
from experiment.statistics import mean_interval
from point_in_space_sim.measures import MEASURES
from point_in_space_sim.protocols import PROTOCOLS
from point_in_space_sim.report_page import answer as space_answer
from point_in_space_sim.results import comparisons
from tests.browser import CHROMEDRIVER, CHROMIUM, MISSING, open_browser
from user_grouping_evaluation_sim.report_page import answer as grouping_answer
from user_grouping_evaluation_sim.tables import regret

ATTACK = '</p></style></script><script>document.title = "owned"</script><img src=x onerror=alert(1)>"\'&<!--' + 60 * "w"
PAGE = Page(
    experiment="user_grouping_evaluation_sim",
    title=f"Title {ATTACK}",
    question=f"Question {ATTACK}",
    answer=[f"Answer {ATTACK}", "More."],
    setting=[f"Setting {ATTACK}"],
    figures=[Illustration("plot", f"Plot {ATTACK}", f"Caption {ATTACK}", f"Alt {ATTACK}")],
    tables=[
        Table(
            f"Table {ATTACK}",
            f"Caption {ATTACK}",
            ["name", f"value {ATTACK}", "estimate", "yes"],
            [
                ["b", 10, Estimate(-0.5, -0.75, -0.25), True],
                ["a", 9, Estimate(float("nan"), float("nan"), 0.0), None],
                [ATTACK, 100, Estimate(1.5, float("nan"), float("nan")), False],
            ],
            f"{ATTACK}.csv",
        ),
    ],
    samples={
        f"Heading {ATTACK}": [Sample(f"Sample {ATTACK}", [(0.5, ATTACK), (1, "\x00\x1b\u202e\ud800\ufffe"), (2, "")])],
    },
    samples_note=f"Note {ATTACK}",
    files=[(f"{ATTACK}.csv", f"File {ATTACK}"), ("javascript:alert(1)", "an address")],
)


def finished_run(folder, page=PAGE, **identity):
    """A finished run of that page, with its figures."""
    with open_run(folder, {"seed": 3, "name": ATTACK, **identity}, overwrite=False, resume=True) as run:
        figure, axes = new_figure()
        axes[0, 0].plot([1, 2])
        for name in {figure.name for figure in page.figures}:
            save_figure(figure, folder, name)
        finish_with_report(run, page, data_sha256={"ratings": "0" * 64})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", "--metric", ATTACK, "--output-dir", "secret", "--jobs=2", "--overwrite"])
        return finished_run(tmp_path_factory.mktemp("report") / "run")


def comparison(tmp_path, *folders):
    assert compare([*map(str, folders), "--output", str(tmp_path / "comparison.html")]) == 0
    return tmp_path / "comparison.html"


class Elements(HTMLParser):
    """(tag, attributes) of every element, and the text outside of style and script."""

    def __init__(self, page):
        super().__init__()
        self.found, self.words, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.words.append(data)


def test_what_comes_from_outside_stays_text(folder):
    page = Elements((folder / "report.html").read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.found]
    assert tags.count("script") == tags.count("style") == tags.count("img") == 1
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    # Title, question, answer, setting, figure (2), table (3 and a cell), sample (3), note, files, settings.
    assert "".join(page.words).count(ATTACK) >= 14
    alts = [attributes["alt"] for tag, attributes in page.found if tag == "img"]
    assert alts == [f"Alt {ATTACK}"]


def test_nothing_is_fetched_and_only_our_script_may_run(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Elements(text)
    addresses = [
        (tag, attributes[name])
        for tag, attributes in page.found
        for name in ("src", "href", "action", "srcset")
        if name in attributes
    ]
    for tag, address in addresses:
        assert address.startswith(("data:", "#")) or (tag == "a" and re.fullmatch(r"[\w.%~/-]+", address)), address
    assert "url(" not in text and "@import" not in text
    (policy,) = [a["content"] for tag, a in page.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    for name in ("style", "script"):
        content = re.search(f"<{name}>(.*?)</{name}>", text, re.S).group(1)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_figures_are_embedded_whole(folder):
    page = Elements((folder / "report.html").read_text(encoding="utf-8"))
    (image,) = [attributes for tag, attributes in page.found if tag == "img"]
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data, validate=True) == (folder / "plot.png").read_bytes()
    assert int(image["width"]) == 7 * 96  # its printed width in inches


def test_how_to_reproduce_it(folder):
    words = "".join(Elements((folder / "report.html").read_text(encoding="utf-8")).words)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert "python user_grouping_evaluation_sim/run.py --metric " in words and "--jobs=2" in words
    assert "secret" not in words and "--overwrite" not in words
    for shown in (record["git_commit"], record["packages"]["numpy"], "0" * 64, record["python"]):
        assert shown in words
    assert record["experiment"] == PAGE.experiment and record["answer_in_words"] == f"Answer {ATTACK} More."


def test_equal_runs_give_equal_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--metric", ATTACK, "--output-dir=elsewhere", "--jobs=2"])
    other = finished_run(tmp_path / "another name")
    assert (other / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_forbidden_characters_are_replaced():
    assert report.clean("a\x00b\x1bc\ud800d\ufffee\U0001fffff\r\ng\th") == "a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf\ng\th"
    assert report.clean("naïve 😀 שלום") == "naïve 😀 שלום"
    assert report.href("javascript:alert(1)") == "javascript%3Aalert%281%29"


def test_numbers_of_a_column_share_their_decimals():
    rows = [["a", 0.1234, 12, Estimate(-12.34, -20.0, -4.0)], ["b", 0.5, 7, Estimate(0.001, float("nan"), 0.0)]]
    table = table_html(Table("T", "C", ["", "x", "n", "e"], rows))
    assert re.findall(r'<td class="number" data-value="([^"]*)">(.*?)</td>', table) == [
        ("0.1234", "0.123"),
        ("12.0", "12"),
        ("-12.34", '−12.3 <span class="interval">[−20.0, −4.0]</span>'),
        ("0.5", "0.500"),
        ("7.0", "7"),
        ("0.001", "0.0"),
    ]
    assert report.format_number(-0.0001, 2) == "0.00" and report.format_number(float("nan"), 2) == "–"


@pytest.mark.parametrize("kind", ["report", "comparison", "index"])
def test_pages_are_valid_html(folder, tmp_path, kind):
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed: pip install -r requirements-dev.txt")
    if kind == "report":
        page = (folder / "report.html").read_text(encoding="utf-8")
    elif kind == "comparison":
        page = comparison(tmp_path, grouping_run(tmp_path / "a"), grouping_run(tmp_path / "b", 0.5)).read_text("utf-8")
    else:
        page = report.index_html(folder.parent.parent)
    html5lib.HTMLParser(strict=True).parse(page)
    levels = [int(tag[1]) for tag, _ in Elements(page).found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    names = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(names) == len(set(names))


def grouping_run(folder, shift=0.0, seed=0, finished=True):
    """A folder as a user grouping run leaves it; `shift` is added to the final distance of random, l2."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    rows = [
        [grouping, "l2", "marginal", run, rng.normal(3) + shift * (grouping == "random"), rng.uniform(), 0.5]
        for grouping in ("random", "interleaved")
        for run in range(8)
    ]
    columns = ["grouping", "metric", "scoring", "run", "final_distance", "pearson", "spearman"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "runs.csv", index=False)
    if finished:
        compared = Compared("runs", columns[:3], ["run"], {"final_distance": -1, "pearson": 1, "spearman": 1})
        record = {"experiment": "grouping", "seed": seed, "delta": shift, "data_sha256": {"a": "b"}}
        record["compared"] = asdict(compared)
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_runs_of_equal_seeds_are_paired(tmp_path):
    """The shift is found to the digit, though it is far smaller than the runs' spread."""
    a, b = grouping_run(tmp_path / "a"), grouping_run(tmp_path / "b", 0.25)
    words = " ".join(Elements(comparison(tmp_path, a, b).read_text(encoding="utf-8")).words)
    assert "Run B is worse than run A in final distance: 0.125 [0.125, 0.125] over 8 pairs" in words
    assert re.search(r"random\s+l2\s+marginal\s+8\s+0\.250\s+\[0\.250, 0\.250\]", words)
    assert re.search(r"interleaved\s+l2\s+marginal\s+8\s+0\.000\s+\[0\.000, 0\.000\]", words)
    assert re.search(r"delta\s+0\.0\s+0\.25", words)


@pytest.mark.parametrize("what", ["seed", "data", "corpus", "crowd", "mapper"])
def test_runs_that_do_not_match_are_not_paired(tmp_path, what):
    a, b = grouping_run(tmp_path / "a"), grouping_run(tmp_path / "b", 0.25, seed=int(what == "seed"))
    if what != "seed":
        record = json.loads((b / "run.json").read_text())
        (b / "run.json").write_text(json.dumps({**record, f"{what}_sha256": {"a": "c"}}))
    words = " ".join(Elements(comparison(tmp_path, a, b).read_text(encoding="utf-8")).words)
    assert "have no pairs in common" in words and "over 8 pairs" not in words


def space_run(folder, shift=0.0):
    """A folder as a point-in-space run leaves it: two targets, three seeds, two generations."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    rows = [
        [emotion, protocol, generation, 0, seed, role, rng.normal(1) + shift * (generation == 2)]
        for emotion in ("joy", "fear")
        for seed in range(3)
        for protocol in ("single", "multi")
        for generation in (1, 2)
        for role in ("selection", "report")
    ]
    columns = ["emotion", "protocol", "generation", "variant", "seed", "role", "mean_distance"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "generations.csv", index=False)
    compared = Compared(
        "generations",
        ["protocol"],
        ["emotion", "seed"],
        {"mean_distance": -1},
        {"role": "report"},
        "generation",
        "emotion",
    )
    record = {"experiment": "space", "seed": 0, "compared": asdict(compared)}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_last_models_are_compared_by_target_and_seed(tmp_path):
    a, b = space_run(tmp_path / "a"), space_run(tmp_path / "b", -0.5)
    words = " ".join(Elements(comparison(tmp_path, a, b).read_text(encoding="utf-8")).words)
    assert "Run B is better than run A in mean distance: −0.500 [−0.500, −0.500] over 6 pairs" in words
    assert re.search(r"multi\s+6\s+−0\.500\s+\[−0\.500, −0\.500\]", words)
    assert re.search(r"joy\s+single\s+3\s+−0\.500", words)
    table = pd.read_csv(a / "generations.csv").query("role == 'report' and generation == 2 and protocol == 'multi'")
    mean, low, high = mean_interval(table.groupby("emotion")["mean_distance"].mean().to_numpy())  # two targets
    assert re.search(rf"A\s+multi\s+6\s+{mean:.3f}\s+\[{low:.3f}, {high:.3f}\]".replace("-", "−"), words)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: [grouping_run(path / "a")], "at least two"),
        (lambda path: [grouping_run(path / "a"), path / "a"], "each once"),
        (lambda path: [grouping_run(path / "a"), path / "nowhere"], "holds no finished run"),
        (lambda path: [grouping_run(path / "a"), grouping_run(path / "b", finished=False)], "holds no finished run"),
        (lambda path: [grouping_run(path / "a"), space_run(path / "b")], "compare runs of one experiment"),
    ],
)
def test_folders_that_cannot_be_compared(tmp_path, capsys, make, message):
    output = tmp_path / "comparison.html"
    assert compare([*map(str, make(tmp_path)), "--output", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not output.exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"experiment": "other"}', '{"experiment": "point_in_space_sim"}', "{}"]
)
def test_broken_records_are_refused(tmp_path, capsys, content):
    a, b = grouping_run(tmp_path / "a"), tmp_path / "b"
    b.mkdir()
    (b / "run.json").write_text(content)
    assert compare([str(a), str(b), "--output", str(tmp_path / "c.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(b) in line


def test_index_lists_finished_runs(folder, tmp_path, monkeypatch):
    results = tmp_path / "results"
    monkeypatch.setattr(report, "RESULTS", results)
    finished_run(results / "grouping" / "one")
    finished_run(results / "grouping" / "a run & more", replace(PAGE, answer=["Another answer."]))
    (results / "space" / "broken").mkdir(parents=True)
    (results / "space" / "broken" / "run.json").write_text("{")
    finished_run(tmp_path / "elsewhere" / "grouping" / "not listed")
    page = Elements((results / "index.html").read_text(encoding="utf-8"))
    links = [attributes["href"] for tag, attributes in page.found if tag == "a"]
    listed = [link for link in links if not link.startswith("#")]
    assert listed == ["grouping/a%20run%20%26%20more/report.html", "grouping/one/report.html"]
    assert "Another answer." in page.words and "2 finished runs." in page.words


@pytest.mark.parametrize("link", [Link("a", "b/c.html"), "a", 1, True, None])
def test_every_kind_of_cell_has_its_row_head(link):
    assert '<th scope="row"' in table_html(Table("T", "C", ["x"], [[link]]))


def test_answer_of_user_grouping():
    """The second combination is 0.5 closer in every run, whatever the runs' own level, and agrees more by 0.2."""
    level = np.array([3.0, 5.0, 7.0])
    frames = [
        pd.DataFrame(
            {
                "grouping": "random",
                "metric": "l2",
                "scoring": scoring,
                "run": range(3),
                "start_distance": 10.0,
                "hull_distance": 2.0,
                "final_distance": level - 0.5 * (scoring == "attributed"),
                "pearson": 0.6 + 0.2 * (scoring == "attributed") + 0.01 * level,
            }
        )
        for scoring in ("marginal", "attributed")
    ]
    runs = pd.concat(frames, ignore_index=True)
    said = grouping_answer(runs.assign(regret=regret(runs)))
    mean, low, high = mean_interval(level - 0.5)
    assert said[0].startswith("Closest to the expert came random grouping judged by l2 with attributed points")
    assert f"distance {mean:.2f} [{report.format_number(float(low), 2)}, {high:.2f}], from 10.00" in said[0]
    assert "r = 0.85" in said[1]
    assert "change r by 0.20 [0.20, 0.20] and the regret by −0.06 [−0.06, −0.06], run by run" in said[2]
    assert "with marginal points, is 0.500 [0.500, 0.500] farther" in said[3]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.2, -0.1, "closer than"),
        (0.1, 0.2, "less close than"),
        (-0.1, 0.2, "neither clearly closer nor clearly farther than"),
    ],
)
def test_answer_of_point_in_space(low, high, verdict):
    """The sentence says no more than the interval does."""
    quantities = [(measure, name, "") for measure in MEASURES for name in PROTOCOLS]
    quantities += [(measure, *pair) for measure in MEASURES for pair in comparisons(list(PROTOCOLS))]
    quantities += [("reduction_percent", "multi", "single"), ("distance", "neighbourhood", "")]
    summary = pd.DataFrame(
        [["joy", *which, 1, 0.05, low, high] for which in quantities],
        columns=["emotion", "measure", "protocol", "against", "seeds", "value", "low", "high"],
    )
    first = space_answer(summary)[0]
    assert f"On joy, competition (multi: plus selection) ended {verdict} the single model, chosen" in first
    assert f"mean distance 0.050 [{report.format_number(low, 3)}, {report.format_number(high, 3)}]" in first


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip(MISSING)
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_real_browser(browser, folder, width, dark):
    browser.emulate(width=width, dark=dark)
    browser.open(folder / "report.html")
    facts = browser.run("""
        const of = (element) => getComputedStyle(element);
        const image = document.querySelector("img");
        return {
            title: document.title, alerts: typeof window.owned, overflow: document.documentElement.scrollWidth,
            ink: of(document.body).color, paper: of(document.body).backgroundColor, drawn: image.naturalWidth,
            fetched: performance.getEntriesByType("resource").filter(one => !one.name.startsWith("data:")).length,
            size: parseFloat(of(document.querySelector("main p")).fontSize),
            buttons: document.querySelectorAll("th button").length,
        };
    """)
    assert facts["title"] == f"Title {ATTACK}"
    assert facts["overflow"] <= width
    assert facts["fetched"] == 0 and facts["drawn"] == 7 * 150 and facts["size"] >= 16
    assert facts["buttons"] == 4
    ink, paper = (luminance(facts[name]) for name in ("ink", "paper"))
    assert (paper < ink) == dark
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 7  # WCAG 2.2, 1.4.6
    picture = base64.b64decode(browser.screenshot())
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_serious_barriers(browser, folder, dark):
    axe_core = pytest.importorskip("axe_core_python", reason="pip install -r requirements-dev.txt")
    axe = (Path(axe_core.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    browser.emulate(width=1280, dark=dark)
    browser.open(folder / "report.html")
    found = browser.run(f"{axe}; return axe.run()")
    assert len(found["passes"]) > 20
    serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
    assert not [(one["id"], one["nodes"][0]["html"]) for one in serious]


def luminance(colour):
    """WCAG's relative luminance of rgb(r, g, b)."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_tables_are_sorted_by_keyboard(browser, folder):
    browser.emulate(width=1280, dark=False)
    browser.open(folder / "report.html")

    def sort_by(column):
        browser.run(f"document.querySelectorAll('table.sortable thead button')[{column}].focus()")
        browser.press("\ue007")
        return browser.run("""
            const table = document.querySelector("table.sortable");
            return [[...table.tBodies[0].rows].map(row => row.cells[1].textContent),
                    [...table.tHead.rows[0].cells].map(head => head.getAttribute("aria-sort"))];
        """)

    assert sort_by(1) == [["9", "10", "100"], [None, "ascending", None, None]]
    assert sort_by(1) == [["100", "10", "9"], [None, "descending", None, None]]
    # An estimate without a value stays last, either way.
    assert sort_by(2) == [["10", "100", "9"], [None, None, "ascending", None]]
    assert sort_by(2) == [["100", "10", "9"], [None, None, "descending", None]]
    assert sort_by(0)[1] == ["ascending", None, None, None]
