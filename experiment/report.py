"""A run as one page that is complete in itself: no network, no other file, nothing that the run did not say.

An experiment describes its page (`Page`); this module renders it. Everything that comes from outside (comments that a
model wrote, names of files and users) is escaped, and the page's own policy forbids all but its one style and script.
"""

import base64
import hashlib
import html
import json
import math
import re
import shlex
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from experiment.files import ROOT, replace_atomically
from experiment.run_folder import RunFolder, output_hashes, provenance

RESULTS = ROOT / "results"
HERE = Path(__file__).resolve().parent
FIGURE_DPI = 150  # of the figures in a run's folder (experiment.figures.save_figure); a CSS pixel is 1/96 inch
# The HTML standard's control-character and noncharacter parse errors, and what UTF-8 cannot hold.
NONCHARACTERS = "".join(chr(plane * 0x10000 + end) for plane in range(17) for end in (0xFFFE, 0xFFFF))
FORBIDDEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{NONCHARACTERS}]")
NOT_OF_THE_REPORT = ("--output-dir", "--overwrite", "--no-overwrite", "--resume", "--no-resume")


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
class Figure:
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
class Page:
    """What an experiment says of a run. answer: the first sentence answers the question, others qualify it.
    setting: a sentence or two. samples: by heading. files: the run's other files, with what they hold."""

    experiment: str
    title: str
    question: str
    answer: Sequence[str]
    setting: Sequence[str]
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    samples: Mapping[str, Sequence[Sample]] | None = None
    samples_note: str = ""
    files: Sequence[tuple[str, str]] = ()


def finish_with_report(run: RunFolder, page: Page, parts: Sequence[str] | None = None, **facts: Any) -> None:
    """Writes report.html, then run.json (the mark of a complete run), then the index where the run lies in results/.

    parts: those that the run took in, by default all. facts: for run.json.
    """
    with run.stage("report"):
        record = {**run.identity, **facts, **provenance(), "outputs_sha256": output_hashes(run.path)}
        write_page(run.path / "report.html", report_html(run.path, page, record))
    run.finish(parts, **{"experiment": page.experiment, "answer_in_words": " ".join(page.answer), **facts})
    if run.path.resolve().is_relative_to(RESULTS):
        write_page(RESULTS / "index.html", index_html(RESULTS))


def write_page(path: Path, page: str) -> None:
    with replace_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def report_html(folder: Path, page: Page, record: Mapping[str, Any]) -> str:
    """The page of a run. Its bytes follow from the run alone. record: what run.json says, but for the times."""
    sections = {"Setting": _paragraphs(page.setting)}
    if page.figures:
        sections["Figures"] = "\n".join(_figure(folder, figure) for figure in page.figures)
    if page.tables:
        sections["Tables"] = "\n".join(table_html(table) for table in page.tables)
    if page.samples:
        sections["Sampled comments"] = _samples(page.samples, page.samples_note)
    sections["How to reproduce it"] = _reproduction(page, record)
    return page_html(page.title, page.question, page.answer, sections)


def page_html(title: str, question: str, answer: Sequence[str], sections: Mapping[str, str]) -> str:
    """A whole page. title, question and answer are text; sections: by heading, HTML."""
    style, script = _inline("report.css"), _inline("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    names = {heading: f"section-{i}" for i, heading in enumerate(sections, start=1)}
    links = "".join(f'<li><a href="#{name}">{text(heading)}</a></li>' for heading, name in names.items())
    bodies = "\n".join(
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{text(heading)}</h2>\n{sections[heading]}\n</section>'
        for heading, name in names.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<p class="question">{text(question)}</p>
</header>
<main>
<div class="answer">
{_paragraphs(answer)}
</div>
<nav aria-label="Sections"><ul>{links}</ul></nav>
{bodies}
</main>
<script>{script}</script>
</body>
</html>
"""


def text(value: object) -> str:
    """Escaped for HTML; what HTML forbids (control characters, half surrogates, non-characters) becomes U+FFFD."""
    lines = str(value).replace("\r\n", "\n").replace("\r", "\n")
    return html.escape(FORBIDDEN.sub("\ufffd", lines), quote=True)


def href(path: str) -> str:
    """A relative path as an address: with a scheme (javascript:) it would be one no more."""
    return quote(path, errors="surrogateescape")


def table_html(table: Table) -> str:
    """A table that can be sorted by any column. Numbers of a column share their decimals."""
    if not table.rows:
        return f"<h3>{text(table.title)}</h3>\n<p>{text(table.caption)} (no rows)</p>"
    columns = list(zip(*table.rows, strict=True))
    decimals = [_decimals(column) for column in columns]
    numeric = [any(_is_number(value) for value in column) for column in columns]
    heads = "".join(
        f'<th scope="col"{_number_class(is_number)}>{text(name)}</th>'
        for name, is_number in zip(table.columns, numeric, strict=True)
    )
    rows = []
    for row in table.rows:
        first, *others = (
            _cell(value, places, is_number) for value, places, is_number in zip(row, decimals, numeric, strict=True)
        )
        cells = "".join(f"<td{attributes}>{content}</td>" for attributes, content in others)
        rows.append(f'<tr><th scope="row"{first[0]}>{first[1]}</th>{cells}</tr>')
    name = "table-" + hashlib.sha256(f"{table.title}{table.caption}".encode()).hexdigest()[:8]
    source = f' All of it: <a href="{href(table.file)}">{text(table.file)}</a>.' if table.file else ""
    body = "\n".join(rows)
    return f"""<h3 id="{name}">{text(table.title)}</h3>
<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0">
<table class="sortable">
<caption><span>{text(table.caption)}{source}</span></caption>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>"""


def format_number(value: float, decimals: int) -> str:
    """With a true minus sign; an en dash where there is no number."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    shown = f"{value:.{decimals}f}"
    return shown.replace("-", "−") if float(shown) else shown.removeprefix("-")


def words(estimate: Sequence[float] | Estimate, decimals: int = 2) -> str:
    """0.95 [0.94, 0.96]"""
    value, low, high = (
        (estimate.value, estimate.low, estimate.high) if isinstance(estimate, Estimate) else map(float, estimate)
    )
    shown = format_number(value, decimals)
    if math.isnan(low):
        return shown
    return f"{shown} [{format_number(low, decimals)}, {format_number(high, decimals)}]"


def estimates(rows: Mapping[str, Any], column: str, low: str | None = None, high: str | None = None) -> Estimate:
    """The columns `column`, `column`_low and `column`_high of a row, or others that are named."""
    names = (column, low or f"{column}_low", high or f"{column}_high")
    return Estimate(*(float(rows[name]) for name in names))


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
                _commit(record),
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


def _inline(name: str) -> str:
    return "\n" + (HERE / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _paragraphs(sentences: Iterable[str]) -> str:
    return "\n".join(f"<p>{text(sentence)}</p>" for sentence in sentences)


def _figure(folder: Path, figure: Figure) -> str:
    content = (folder / f"{figure.name}.png").read_bytes()
    # At its printed size: the pixels beyond that are for dense screens and paper.
    width, height = (round(pixels * 96 / FIGURE_DPI) for pixels in struct.unpack(">II", content[16:24]))
    name = "figure-" + hashlib.sha256(figure.name.encode()).hexdigest()[:8]
    shape = ' class="wide"' if width > 480 else ""
    data = base64.b64encode(content).decode()
    return f"""<h3 id="{name}">{text(figure.title)}</h3>
<figure>
<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0">
<img{shape} width="{width}" height="{height}" alt="{text(figure.alt)}" src="data:image/png;base64,{data}">
</div>
<figcaption>{text(figure.caption)} File: <a href="{href(figure.name)}.pdf">{text(figure.name)}.pdf</a>.</figcaption>
</figure>"""


def _samples(samples: Mapping[str, Sequence[Sample]], note: str) -> str:
    parts = [f'<p class="note">{text(note)}</p>']
    for heading, group in samples.items():
        boxes = []
        for sample in group:
            # Isolated, so that a text cannot turn the direction of what follows.
            items = "".join(
                f'<li><span class="distance">{distance:.2f}</span><bdi>{text(said) or "(empty)"}</bdi></li>'
                for distance, said in sample.texts
            )
            boxes.append(f'<div class="sample"><h4>{text(sample.title)}</h4><ul>{items}</ul></div>')
        parts.append(f'<h3>{text(heading)}</h3>\n<div class="samples">\n' + "\n".join(boxes) + "\n</div>")
    return "\n".join(parts)


def _reproduction(page: Page, record: Mapping[str, Any]) -> str:
    lines = [f"git checkout {record['git_commit']}"] if record.get("git_commit") else []
    lines.append("pip install -r requirements.txt")
    # Several, where targets were added.
    for command in [*record.get("earlier_commands", []), record["command"]]:
        arguments = " ".join(shlex.quote(word) for word in own_arguments(command[1:]))
        lines.append(f"python {page.experiment}/run.py {arguments}".strip())
    lines = list(dict.fromkeys(lines))
    versions = {"python": record["python"], **{k: v for k, v in record["packages"].items() if v is not None}}
    hashes: dict[str, str] = {}
    for key, value in record.items():
        if key.endswith("sha256"):
            hashes |= (
                {f"{key}: {name}": str(one) for name, one in value.items()}
                if isinstance(value, dict)
                else {key: str(value)}
            )
    skipped = {
        "python",
        "packages",
        "command",
        "earlier_commands",
        "git_commit",
        "earlier_commits",
        "git_dirty",
        "machine",
        "answer",
        *hashes,
    }
    settings = {
        key: _plain(value) for key, value in record.items() if key not in skipped and not key.endswith("sha256")
    }
    machine = record["machine"]
    where = f"{machine['system']} on {machine['architecture']}, {machine['cores']} cores"
    dirty = " That commit had changes that were not committed." if record.get("git_dirty") else ""
    if earlier := record.get("earlier_commits"):
        dirty += f" Begun at commit {', '.join(str(commit)[:10] for commit in earlier)}."
    files = "".join(f'<li><a href="{href(name)}">{text(name)}</a>: {text(what)}</li>' for name, what in page.files)
    return "\n".join(
        [
            f"<p>Commit {text(_commit(record))}, made on {text(where)}.{text(dirty)} The results follow from "
            "the settings, the seed and the hashed inputs; how many processes work at once does not matter.</p>",
            f"<pre>{text(chr(10).join(lines))}</pre>",
            _facts("Settings", "Every setting that decides the results.", ("setting", "value"), settings),
            _facts("Versions", "What it was computed with.", ("package", "version"), versions),
            _facts("Inputs", "SHA-256 of what was read.", ("input", "SHA-256"), hashes),
            f"<h3>Files</h3>\n<ul>{files}</ul>" if files else "",
        ]
    )


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


def _facts(title: str, caption: str, heads: tuple[str, str], facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    rows = [(name, value) for name, value in facts.items()]
    return table_html(Table(title, caption, heads, rows)).replace('<table class="sortable">', '<table class="wrap">')


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _commit(record: Mapping[str, Any]) -> str:
    commit = record.get("git_commit")
    return f"{str(commit)[:10]}{' with changes' if record.get('git_dirty') else ''}" if commit else "unknown"


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


def _number_class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _cell(value: Value, decimals: int, is_number: bool) -> tuple[str, str]:
    """A cell's attributes and content. data-value: what it is sorted by."""
    attributes = _number_class(is_number)
    if isinstance(value, Link):
        return attributes, f'<a href="{href(value.path)}">{text(value.text)}</a>'
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return f'{attributes} data-value=""', "–"
    if isinstance(value, Estimate):
        sort_by = "" if math.isnan(value.value) else repr(float(value.value))
        ends = f"[{format_number(value.low, decimals)}, {format_number(value.high, decimals)}]"
        interval = "" if math.isnan(value.low) else f' <span class="interval">{ends}</span>'
        return f'{attributes} data-value="{sort_by}"', format_number(value.value, decimals) + interval
    if isinstance(value, bool):
        return attributes, "yes" if value else "no"
    if isinstance(value, int | float):
        return f'{attributes} data-value="{float(value)!r}"', format_number(float(value), decimals)
    return attributes, text(value)
