"""The tables a run writes, made from what the simulation and the Shapley estimates gave."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from experiment.files import ROOT
from experiment.statistics import mean_interval
from user_grouping_evaluation_sim import payout
from user_grouping_evaluation_sim.ledger import Account, rounds_of
from user_grouping_evaluation_sim.vector_world import Trace

PUBLISHED = ROOT / "data" / "study" / "user_grouping.csv"
COMBINATION = ["grouping", "metric", "scoring"]
SUMMARISED = [
    "start_distance",
    "final_distance",
    "hull_distance",
    "regret",
    "rounds_to_converge",
    "pearson",
    "spearman",
    "budget_ratio",
    "misallocation",
    "unpaid",
    "gini",
]
SETTLED = 0.05  # a run has converged when it stays within this share of its whole way from where it ends


@dataclass(frozen=True)
class Combination:
    """All runs of one combination. user_ids, points, points_errors, pay, pay_errors, shapley, standard_errors: (R, n).
    budget: (R,). distances: (R, T + 1).
    hull: (R,). kernel: (K, n), the study's estimate for the first K runs. trace: of the first run."""

    names: tuple[str, str, str]
    user_ids: np.ndarray
    distances: np.ndarray
    points: np.ndarray
    points_errors: np.ndarray
    pay: np.ndarray
    pay_errors: np.ndarray
    budget: np.ndarray
    hull: np.ndarray
    shapley: np.ndarray
    standard_errors: np.ndarray
    kernel: np.ndarray
    trace: Trace


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the last axis; NaN where a side does not vary. (..., n) -> (...)"""
    a = a - a.mean(axis=-1, keepdims=True)
    b = b - b.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis, ties at their mean rank. (..., n) -> (...)"""
    return pearson(rankdata(a, axis=-1), rankdata(b, axis=-1))


def rounds_to_converge(distances: np.ndarray) -> np.ndarray:
    """(R, T + 1) -> (R,): the first round after which a run stays within 5 % of its way from its final distance."""
    way = np.abs(distances[:, :1] - distances[:, -1:])
    outside = np.abs(distances - distances[:, -1:]) > SETTLED * way
    return np.where(outside.any(axis=1), distances.shape[1] - outside[:, ::-1].argmax(axis=1), 0)


def regret(runs: pd.DataFrame) -> pd.Series:
    """(final - hull) / (start - hull): 0 at the crowd's geometric limit, 1 where nothing was gained."""
    return (runs["final_distance"] - runs["hull_distance"]) / (runs["start_distance"] - runs["hull_distance"])


def run_tables(combinations: Sequence[Combination]) -> dict[str, pd.DataFrame]:
    """The tables of one setting, by file name."""
    runs = runs_table(combinations)
    frames = {"runs": runs, "rounds": rounds_table(combinations), "points": points_table(combinations)}
    frames |= {"summary": summary_table(runs), "paired": paired_table(runs)}
    return frames | ({"estimators": estimators_table(combinations)} if len(combinations[0].kernel) else {})


def sweep_tables(
    runs_by_setting: Mapping[tuple[int, int], pd.DataFrame], rng: np.random.Generator
) -> dict[str, pd.DataFrame]:
    """The tables over all settings (num_users, num_groups), by file name."""

    def over_settings(table: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        return pd.concat(
            [
                table(runs).assign(num_users=users, num_groups=groups)
                for (users, groups), runs in runs_by_setting.items()
            ],
            ignore_index=True,
        )

    best = best_table(runs_by_setting, rng)
    replication = replication_table(best)
    return {
        "sweep": over_settings(summary_table),
        "sweep_paired": over_settings(paired_table),
        "best": best,
        **({"replication": replication} if replication["published_share"].notna().any() else {}),
    }


def runs_table(combinations: Sequence[Combination]) -> pd.DataFrame:
    frames = []
    for combination in combinations:
        spread = combination.shapley.std(axis=1)
        columns = {
            "run": np.arange(len(combination.points)),
            "start_distance": combination.distances[:, 0],
            "final_distance": combination.distances[:, -1],
            "hull_distance": combination.hull,
            "rounds_to_converge": rounds_to_converge(combination.distances),
            "pearson": pearson(combination.points, combination.shapley),
            "spearman": spearman(combination.points, combination.shapley),
            "shapley_standard_error": combination.standard_errors.max(axis=1) / np.where(spread > 0, spread, 1),
            "budget": combination.budget,
            **payout_measures(combination.pay, combination.shapley, combination.budget),
        }
        frames.append(_labelled(combination, columns))
    return pd.concat(frames, ignore_index=True)


def payout_measures(pay: np.ndarray, shapley: np.ndarray, budget: np.ndarray) -> dict[str, np.ndarray]:
    """By name, (R,): what is paid out of each unit of the budget, and how; NaN where there is none to pay."""
    measures = {
        "budget_ratio": pay.sum(axis=1) / np.maximum(budget, 1),
        "misallocation": payout.misallocation(pay, shapley),
        "unpaid": payout.unpaid(pay, shapley),
        "gini": payout.gini(pay),
    }
    return {name: np.where(budget > 0, values, np.nan) for name, values in measures.items()}


def rounds_table(combinations: Sequence[Combination]) -> pd.DataFrame:
    frames = []
    for combination in combinations:
        runs, rounds = combination.distances.shape
        run, round_ = np.indices((runs, rounds))
        columns = {"run": run.ravel(), "round": round_.ravel(), "distance": combination.distances.ravel()}
        frames.append(_labelled(combination, columns))
    return pd.concat(frames, ignore_index=True)


def points_table(combinations: Sequence[Combination]) -> pd.DataFrame:
    frames = []
    for combination in combinations:
        columns = {
            "run": np.repeat(np.arange(len(combination.points)), combination.points.shape[1]),
            "user": combination.user_ids.ravel(),
            "points": combination.points.ravel(),
            "points_error": combination.points_errors.ravel(),
            "pay": combination.pay.ravel(),
            "pay_error": combination.pay_errors.ravel(),
            "shapley": combination.shapley.ravel(),
            "standard_error": combination.standard_errors.ravel(),
        }
        frames.append(_labelled(combination, columns))
    return pd.concat(frames, ignore_index=True)


def estimators_table(combinations: Sequence[Combination]) -> pd.DataFrame:
    """The runs that the study's estimator validated too: the correlation of the points with either estimate."""
    frames = []
    for combination in combinations:
        count = len(combination.kernel)
        columns = {
            "run": np.arange(count),
            "pearson": pearson(combination.points[:count], combination.shapley[:count]),
            "pearson_kernel": pearson(combination.points[:count], combination.kernel),
            "kernel_against_shapley": pearson(combination.kernel, combination.shapley[:count]),
        }
        frames.append(_labelled(combination, columns))
    return pd.concat(frames, ignore_index=True)


def summary_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over the runs with 95 % intervals (_low, _high), a row a combination, in the order of `runs`."""
    rows = []
    for names, group in runs.assign(regret=regret(runs)).groupby(COMBINATION, sort=False):
        row: dict[str, object] = dict(zip(COMBINATION, names, strict=True)) | {"runs": len(group)}
        for column in SUMMARISED:
            row[column], row[f"{column}_low"], row[f"{column}_high"] = mean_interval(group[column].to_numpy())
        rows.append(row)
    return pd.DataFrame(rows)


def paired_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Differences between combinations that share metric and crowd, run by run: every grouping against the first
    one, and every scoring against the first one. A row a comparison and measure, with 95 % intervals."""
    runs = runs.assign(regret=regret(runs)).set_index([*COMBINATION, "run"])
    rows = []
    for factor in ("grouping", "scoring"):
        others = [name for name in COMBINATION if name != factor]
        reference, *alternatives = runs.index.unique(factor)
        for alternative in alternatives:
            difference = runs.xs(alternative, level=factor) - runs.xs(reference, level=factor)
            for names, group in difference.groupby(others, sort=False):
                fixed = dict(zip(others, names, strict=True))
                for measure in ("final_distance", "regret", "pearson", "misallocation"):
                    mean, low, high = mean_interval(group[measure].to_numpy())
                    compared = {"compared": factor, "alternative": alternative, "reference": reference}
                    rows.append(compared | fixed | {"measure": measure, "difference": mean, "low": low, "high": high})
    columns = ["compared", "alternative", "reference", *COMBINATION, "measure", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def best_table(
    runs_by_setting: Mapping[tuple[int, int], pd.DataFrame], rng: np.random.Generator, resamples: int = 2000
) -> pd.DataFrame:
    """How often, over the settings (num_users, num_groups), each grouping and metric is best, by scoring.

    Best is the least mean final distance or the greatest mean correlation over the runs. The 95 % intervals are of a
    bootstrap over the runs, the same resample for all combinations, which keeps the pairing, and for all num_groups,
    which share the crowds of a num_users.
    """
    rows = []
    drawn: dict[tuple[int, int], np.ndarray] = {}  # by num_users and runs
    first = next(iter(runs_by_setting.values()))
    for scoring in first["scoring"].unique():
        for measure, sign in (("final_distance", -1.0), ("pearson", 1.0)):
            if all(runs[measure].isna().all() for runs in runs_by_setting.values()):
                continue
            wins = []
            for (num_users, _), runs in runs_by_setting.items():
                chosen = runs[runs["scoring"] == scoring]
                table = chosen.pivot(index="run", columns=["grouping", "metric"], values=measure)
                values = sign * table.to_numpy()
                count = len(values)
                if (num_users, count) not in drawn:
                    picks = rng.integers(count, size=(resamples, count))
                    resampled = [np.bincount(pick, minlength=count) for pick in picks]
                    drawn[num_users, count] = np.stack([np.ones(count), *resampled])
                counts = drawn[num_users, count]
                with np.errstate(invalid="ignore"):
                    means = counts @ np.nan_to_num(values) / (counts @ np.isfinite(values))
                wins.append(best_of(means))
            share = np.mean(wins, axis=0)  # (1 + resamples, combinations)
            low, high = np.quantile(share[1:] if count > 1 else share[1:] * np.nan, [0.025, 0.975], axis=0)
            for column, (grouping, metric) in enumerate(table.columns):
                names = {"scoring": scoring, "measure": measure, "grouping": grouping, "metric": metric}
                rows.append(names | {"best_share": share[0, column], "low": low[column], "high": high[column]})
    return pd.DataFrame(rows)


def best_of(means: np.ndarray) -> np.ndarray:
    """(m, k) -> bool (m, k): the greatest of each row, the first of equals; none in a row that is all NaN."""
    known = np.nan_to_num(means, nan=-np.inf)
    best = known.argmax(axis=1)[:, None] == np.arange(means.shape[1])
    wins: np.ndarray = best & np.isfinite(means)
    return wins


def replication_table(best: pd.DataFrame) -> pd.DataFrame:
    """The rows of `best` with the study's points, beside the shares that the study published; NaN where unknown."""
    published = pd.read_csv(PUBLISHED)
    key = ["scoring", "measure", "grouping", "metric"]
    own = best[best["scoring"].isin(published["scoring"])]
    return own.merge(published[[*key, "published_share"]], on=key, how="left")


def account_of(combination: Combination) -> Account:
    """The first run, for the ledger."""
    trace = combination.trace
    return Account(
        (*combination.names, "0"),
        tuple(map(str, combination.user_ids[0])),
        rounds_of(trace.labels, trace.weights, trace.rewards, trace.improved, trace.order, trace.merged_weights),
        trace.alone[None],
        trace.everybody,
        trace.gained,
    )


def _labelled(combination: Combination, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    return pd.DataFrame(dict(zip(COMBINATION, combination.names, strict=True)) | columns)
