"""Whether a finished run's tables agree: with its cases' files where they are here, and with each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crowd_fine_tuning_sim.cases import CASE, CASES, read_cases
from crowd_fine_tuning_sim.pay import LEDGER, misallocated
from crowd_fine_tuning_sim.reliability import exact_reliability, needed, spearman_brown
from crowd_fine_tuning_sim.results import CORRELATIONS, as_bits, correlations, run_tables, seed_rows, summary_table
from crowd_fine_tuning_sim.retraining import all_coalitions, exact_shapley
from experiment.command_line import described
from experiment.errors import InputError
from experiment.run_folder import load_arrays
from experiment.tables import read_table
from user_grouping_evaluation_sim.ledger_check import check_ledger
from user_grouping_evaluation_sim.settings import REGISTRIES

PAID = ["pay", "pay_error", "share"]
TABLES = "users rounds coalitions points estimates progress finals agreement reliability summary".split()
MAY_BE_NAN = ["shapley", "standard_error", *CORRELATIONS, "misallocation", "value", "low", "high"]
MAY_BE_NAN += ["predicted", "observed", "needed"]
EXACT = 1e-9


def verify(folder: Path, record: dict[str, Any], own_code: bool = False) -> tuple[list[str], list[str]]:
    """(what differs, what could not be checked), a line each. own_code: run scorings of the user's own, as run.json
    names them, to recompute what they paid."""
    texts = dict.fromkeys(("user", "coalition", "users", "grouping", "scoring", "what", "model", "estimate"), str)
    # A text may be empty, a number's empty cell is NaN.
    nothing = {name: [""] for name in (*MAY_BE_NAN, *PAID)}
    options: Any = {"dtype": texts, "keep_default_na": False, "na_values": nothing}
    tables = {name: read_table(folder, name, **options) for name in TABLES}
    if missing := [name for name in CORRELATIONS if name not in tables["agreement"]]:
        return [f"agreement.csv: has no {missing[0]}, as of an older version: --redo-tables makes it again"], []
    differences = check_rows(tables, record)
    if differences:
        return differences, ["numbers: recomputed only where no row is missing"]
    unchecked = []
    if record["reference"] == "exact":
        differences += check_shapley(tables["points"], tables["coalitions"], tables["users"])
    else:
        unchecked.append("Shapley values: recomputed from coalitions.csv only where it holds all coalitions")
    differences += check_agreement(tables)
    if not differences:
        differences += check_reliability(tables, record)
    recomputed = summary_table(tables["agreement"], tables["finals"])
    differences += compare("summary.csv", tables["summary"], recomputed)
    if not (folder / CASES).exists():
        unchecked.append("protocols and coalitions: recomputed only where the cases' files are")
    elif any(":" in name for option in REGISTRIES for name in record[option]):
        unchecked.append("protocols and coalitions: recomputed only without strategies of one's own")
    elif not differences:
        differences += check_cases(folder, tables, record)
    points = tables["points"]
    accounts = [tuple(map(str, names)) for names in points[list(LEDGER.keys)].drop_duplicates().itertuples(index=False)]
    by_ledger, unread = check_ledger(
        folder, LEDGER, accounts, points, record, None, tolerance=lambda values: EXACT + 0 * values, own_code=own_code
    )
    return differences + by_ledger, unchecked + unread


def check_rows(tables: dict[str, pd.DataFrame], record: dict[str, Any]) -> list[str]:
    differences = []
    crowds = len(record["target_emotion"]) * record["num_crowds"]
    combinations = len(record["grouping"]) * len(record["metric"]) * len(record["scoring"])
    repetitions, n = crowds * record["num_seeds"], record["num_users"]
    wanted = {"users": crowds * n, "points": repetitions * combinations * n}
    if record["reference"] == "exact":
        wanted["coalitions"] = repetitions * len(record["metric"]) * 2**n
    for name, count in wanted.items():
        if len(tables[name]) != count:
            differences.append(f"{name}.csv: {len(tables[name])} rows where the settings give {count}")
    return differences


def check_cases(folder: Path, tables: dict[str, pd.DataFrame], record: dict[str, Any]) -> list[str]:
    """All tables from what the models wrote and the people's text vectors, but for who is a near-duplicate of whom; and
    in which numbers each case was played, where it says so."""
    try:
        recomputed = run_tables(*read_cases(folder))
    except InputError as error:
        return [str(error)]
    except Exception as error:  # whatever arrays that no run has saved lead to
        return [f"{CASES}: not what a run saves ({described(error)})"]
    tables, recomputed = (
        {**each, "users": each["users"].drop(columns="near_duplicates")} for each in (tables, recomputed)
    )
    said = {path.stem: (load_arrays(path) or {}).get("played/dtype") for path in (folder / CASES).glob("*.npz")}
    recorded = record["dtype"] if isinstance(record["dtype"], dict) else dict.fromkeys(said, record["dtype"])
    others = [
        f"{CASES}/{n}.npz: {d}, not run.json's" for n, d in said.items() if d is not None and d != recorded.get(n)
    ]
    return others + [
        line for name in TABLES for line in compare(f"{name}.csv", tables[name], recomputed[name], "the cases")
    ]


def check_shapley(points: pd.DataFrame, coalitions: pd.DataFrame, users: pd.DataFrame) -> list[str]:
    """points.csv's Shapley values and standard errors from coalitions.csv's values; turncoats have none."""
    differences = []
    for key, own in coalitions.groupby([*CASE, "metric"], sort=False):
        n = len(own["coalition"].iloc[0])
        bits = ["".join("01"[int(i)] for i in row) for row in all_coalitions(n)]
        if set(bits) != set(own["coalition"]):
            differences.append(f"coalitions.csv: {key}: not all 2^{n} coalitions, each once")
            continue
        by_bits = own.set_index("coalition").loc[bits]
        values, errors = exact_shapley(by_bits["value"].to_numpy(), by_bits["variance"].to_numpy(), n)
        turned = users["kind"][(users[["target", "crowd"]] == list(key[:2])).all(axis=1)] == "turncoat"
        stays = np.where(turned, np.nan, 1.0)
        paid = points[(points[[*CASE, "metric"]] == list(key)).all(axis=1)]
        for column, expected in (("shapley", values), ("standard_error", errors)):
            for combination, rows in paid.groupby(["grouping", "scoring"], sort=False):
                if not np.allclose(rows[column], expected * stays, rtol=0, atol=EXACT, equal_nan=True):
                    differences.append(f"points.csv: {key}, {combination}: {column} is not that of coalitions.csv")
    return differences


def check_agreement(tables: dict[str, pd.DataFrame]) -> list[str]:
    differences = []
    kinds = {key: own["kind"].tolist() for key, own in tables["users"].groupby(CASE[:2], sort=False)}
    for row in tables["agreement"].to_dict("records"):
        if row["what"] == "points":
            own, columns = tables["points"], ["metric", "grouping", "scoring"]
            values = "points"
        else:
            own, columns = tables["estimates"].rename(columns={"estimate": "what"}), ["metric", "what"]
            values = "value"
        columns = [*CASE, *columns]
        own = own[(own[columns] == [row[name] for name in columns]).all(axis=1)]
        given, shapley = own[values].to_numpy(float), own["shapley"].to_numpy(float)
        paid = own["share"].to_numpy(float) if row["what"] == "points" else given
        known = kinds[row["target"], row["crowd"]]
        expected = [*correlations(given, shapley, known), misallocated(paid, shapley)]
        measures = [row[name] for name in (*CORRELATIONS, "misallocation")]
        if not np.allclose(expected, measures, atol=EXACT, rtol=0, equal_nan=True):
            named = ", ".join(str(row[name]) for name in columns)
            differences.append(f"agreement.csv: {named}: not what {values} and Shapley values give")
    return differences


def check_reliability(tables: dict[str, pd.DataFrame], record: dict[str, Any]) -> list[str]:
    """What reliability.csv says that follows from other tables; the halves' correlations are of texts and samples."""
    differences = []
    table, exact = tables["reliability"], record["reference"] == "exact"
    for key, _ in tables["points"].groupby([*CASE, "metric"], sort=False):
        found = table[(table[[*CASE, "metric"]] == list(key)).all(axis=1)].set_index("source")
        full = np.nan
        if exact:
            coalitions = tables["coalitions"]
            values = coalitions[(coalitions[[*CASE, "metric"]] == list(key)).all(axis=1)].set_index("coalition")
            values = values.loc[as_bits(all_coalitions(len(values.index[0])))]
            full = exact_reliability(values["value"].to_numpy(), values["variance"].to_numpy())
        expected: dict[str, list[float]] = {}
        if exact:
            half = record["samples"] // 2
            predicted = spearman_brown(full, half / record["samples"])
            expected["samples"] = [half, predicted, np.nan, needed(half, predicted)]
        for source, *numbers in seed_rows(tables["points"], key, full):
            expected[source] = numbers
        if "texts" in found.index:
            at, predicted = found.loc["texts", ["at", "predicted"]]
            expected["texts"] = [at, predicted, np.nan, needed(at, predicted)]
        if set(expected) != set(found.index) or len(expected) != len(found):
            differences.append(f"reliability.csv: {key}: rows {', '.join(found.index)}, not {', '.join(expected)}")
            continue
        for source, numbers in expected.items():
            for column, number in zip(("at", "predicted", "observed", "needed"), numbers, strict=True):
                unknown = column == "observed" and source != "seeds"
                if not unknown and not np.isclose(found.loc[source, column], number, atol=EXACT, equal_nan=True):
                    differences.append(f"reliability.csv: {key}, {source}: {column} is not what other tables give")
    return differences


def compare(file: str, written: pd.DataFrame, recomputed: pd.DataFrame, source: str = "the other tables") -> list[str]:
    if list(written.columns) != list(recomputed.columns) or len(written) != len(recomputed):
        return [f"{file}: its rows or columns are not those that {source} give"]
    differences = []
    for column in written.columns:
        ours, theirs = written[column], recomputed[column]
        if pd.api.types.is_numeric_dtype(ours):
            same = np.isclose(ours.astype(float), theirs.astype(float), rtol=0, atol=EXACT, equal_nan=True)
        else:
            same = (ours.astype(str) == theirs.astype(str)).to_numpy()
        if not same.all():
            row = int((~same).argmax())
            differences.append(f"{file}: row {row + 2}: {column} {ours[row]} is {theirs[row]} by {source}")
    return differences
