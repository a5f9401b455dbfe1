"""Whether a finished run's tables agree with each other, with its settings and with its data.

The tables hold six significant digits. What is recomputed from them may differ by what that rounding can amount to
(`ROUNDING` and the bounds that follow from it) and by no more.
"""

from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit
from scipy.stats import rankdata

from experiment.errors import InputError
from experiment.files import ROOT, sha256_file
from experiment.tables import read_table, table_names
from user_grouping_evaluation_sim.hull import hull_distance
from user_grouping_evaluation_sim.ledger import FORM
from user_grouping_evaluation_sim.ledger_check import LEDGER, check_ledger
from user_grouping_evaluation_sim.preferences import read_matrix, read_movielens
from user_grouping_evaluation_sim.settings import Settings
from user_grouping_evaluation_sim.sweep import crowd_of
from user_grouping_evaluation_sim.tables import (
    COMBINATION,
    SETTLED,
    SUMMARISED,
    best_of,
    paired_table,
    payout_measures,
    pearson,
    regret,
    spearman,
    summary_table,
)

ROUNDING = 5.1e-6  # relative, of a number written with six significant digits
SOLVED = 3e-9  # of attributed points, 1 plus what iterations find: rounding errors of other machines
RUN = [*COMBINATION, "run"]
PLAIN = [measure for measure in SUMMARISED if measure != "regret"]


def verify(folder: Path, record: dict[str, Any], own_code: bool = False) -> tuple[list[str], list[str]]:
    """(what differs, what could not be checked), a line each. own_code: run scorings of the user's own, as run.json
    names them, to recompute what they paid."""
    tables = {
        name: read_table(folder, name, dtype={"user": str}, keep_default_na=False, na_values=[""])
        for name in table_names(folder)
        if name != LEDGER
    }
    runs = tables["runs"]
    if differences := check_rows(tables, record):
        return differences, ["numbers: recomputed only where no row is missing"]
    differences = check_runs(runs, tables["rounds"], tables["points"])
    differences += check_summary(tables["summary"], runs) + check_paired(tables["paired"], runs)
    if "estimators" in tables:
        differences += check_estimators(tables["estimators"], runs)
    if "sweep" in tables:
        differences += check_sweep(tables["sweep"], tables["best"], tables["summary"], record)
    more, unchecked = check_data(tables, record)
    expected = [(*names, "0") for names in product(record["grouping"], record["metric"], record["scoring"])]
    points = tables["points"]
    first = points[points["run"] == 0]
    by_ledger, unread = check_ledger(
        folder, FORM, expected, first, record, record["delta"], tolerance=points_may_differ, own_code=own_code
    )
    return differences + more + by_ledger, unchecked + unread


def check_rows(tables: dict[str, pd.DataFrame], record: dict[str, Any]) -> list[str]:
    """Every combination and run of the settings, every round and user of a run, in the order they are written."""
    names = list(product(record["grouping"], record["metric"], record["scoring"]))
    expected = pd.DataFrame(
        [(*combination, run) for combination in names for run in range(record["num_runs"])], columns=RUN
    )
    rounds = pd.DataFrame(np.tile(np.arange(record["num_rounds"] + 1), len(expected)), columns=["round"])
    wanted = {
        "runs": expected,
        "rounds": _repeated(expected, record["num_rounds"] + 1).join(rounds),
        "points": _repeated(expected, record["num_users"]),
        "summary": pd.DataFrame(names, columns=COMBINATION),
    }
    differences = []
    for name, keys in wanted.items():
        table = tables[name]
        if len(table) != len(keys):
            differences.append(f"{name}.csv: {len(table)} rows where the settings make {len(keys)}")
        elif not (same := (table[keys.columns].to_numpy() == keys.to_numpy()).all(axis=1)).all():
            row = int((~same).argmax())
            differences.append(f"{name}.csv: row {row + 2}: is not of {_named(keys.iloc[row])}")
    return differences


def _repeated(keys: pd.DataFrame, times: int) -> pd.DataFrame:
    return keys.loc[keys.index.repeat(times)].reset_index(drop=True)


def check_runs(runs: pd.DataFrame, rounds: pd.DataFrame, points: pd.DataFrame) -> list[str]:
    """runs.csv from rounds.csv (distances) and points.csv (correlations)."""
    distances = rounds["distance"].to_numpy().reshape(len(runs), -1)
    earned, shapley, errors = (
        points[column].to_numpy(dtype=float).reshape(len(runs), -1)
        for column in ("points", "shapley", "standard_error")
    )
    spread = shapley.std(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        blur = _blur(earned) + _blur(shapley)
        rank_blur = _rank_blur(earned) + _rank_blur(shapley)
        largest = errors.max(axis=1) / np.where(spread > 0, spread, 1)
        of_largest = np.where(largest > 0, largest * (2 * _blur(shapley) + 3 * ROUNDING), 0.0)
    recomputed = {
        "start_distance": (distances[:, 0], 0.0),
        "final_distance": (distances[:, -1], 0.0),
        "pearson": (pearson(earned, shapley), 2 * blur + ROUNDING),
        "spearman": (spearman(earned, shapley), 2 * rank_blur + ROUNDING),
        "shapley_standard_error": (largest, of_largest),
    }
    pay = points["pay"].to_numpy(dtype=float).reshape(len(runs), -1)
    for name, values in payout_measures(pay, shapley, runs["budget"].to_numpy(dtype=float)).items():
        recomputed[name] = (values, 1e-4)
    differences = []
    for column, (values, tolerance) in recomputed.items():
        source = "rounds.csv" if column.endswith("distance") else "points.csv"
        differences += _compare("runs.csv", runs[RUN], column, runs[column], values, tolerance, source)
    slack = 4 * ROUNDING * distances.max(axis=1, keepdims=True)
    early, late = _rounds_to_converge(distances, slack), _rounds_to_converge(distances, -slack)
    middle = (early + late) / 2
    settled = runs["rounds_to_converge"]
    return differences + _compare(
        "runs.csv", runs[RUN], "rounds_to_converge", settled, middle, (late - early) / 2, "rounds.csv"
    )


def _blur(values: np.ndarray) -> np.ndarray:
    """(K, n) -> (K,): how far rounding can turn the centred vector, a bound of what it changes in a correlation."""
    centred = values - values.mean(axis=1, keepdims=True)
    return ROUNDING * np.linalg.norm(values, axis=1) / np.linalg.norm(centred, axis=1)


def _rank_blur(values: np.ndarray) -> np.ndarray:
    """The same for ranks: numbers that are equal as written may have been in any order."""
    ranks = rankdata(values, axis=1)
    centred = np.linalg.norm(ranks - ranks.mean(axis=1, keepdims=True), axis=1)
    sizes = [np.unique(row, return_counts=True)[1] for row in values]
    return np.sqrt([(size * (size**2 - 1) / 12).sum() for size in sizes]) / centred


def _rounds_to_converge(distances: np.ndarray, slack: np.ndarray) -> np.ndarray:
    """As tables.rounds_to_converge, with a tolerance (K, 1) of distance."""
    way = np.abs(distances[:, :1] - distances[:, -1:])
    outside = np.abs(distances - distances[:, -1:]) > SETTLED * way + slack
    outside[:, -1] = False
    return np.where(outside.any(axis=1), distances.shape[1] - outside[:, ::-1].argmax(axis=1), 0)


def _slack(runs: pd.DataFrame) -> pd.DataFrame:
    """What rounding of runs.csv can change in each measure of each run."""
    slack = ROUNDING * runs[PLAIN].abs()
    start, final, hull = (slack[f"{name}_distance"] for name in ("start", "final", "hull"))
    way = (runs["start_distance"] - runs["hull_distance"]).abs()
    slack["regret"] = (final + hull + regret(runs).abs() * (start + hull)) / way
    return slack


def _reach(runs: int) -> float:
    """How far the end of an interval can move where every value moves by at most 1."""
    return 1 + (stdtrit(runs - 1.0, 0.975) if runs > 1 else 0)


def check_summary(summary: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    recomputed = summary_table(runs)
    slack = runs[COMBINATION].join(_slack(runs)).groupby(COMBINATION, sort=False)[SUMMARISED].max()
    differences = _compare(
        "summary.csv", summary[COMBINATION], "runs", summary["runs"], recomputed["runs"], 0, "runs.csv"
    )
    for measure in SUMMARISED:
        tolerance = slack[measure].to_numpy() * _reach(int(recomputed["runs"].min()))
        for column in (measure, f"{measure}_low", f"{measure}_high"):
            allowed = tolerance + ROUNDING * recomputed[column].abs()
            differences += _compare(
                "summary.csv", summary[COMBINATION], column, summary[column], recomputed[column], allowed, "runs.csv"
            )
    return differences


def check_paired(paired: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    recomputed = paired_table(runs)
    keys = [name for name in recomputed.columns if name not in ("difference", "low", "high")]
    written, wanted = (table[keys].fillna("").astype(str).to_numpy().tolist() for table in (paired, recomputed))
    if written != wanted:
        return ["paired.csv: its comparisons are not those that runs.csv allows"]
    slack = _slack(runs).max()
    tolerance = 2 * paired["measure"].map(slack) * _reach(runs["run"].nunique())
    differences = []
    for column in ("difference", "low", "high"):
        allowed = tolerance + ROUNDING * recomputed[column].abs()
        differences += _compare(
            "paired.csv", paired[keys], column, paired[column], recomputed[column], allowed, "runs.csv"
        )
    return differences


def check_estimators(estimators: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    held = estimators[RUN].merge(runs, on=RUN, how="left")
    return _compare("estimators.csv", estimators[RUN], "pearson", estimators["pearson"], held["pearson"], 0, "runs.csv")


def check_sweep(sweep: pd.DataFrame, best: pd.DataFrame, summary: pd.DataFrame, record: dict[str, Any]) -> list[str]:
    """sweep.csv at the run's own setting, and best.csv's shares from sweep.csv's means."""
    setting = ["num_users", "num_groups"]
    own = sweep[(sweep[setting] == [record[name] for name in setting]).all(axis=1)].reset_index(drop=True)
    differences = []
    for column in summary.columns.difference(COMBINATION) if len(own) else []:
        differences += _compare(
            "sweep.csv", own[RUN[:3] + setting], column, own[column], summary[column], 0, "summary.csv"
        )
    for (scoring, measure), rows in best.groupby(["scoring", "measure"], sort=False):
        means = sweep[sweep["scoring"] == scoring].pivot(index=setting, columns=["grouping", "metric"], values=measure)
        signed = means.to_numpy() * (-1 if measure == "final_distance" else 1)
        wins = best_of(signed)
        # Means that are equal as written may have been in either order.
        size = np.nan_to_num(np.abs(signed)).max(axis=1, keepdims=True)
        close = signed >= np.nan_to_num(signed, nan=-np.inf).max(axis=1, keepdims=True) - 2 * ROUNDING * size
        unsure = (close & (close.sum(axis=1, keepdims=True) > 1)).mean(axis=0)
        shares = pd.DataFrame({"share": wins.mean(axis=0), "unsure": unsure + ROUNDING}, index=means.columns)
        shares = shares.loc[list(rows[["grouping", "metric"]].itertuples(index=False, name=None))]
        keys = rows[["scoring", "measure", "grouping", "metric"]]
        differences += _compare(
            "best.csv",
            keys,
            "best_share",
            rows["best_share"],
            shares["share"],
            shares["unsure"].to_numpy(),
            "sweep.csv",
        )
    return differences


def check_data(tables: dict[str, pd.DataFrame], record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The data's hashes; where they agree, every run's crowd, start and hull from the data and the seed."""
    unchecked = [f"the code of {name}" for name in record["code_sha256"]]
    files = {name: ROOT / path for name, path in record.get("data_files", {}).items()}
    gone = [f"{name}: no file {path}" for name, path in files.items() if not path.is_file()]
    if gone or not files:
        return [], unchecked + (gone or ["the data: run.json does not say where they lie"])
    changed = [
        f"{name}: {path} is not the data of this run (SHA-256 differs)"
        for name, path in files.items()
        if sha256_file(path) != record["data_sha256"][name]
    ]
    if changed:
        return changed, unchecked
    given: dict[str, Any] = {field.name: record[field.name] for field in fields(Settings) if field.name in record}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    settings = Settings(**given)
    try:
        if "preferences" in files:
            preferences = read_matrix(files["preferences"])
        else:
            preferences = read_movielens(files["ratings"], files["movies"], keep_no_genres=settings.keep_no_genres)
        crowd = crowd_of(settings, preferences, settings.num_users, 0, settings.num_runs)
    except InputError as error:
        return [str(error)], unchecked
    runs, points = tables["runs"], tables["points"]
    starts = np.linalg.norm(crowd.models - crowd.experts, axis=1)
    hulls = np.array([hull_distance(*pair) for pair in zip(crowd.users, crowd.experts, strict=True)])
    differences = []
    for column, values in (("start_distance", starts), ("hull_distance", hulls)):
        expected = values[runs["run"]]
        allowed = ROUNDING * expected + 1e-6
        differences += _compare("runs.csv", runs[RUN], column, runs[column], expected, allowed, "the data and the seed")
    users = crowd.user_ids[runs["run"]].ravel()
    wrong = points["user"].to_numpy() != users
    if wrong.any():
        row = int(wrong.argmax())
        differences.append(
            f"points.csv: {_named(points[RUN].iloc[row])}: user {points['user'].iloc[row]} is {users[row]} "
            "by the data and the seed"
        )
    return differences, unchecked


def points_may_differ(points: np.ndarray) -> np.ndarray:
    return half_a_digit(points) + SOLVED


def half_a_digit(values: np.ndarray) -> np.ndarray:
    """How far a number may be from itself as written with six significant digits: half of the last one, and a little
    for rounding errors of other machines."""
    size = np.floor(np.log10(np.maximum(np.abs(values), np.finfo(float).tiny)))
    half: np.ndarray = 0.5005 * 10 ** (size - 5)
    return half


def _compare(
    file: str, keys: pd.DataFrame, column: str, written: Any, recomputed: Any, tolerance: Any, source: str
) -> list[str]:
    """A line for the first number that is not what it was recomputed to be, and how many more there are."""
    written, recomputed = np.asarray(written, dtype=float), np.asarray(recomputed, dtype=float)
    allowed = np.broadcast_to(np.asarray(tolerance, dtype=float), written.shape)
    both_missing = np.isnan(written) & np.isnan(recomputed)
    with np.errstate(invalid="ignore"):
        # An infinite tolerance: rounding has left nothing to compare.
        wrong = ~(both_missing | (np.abs(written - recomputed) <= allowed) | np.isinf(allowed))
    if not wrong.any():
        return []
    row = int(wrong.argmax())
    more = f" (and {wrong.sum() - 1} more)" if wrong.sum() > 1 else ""
    return [f"{file}: {_named(keys.iloc[row])}: {column} {written[row]:g} is {recomputed[row]:.6g} by {source}{more}"]


def _named(key: pd.Series) -> str:
    return ", ".join(f"run {value}" if name == "run" else str(value) for name, value in key.items() if value == value)
