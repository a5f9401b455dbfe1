"""A run as one page that is complete in itself: no network, no other file, nothing that the run did not say.

An experiment describes its page (`Page`); the templates beside this module render it. Everything that comes from
outside (comments that a model wrote, names of files and users) is escaped, and the page's own policy forbids all but
its one style and script.
"""

import base64
import hashlib
import json
import math
import re
import shlex
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from experiment.files import ROOT, replace_atomically
from experiment.run_folder import RECORD_OF_THE_RUN, RunFolder

RESULTS = ROOT / "results"
HERE = Path(__file__).resolve().parent
FIGURE_DPI = 150  # of the figures in a run's folder (experiment.figures.save_figure); a CSS pixel is 1/96 inch
# The HTML standard's control-character and noncharacter parse errors, and what UTF-8 cannot hold.
NONCHARACTERS = "".join(chr(plane * 0x10000 + end) for plane in range(17) for end in (0xFFFE, 0xFFFF))
FORBIDDEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{NONCHARACTERS}]")
SAID_OF_THE_RUN = ("experiment", "answer", "answer_in_words", "compared")
NOT_OF_THE_REPORT = (
    *("--output-dir", "--overwrite", "--no-overwrite", "--resume", "--no-resume"),
    *("--figures", "--no-figures", "--redo-tables", "--no-redo-tables"),
)


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Link:
    """A text that leads to a file, by its path relative to the page."""

    text: str
    path: str


Value = str | float | int | bool | None | Estimate | Link


@dataclass(frozen=True)
class Table:
    """columns: the heads. rows: as many values each; the first is the row's head. file: the .csv with all of it."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    file: str | None = None


@dataclass(frozen=True)
class Illustration:
    """The figure name.png of the run's folder. alt: what a reader who does not see it needs to know is there."""

    name: str
    title: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Sample:
    """Texts that belong together, each with its distance."""

    title: str
    texts: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Compared:
    """How runs of an experiment are compared: by measures of `table`, whose rows are means over `units` within
    `groups`.

    measures: +1 where more is better, -1 where less is. where: the rows that count, by a column's value. last: the
    column of which only the greatest value of a group and unit counts. breakdown: the unit that differences are also
    shown by.
    """

    table: str
    groups: Sequence[str]
    units: Sequence[str]
    measures: Mapping[str, int]
    where: Mapping[str, str] = field(default_factory=dict)
    last: str | None = None
    breakdown: str | None = None


@dataclass(frozen=True)
class Page:
    """What an experiment says of a run. answer: the first sentence answers the question, others qualify it.
    setting: a sentence or two. samples: by heading. files: the run's other files, with what they hold. compared: for
    experiment.compare, which finds it in run.json."""

    experiment: str
    title: str
    question: str
    answer: Sequence[str]
    setting: Sequence[str]
    figures: Sequence[Illustration] = ()
    tables: Sequence[Table] = ()
    samples: Mapping[str, Sequence[Sample]] | None = None
    samples_note: str = ""
    files: Sequence[tuple[str, str]] = ()
    compared: Compared | None = None


def finish_with_report(run: RunFolder, page: Page, **facts: Any) -> None:
    """Writes report.html, then run.json (the mark of a complete run), then the index where the run lies in results/.

    facts: for run.json, beside the experiment's name and its answer.
    """
    with run.stage("report"):
        own = {"experiment": page.experiment, "answer_in_words": " ".join(page.answer)}
        record = run.record(**own, compared=page.compared and asdict(page.compared), **facts)
        write_page(run.path / "report.html", report_html(run.path, page, record))
    run.finish(record)
    if run.path.resolve().is_relative_to(RESULTS):
        write_page(RESULTS / "index.html", index_html(RESULTS))


def write_page(path: Path, page: str) -> None:
    with replace_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def clean(value: Any) -> Any:
    """Text as HTML may hold it: control characters, half surrogates and non-characters become U+FFFD."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return FORBIDDEN.sub("\ufffd", value.replace("\r\n", "\n").replace("\r", "\n"))


def href(path: str) -> str:
    """A relative path as an address: with a scheme (javascript:) it would be one no more."""
    return quote(path, errors="surrogateescape")


def commit(record: Mapping[str, Any]) -> str:
    name = record.get("git_commit")
    return f"{str(name)[:10]}{' with changes' if record.get('git_dirty') else ''}" if name else "unknown"


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    finalize=clean,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"href": href, "commit": commit}
PARTS: Any = TEMPLATES.get_template("parts.html.jinja").module


def report_html(folder: Path, page: Page, record: Mapping[str, Any]) -> str:
    """The page of a run. Its bytes follow from the run alone. record: what run.json says; no times are shown."""
    sections = {"Setting": PARTS.paragraphs(page.setting)}
    if page.figures:
        sections["Figures"] = joined(_illustration(folder, entry) for entry in page.figures)
    if page.tables:
        sections["Tables"] = joined(map(table_html, page.tables))
    if page.samples:
        sections["Sampled comments"] = PARTS.samples(page.samples, page.samples_note)
    sections["How to reproduce it"] = _reproduction(page, record)
    return page_html(page.title, page.question, page.answer, sections)


def joined(parts: Iterable[Markup]) -> Markup:
    return Markup("\n").join(parts)


def page_html(title: str, question: str, answer: Sequence[str], sections: Mapping[str, Markup]) -> str:
    """A whole page. title, question and answer are text; sections: by heading."""
    style, script = (Markup("\n" + (HERE / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = TEMPLATES.get_template("page.html.jinja")
    return template.render(
        # The policy is this module's own; its quotes are legal in an attribute between double quotes.
        policy=Markup(policy),
        title=title,
        question=question,
        answer=answer,
        sections=sections,
        style=style,
        script=script,
    )


def table_html(table: Table, *, sortable: bool = True) -> Markup:
    """A table, which can be sorted by any column if wanted. Numbers of a column share their decimals."""
    if not table.rows:
        return Markup("<h3>{}</h3>\n<p>{} (no rows)</p>").format(clean(table.title), clean(table.caption))
    columns = list(zip(*table.rows, strict=True))
    decimals = [_decimals(column) for column in columns]
    numeric = [any(_is_number(value) for value in column) for column in columns]
    cells = [[_shown(value, places) for value, places in zip(row, decimals, strict=True)] for row in table.rows]
    name = "table-" + hashlib.sha256(f"{table.title}{table.caption}".encode(errors="replace")).hexdigest()[:8]
    return PARTS.table(table, name, cells, numeric, sortable)


def format_number(value: float, decimals: int) -> str:
    """With a true minus sign; an en dash where there is no number."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    shown = f"{value:.{decimals}f}"
    return shown.replace("-", "−") if float(shown) else shown.removeprefix("-")


def words(estimate: Estimate, decimals: int = 2) -> str:
    """0.95 [0.94, 0.96]"""
    shown = format_number(estimate.value, decimals)
    if math.isnan(estimate.low):
        return shown
    return f"{shown} [{format_number(estimate.low, decimals)}, {format_number(estimate.high, decimals)}]"


def estimate_of(row: Any, *columns: str) -> Estimate:
    """A row's value and ends of its interval, by default its `value`, `low` and `high`."""
    return Estimate(*(float(row[name]) for name in columns or ("value", "low", "high")))


def index_html(results: Path) -> str:
    """The finished runs in results/<experiment>/<run>/, by experiment."""
    by_experiment: dict[str, list[list[Value]]] = {}
    for path in sorted(results.glob("*/*/run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            seconds = sum(record.get("seconds", {}).values())
        except (OSError, ValueError, AttributeError, TypeError):
            continue
        folder = path.parent
        page = next((name for name in ("report.html", "run.json") if (folder / name).exists()), "run.json")
        by_experiment.setdefault(folder.parent.name, []).append(
            [
                Link(folder.name, f"{folder.parent.name}/{folder.name}/{page}"),
                str(record.get("answer_in_words", "")),
                record.get("seed"),
                commit(record),
                seconds / 60,
            ]
        )
    columns = ["run", "answer", "seed", "commit", "minutes"]
    sections = {
        experiment: table_html(Table(f"Finished runs of {experiment}", "Every row leads to a report.", columns, rows))
        for experiment, rows in by_experiment.items()
    }
    count = sum(map(len, by_experiment.values()))
    answer = [
        f"{count} finished run{'s' * (count != 1)}.",
        "Runs of one experiment side by side: python -m experiment.compare FOLDER FOLDER ...",
    ]
    return page_html("Runs", "What has been run here, and what came of it?", answer, sections)


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _illustration(folder: Path, entry: Illustration) -> Markup:
    content = (folder / f"{entry.name}.png").read_bytes()
    # At its printed size: the pixels beyond that are for dense screens and paper.
    width, height = (round(pixels * 96 / FIGURE_DPI) for pixels in struct.unpack(">II", content[16:24]))
    name = "figure-" + hashlib.sha256(entry.name.encode()).hexdigest()[:8]
    return PARTS.figure(entry, name, width, height, base64.b64encode(content).decode())


def _reproduction(page: Page, record: Mapping[str, Any]) -> Markup:
    arguments = " ".join(shlex.quote(word) for word in own_arguments(record["command"][1:]))
    checkout = [f"git checkout {record['git_commit']}"] if record.get("git_commit") else []
    run = f"python {page.experiment}/run.py {arguments}".strip()
    commands = [*checkout, "pip install -r requirements.txt", run]
    versions = {"python": record["python"], **{k: v for k, v in record["packages"].items() if v is not None}}
    hashes: dict[str, str] = {}
    for key, value in record.items():
        if key.endswith("sha256"):
            named = value if isinstance(value, dict) else {"": value}
            hashes |= {f"{key}: {name}".removesuffix(": "): str(one) for name, one in named.items()}
    shown_elsewhere = {*RECORD_OF_THE_RUN, *SAID_OF_THE_RUN}
    settings = {
        key: in_words(value)
        for key, value in record.items()
        if key not in shown_elsewhere and not key.endswith("sha256")
    }
    machine = record["machine"]
    where = f"{machine['system']} on {machine['architecture']}, {machine['cores']} cores"
    facts = [
        table_html(Table(title, caption, heads, list(rows.items())), sortable=False)
        for title, caption, heads, rows in (
            ("Settings", "Every setting that decides the results.", ("setting", "value"), settings),
            ("Versions", "What it was computed with.", ("package", "version"), versions),
            ("Inputs and outputs", "SHA-256 of what was read and written.", ("file", "SHA-256"), hashes),
        )
        if rows
    ]
    return PARTS.reproduction(record, where, commands, facts, page.files)


def in_words(value: Any) -> str:
    """A setting of run.json in one line."""
    if isinstance(value, dict):
        value = [f"{name}: {one}" for name, one in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def own_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line without what says where results go and how a run is resumed: none of it decides them."""
    kept: list[str] = []
    skip_value = False
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if skip_value:
            skip_value = False
        elif name in NOT_OF_THE_REPORT:
            skip_value = name == "--output-dir" and "=" not in argument
        else:
            kept.append(argument)
    return kept


def _is_number(value: Value) -> bool:
    return isinstance(value, Estimate) or (isinstance(value, int | float) and not isinstance(value, bool))


def _decimals(column: Sequence[Value]) -> int:
    """Three significant digits for the largest of a column's values; none for whole numbers."""
    values = [value.value if isinstance(value, Estimate) else value for value in column if _is_number(value)]
    finite = [abs(float(value)) for value in values if value is not None and math.isfinite(value)]  # type: ignore
    if not finite or all(isinstance(value, int) for value in values):
        return 0
    largest = max(finite)
    return min(max(2 - math.floor(math.log10(largest)), 0), 3) if largest else 2


@dataclass(frozen=True)
class _Shown:
    """A cell of a table. sort_by: what it is sorted by, where that is not what is shown."""

    shown: str
    sort_by: str | None = None
    interval: str = ""
    path: str = ""


def _shown(value: Value, decimals: int) -> _Shown:
    match value:
        case Link():
            return _Shown(value.text, path=value.path)
        case Estimate():
            ends = f"[{format_number(value.low, decimals)}, {format_number(value.high, decimals)}]"
            interval = "" if math.isnan(value.low) or math.isnan(value.value) else ends
            sort_by = "" if math.isnan(value.value) else repr(float(value.value))
            return _Shown(format_number(value.value, decimals), sort_by, interval)
        case bool():
            return _Shown("yes" if value else "no")
        case None:
            return _Shown("–", "")
        case int() | float():
            if math.isnan(value):
                return _Shown("–", "")
            return _Shown(format_number(float(value), decimals), repr(float(value)))
        case _:
            return _Shown(str(value))
