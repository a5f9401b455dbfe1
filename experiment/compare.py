"""Compare finished runs of one experiment: python -m experiment.compare FOLDER FOLDER ... [--output FILE.html]

Writes one self-contained page: every run's settings and means, and the differences to the first run, paired where the
seed, the run and the combination (or the target and the protocol) match.
"""

import argparse
import json
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiment.errors import InputError
from experiment.report import (
    SAID_OF_THE_RUN,
    Compared,
    Estimate,
    Link,
    Table,
    Value,
    joined,
    page_html,
    table_html,
    words,
    write_page,
)
from experiment.run_folder import RECORD_OF_THE_RUN, read_record
from experiment.statistics import mean_interval
from experiment.tables import read_table, table_path

NOT_SETTINGS = (
    *(*RECORD_OF_THE_RUN, *SAID_OF_THE_RUN),
    *("outputs_sha256", "dimensions", "sources", "data_files"),
)

MEASURED_BY = ("data", "corpus", "crowd", "mapper")
"""What runs of one or another experiment are of, by their hashes."""


@dataclass(frozen=True)
class Run:
    """A finished run. table: a row a group and unit."""

    name: str
    folder: Path
    record: dict[str, Any]
    layout: Compared
    table: pd.DataFrame


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiment.compare", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="two or more runs' folders")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="default: comparison.html, here")
    given = parser.parse_args(arguments)
    try:
        write_page(given.output, compare(given.folders, given.output))
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {given.output}: {error.strerror}; choose another --output", file=sys.stderr)
        return 2
    print(f"comparison: {given.output}")
    return 0


def compare(folders: Sequence[Path], output: Path) -> str:
    """The page. Raises InputError where there is nothing to compare: one folder, unfinished, other experiments."""
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise InputError("FOLDER FOLDER ...: name at least two runs' folders, each once")
    names = [chr(ord("A") + i) if len(folders) <= 26 else f"R{i + 1}" for i in range(len(folders))]
    runs = [read_run(name, folder) for name, folder in zip(names, folders, strict=True)]
    first, *others = runs
    experiment = first.record["experiment"]
    for run in others:
        if run.record["experiment"] != experiment:
            raise InputError(
                f"{run.folder}: a run of {run.record['experiment']}, the first is of {experiment}; "
                "compare runs of one experiment"
            )
    layout = first.layout
    differences = [difference_table(first, run, layout) for run in others]
    if layout.breakdown is not None:
        differences += [breakdown_table(first, run, layout, layout.breakdown) for run in others]
    sections = {
        "Runs": joined(map(table_html, (runs_table(runs, output), settings_table(runs)))),
        "Differences": joined(map(table_html, differences)),
        "Means": table_html(means_table(runs, layout)),
    }
    title = f"{len(runs)} runs of {experiment} compared"
    question = "Which run came closer, and does the difference stand out from chance?"
    return page_html(title, question, [in_words(first, run, layout) for run in others], sections)


def read_run(name: str, folder: Path) -> Run:
    """Raises InputError where the folder holds no finished run that says how it is compared."""
    record = read_record(folder)
    try:
        layout = Compared(**record["compared"])
        record["experiment"], record["seed"]
    except (KeyError, TypeError):
        raise InputError(f"{folder}: its run.json does not say how it is compared; run it again") from None
    try:
        text = dict.fromkeys((*layout.groups, *layout.units), str) | {"seed": int, "run": int}
        table = read_table(folder, layout.table, dtype=text, keep_default_na=False, na_values=[""])
        for column, value in layout.where.items():
            table = table[table[column] == value]
        keys = [*layout.groups, *layout.units]
        if layout.last is not None:
            table = table[table[layout.last] == table.groupby(keys)[layout.last].transform("max")]
        table = table.groupby(keys, sort=False, as_index=False)[list(layout.measures)].mean()
    except FileNotFoundError:
        raise InputError(
            f"{table_path(folder, layout.table)}: is missing; run it again, or name another folder"
        ) from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise InputError(f"{table_path(folder, layout.table)}: not readable ({error}); run it again") from None
    return Run(name, folder, record, layout, table)


def paired(first: Run, other: Run, layout: Compared) -> pd.DataFrame:
    """A row a group and unit that both runs have, measures as <name>_first and <name>_other.

    Units pair only where their data and what measures them are the same, and their seed, be it a column or the run's
    own.
    """
    same: list[Any] = [[run.record.get(f"{of}_sha256") for of in MEASURED_BY] for run in (first, other)]
    if "seed" not in layout.units:
        same = [(data, run.record["seed"]) for data, run in zip(same, (first, other), strict=True)]
    table = first.table if same[0] == same[1] else first.table.iloc[:0]
    return table.merge(other.table, on=[*layout.groups, *layout.units], suffixes=("_first", "_other"))


def difference_table(first: Run, other: Run, layout: Compared) -> Table:
    both = paired(first, other, layout)
    units = " and ".join(layout.units)
    rows: list[list[Value]] = []
    for names, group in both.groupby(list(layout.groups), sort=False):
        rows.append(
            [
                *names,
                len(group),
                *(
                    _mean(group[f"{measure}_other"] - group[f"{measure}_first"], group, layout)
                    for measure in layout.measures
                ),
            ]
        )
    caption = (
        f"{other.name} − {first.name}: mean of the differences over pairs that share {units}, with "
        f"Student's 95 % interval{_over(layout)} (none for a single pair). An interval that leaves out 0 is a "
        "difference that the pairs show; with many rows, about one in twenty does so by chance. "
        f"{_what_is_better(layout)}"
    )
    if not rows:
        caption = f"{other.name} and {first.name} share no {units} on the same data: see the means."
    columns = [*layout.groups, "pairs", *map(_words, layout.measures)]
    return Table(f"{other.name} − {first.name}", caption, columns, rows)


def breakdown_table(first: Run, other: Run, layout: Compared, unit: str) -> Table:
    """The difference by one of the units and by group, over the other units."""
    others = " and ".join(name for name in layout.units if name != unit)
    rows: list[list[Value]] = []
    for names, group in paired(first, other, layout).groupby([unit, *layout.groups], sort=False):
        changes = (group[f"{measure}_other"] - group[f"{measure}_first"] for measure in layout.measures)
        rows.append([*names, len(group), *(_mean(own, group, layout) for own in changes)])
    caption = f"{other.name} − {first.name} by {unit}: means over the {others}s that both have, with 95 % intervals."
    columns = [unit, *layout.groups, f"{others}s", *map(_words, layout.measures)]
    return Table(f"{other.name} − {first.name} by {unit}", caption, columns, rows)


def means_table(runs: Sequence[Run], layout: Compared) -> Table:
    rows: list[list[Value]] = []
    for run in runs:
        for names, group in run.table.groupby(list(layout.groups), sort=False):
            means = (_mean(group[measure], group, layout) for measure in layout.measures)
            rows.append([run.name, *names, len(group), *means])
    units = " and ".join(layout.units)
    caption = f"Means over {units} with 95 % intervals{_over(layout)}, each run by itself. {_what_is_better(layout)}"
    return Table("All runs", caption, ["run", *layout.groups, "n", *map(_words, layout.measures)], rows)


def runs_table(runs: Sequence[Run], output: Path) -> Table:
    rows: list[list[Value]] = []
    for run in runs:
        page = "report.html" if (run.folder / "report.html").exists() else "run.json"
        link = Link(str(run.folder), Path(os.path.relpath(run.folder / page, output.resolve().parent)).as_posix())
        commit = str(run.record.get("git_commit") or "unknown")[:10]
        rows.append([run.name, link, str(run.record.get("answer_in_words", "")), commit])
    return Table("What is compared", "Differences are to the first run.", ["run", "folder", "answer", "commit"], rows)


def settings_table(runs: Sequence[Run]) -> Table:
    """The settings in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.record if key not in NOT_SETTINGS)
    shown: list[list[Value]] = []
    for key in keys:
        values = [json.dumps(run.record.get(key), ensure_ascii=False).strip('"') for run in runs]
        if len(set(values)) > 1:
            shown.append([key, *values])
    caption = "Settings in which the runs differ." if shown else "The runs have the same settings."
    return Table("What differs", caption, ["setting", *(run.name for run in runs)], shown)


def in_words(first: Run, other: Run, layout: Compared) -> str:
    """One sentence: the first measure's mean difference, over all groups that both runs have, unit by unit."""
    measure, sign = next(iter(layout.measures.items()))
    both = paired(first, other, layout)
    if both.empty:
        return f"{other.name} and {first.name} have no pairs in common, so only their means are shown."
    change = both[f"{measure}_other"] - both[f"{measure}_first"]
    by_unit = change.groupby([both[unit] for unit in layout.units]).mean().rename("change").reset_index()
    mean = _mean(by_unit["change"], by_unit, layout)
    better = sign * mean.low > 0 and sign * mean.high > 0
    worse = sign * mean.low < 0 and sign * mean.high < 0
    verdict = "better than" if better else "worse than" if worse else "not told apart from"
    return (
        f"Run {other.name} is {verdict} run {first.name} in {_words(measure)}: {words(mean, 3)} over "
        f"{len(by_unit)} pairs, the mean of all {' x '.join(layout.groups)} rows that both have (95 % "
        f"interval{_over(layout)})."
    )


def _what_is_better(layout: Compared) -> str:
    return (
        "; ".join(
            f"{_words(name)}: {'more' if sign > 0 else 'less'} is better" for name, sign in layout.measures.items()
        )
        + "."
    )


def _words(measure: str) -> str:
    return measure.replace("_", " ")


def _over(layout: Compared) -> str:
    return (
        ""
        if layout.breakdown is None
        else f" over {layout.breakdown}s, of each the mean of its pairs (of a single one over them)"
    )


def _mean(values: pd.Series, rows: pd.DataFrame, layout: Compared) -> Estimate:
    """With its interval. rows: those of the values; of several breakdowns (targets), each counts once: its seeds say
    little of others."""
    if layout.breakdown is not None and rows[layout.breakdown].nunique() > 1:
        values = values.groupby(rows[layout.breakdown]).mean()
    return Estimate(*(float(end) for end in mean_interval(values.to_numpy(np.float64))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
