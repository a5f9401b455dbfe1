"""The tables of a run, all of them from its cases."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from scipy.stats import rankdata

from crowd_fine_tuning_sim.cases import CASE, COMBINATION, Combination, Played, user_names
from crowd_fine_tuning_sim.crowds import near_duplicates
from crowd_fine_tuning_sim.estimates import ESTIMATES, reference_of, simulated
from crowd_fine_tuning_sim.pay import Pay, misallocated, pay_of
from crowd_fine_tuning_sim.reliability import (
    correlation,
    exact_reliability,
    mean_known,
    needed,
    spearman_brown,
    split_samples,
    split_texts,
    static_shapley,
    text_reliability,
)
from crowd_fine_tuning_sim.retraining import static_game, values_of
from crowd_fine_tuning_sim.settings import MOST_USERS_EXACT, Settings
from experiment.statistics import correlation_interval, mean_interval
from point_in_space_sim.target import distances_to
from user_grouping_evaluation_sim.settings import metric_of

Tables = dict[str, pd.DataFrame]
SAME_TEXT = 1e-3  # largest difference of two vectors of one text, whose last bits differ between batches


def run_tables(settings: Settings, cases: Sequence[Played]) -> Tables:
    frames: dict[str, list[pd.DataFrame]] = {}
    for played in cases:
        for name, frame in case_tables(settings, played).items():
            frames.setdefault(name, []).append(frame)
    tables = {name: pd.concat(own, ignore_index=True) for name, own in frames.items()}
    tables["users"] = tables["users"].drop_duplicates(["target", "crowd", "user"], ignore_index=True)
    tables["reliability"] = reliability_table(settings, cases, tables["points"])
    return tables | {"summary": summary_table(tables["agreement"], tables["finals"])}


def case_tables(settings: Settings, played: Played) -> Tables:
    crowd = played.case.crowd
    names = user_names(settings, crowd)
    references = {metric: reference_of(settings, played, metric) for metric in settings.metric}
    pay = pay_of(settings, played)
    estimates = {
        metric: {name: np.asarray(entry[0](settings, played, metric)) for name, entry in ESTIMATES.items()}
        for metric in settings.metric
    }
    return {
        "users": users_table(played, names),
        "rounds": rounds_table(played),
        "coalitions": coalitions_table(settings, played),
        "points": points_table(played, names, references, estimates, pay),
        "estimates": estimates_table(played, names, references, estimates),
        "progress": progress_table(settings, played),
        "finals": finals_table(settings, played),
        "agreement": agreement_table(settings, played, references, estimates, pay),
    }


def _rows(played: Played, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame({**played.key, **columns})


def users_table(played: Played, names: Sequence[str]) -> pd.DataFrame:
    """users.csv: distance is the mean text vector's to the centroid."""
    people = played.case.crowd.people
    table = _rows(
        played,
        user=names,
        kind=[person.kind for person in people],
        texts=[len(person.texts) for person in people],
        distance=distances_to(played.case.crowd.centroid, played.means),
        near_duplicates=near_duplicates(people),
    )
    return table.drop(columns="seed")


def rounds_table(played: Played) -> pd.DataFrame:
    """rounds.csv: a row a round and candidate. group: 1 to num_groups, 0 is the merged crowd. users: their numbers in
    the order of users.csv."""
    rows = []
    for (grouping, metric, scoring), own in played.competitions.items():
        groups = own["rewards"].shape[1] - 1
        for t, (labels, rewards) in enumerate(zip(own["labels"], own["rewards"], strict=True)):
            for place in range(groups + 1):
                if np.isnan(rewards[place]):
                    continue
                members = np.flatnonzero(labels == place) if place < groups else np.arange(len(labels))
                users = " ".join(str(i + 1) for i in members)
                number = place + 1 if place < groups else 0
                taken, improved = bool(own["taken"][t] == place), bool(own["improved"][t])
                rows.append([grouping, metric, scoring, t + 1, number, users, rewards[place], taken, improved])
    columns = [*COMBINATION, "round", "group", "users", "reward", "taken", "improved"]
    table = pd.DataFrame(rows, columns=columns)
    return _rows(played, **{name: table[name] for name in columns})


def as_bits(coalitions: np.ndarray) -> list[str]:
    return ["".join("01"[int(inside)] for inside in coalition) for coalition in coalitions]


def coalitions_table(settings: Settings, played: Played) -> pd.DataFrame:
    """coalitions.csv: variance is the value's, by the choice of sampled texts."""
    found = played.retraining
    frames = []
    for metric in settings.metric:
        values, variances = values_of(found["vectors"], played.case.crowd.centroid, metric_of(metric))
        game = static_game(played.means, played.base, played.case.crowd.centroid, metric_of(metric))
        bits = as_bits(found["coalitions"])
        frames.append(
            _rows(
                played,
                metric=metric,
                coalition=bits,
                value=values,
                static_value=game(found["coalitions"]),
                variance=variances,
            )
        )
    return pd.concat(frames, ignore_index=True)


References = dict[str, tuple[np.ndarray, np.ndarray]]
Estimates = dict[str, dict[str, np.ndarray]]


def points_table(
    played: Played, names: Sequence[str], references: References, estimates: Estimates, pay: Mapping[Combination, Pay]
) -> pd.DataFrame:
    """points.csv: pay in whole units, see payout.py, empty with --reference none; pay_error: its standard error by the
    rounds alone, without that of the audits; share: of a budget, also where there is none to pay. shapley is empty for
    who turns coat."""
    frames = []
    for (grouping, metric, scoring), own in played.competitions.items():
        values, errors = references[metric]
        own_pay = pay[grouping, metric, scoring]
        frames.append(
            _rows(
                played,
                grouping=grouping,
                metric=metric,
                scoring=scoring,
                user=names,
                points=own["points"],
                shapley=values,
                standard_error=errors,
                static_shapley=estimates[metric]["static"],
                pay=pd.Series(own_pay.units).astype("Int64"),
                pay_error=own_pay.errors,
                share=own_pay.shares,
            )
        )
    return pd.concat(frames, ignore_index=True)


def estimates_table(played: Played, names: Sequence[str], references: References, estimates: Estimates) -> pd.DataFrame:
    frames = [
        _rows(played, metric=metric, estimate=name, user=names, value=values, shapley=references[metric][0])
        for metric, own in estimates.items()
        for name, values in own.items()
    ]
    return pd.concat(frames, ignore_index=True)


def progress_table(settings: Settings, played: Played) -> pd.DataFrame:
    """progress.csv: L2 distance to the centroid of the model before the first round (0) and after each: of the mean of
    a fresh sample in the text world, of the model's vector in experiment 2's."""
    frames = []
    for combination, own in played.competitions.items():
        text = distances_to(played.case.crowd.centroid, own["judged"])
        vector = simulated(settings, played, combination).distances[0]
        named = dict(zip(COMBINATION, combination, strict=True))
        for world, distances in (("text", text), ("vector", vector)):
            frames.append(_rows(played, **named, world=world, round=range(len(distances)), distance=distances))
    return pd.concat(frames, ignore_index=True)


def finals_table(settings: Settings, played: Played) -> pd.DataFrame:
    """finals.csv: by each metric, the value of a fresh sample of each competition's last model and of what it is
    compared with (model: base, everybody, best_person, best_coalition), its mean vector's distance, and the shares of
    distinct texts and of those that somebody of the crowd holds, perhaps in other letter case, both by vectors: a model
    that recites a few good texts is near, too."""
    rows: list[list[Any]] = []
    crowd, found = played.case.crowd, played.retraining
    centroid, held = crowd.centroid, np.concatenate([*crowd.vectors, *crowd.later])

    def put(metric: str, model: str, grouping: str, scoring: str, vectors: np.ndarray) -> None:
        value = float(values_of(vectors[None], centroid, metric_of(metric))[0][0])
        distance = float(distances_to(centroid, vectors.astype(np.float64).mean(axis=0)[None])[0])
        distinct = len(np.unique(vectors.round(4), axis=0)) / len(vectors)
        copied = (cdist(vectors, held, "chebyshev") < SAME_TEXT).any(axis=1).mean()
        rows.append([metric, model, grouping, scoring, value, distance, distinct, copied])

    fresh = list(found["fresh"])
    base, everybody, rest = fresh[0], fresh[1], fresh[2:]
    per_metric = len(rest) // len(settings.metric)
    for number, metric in enumerate(settings.metric):
        put(metric, "base", "", "", base)
        put(metric, "everybody", "", "", everybody)
        best = rest[number * per_metric : (number + 1) * per_metric]
        if per_metric == 2:
            put(metric, "best_person", "", "", best[0])
            put(metric, "best_coalition", "", "", best[1])
    for (grouping, metric, scoring), own in played.competitions.items():
        put(metric, "competition", grouping, scoring, own["final"])
    columns = ["metric", "model", "grouping", "scoring", "value", "distance", "distinct", "copied"]
    table = pd.DataFrame(rows, columns=columns)
    return _rows(played, **{name: table[name] for name in columns})


def agreement_table(
    settings: Settings, played: Played, references: References, estimates: Estimates, pay: Mapping[Combination, Pay]
) -> pd.DataFrame:
    """agreement.csv: correlations with the retraining game's Shapley values (within_kinds: Pearson's among those of one
    kind), the share of a budget that goes to the wrong people by the shares of pay, or by an estimate where it is above
    0, and models tuned for points or estimate. what: "points" of a scoring, or an estimate."""
    rows: list[list[Any]] = []
    kinds = [person.kind for person in played.case.crowd.people]
    for (grouping, metric, scoring), own in played.competitions.items():
        models = int(np.isfinite(own["rewards"]).sum())
        shapley, own_pay = references[metric][0], pay[grouping, metric, scoring]
        measures = [*correlations(own["points"], shapley, kinds), misallocated(own_pay.shares, shapley), models]
        rows.append([metric, "points", grouping, scoring, *measures])
    for metric, by_name in estimates.items():
        shapley = references[metric][0]
        for name, values in by_name.items():
            measures = [*correlations(values, shapley, kinds), misallocated(values, shapley)]
            rows.append([metric, name, "", "", *measures, ESTIMATES[name][2](settings)])
    columns = ["metric", "what", "grouping", "scoring", *CORRELATIONS, "misallocation", "models"]
    table = pd.DataFrame(rows, columns=columns)
    return _rows(played, **{name: table[name] for name in columns})


CORRELATIONS = ["pearson", "spearman", "within_kinds"]


def correlations(a: np.ndarray, b: np.ndarray, kinds: Sequence[str]) -> tuple[float, float, float]:
    """CORRELATIONS of a and b (n,): Pearson's, Spearman's, Pearson's of what is above the mean of one's kind. NaN where
    one does not vary, the last also where all are of one kind."""
    of_kind = np.equal.outer(kinds, kinds).astype(float)
    within = np.nan
    if not of_kind.all():
        above = [x - of_kind @ x / of_kind.sum(axis=1) for x in (a, b)]
        rounding = [1e-12 * np.abs(x).max() for x in (a, b)]
        within = float(correlation(*(np.where(np.abs(x) > r, x, 0) for x, r in zip(above, rounding, strict=True))))
    return float(correlation(a, b)), float(correlation(rankdata(a), rankdata(b))), within


def interval_over_crowds(quantity: str, values: np.ndarray) -> tuple[float, float, float]:
    """Mean of a quantity of summary.csv over crowds (crowds,), NaN where one has none, and its 95 % interval: of
    correlations through Fisher's z, else Student's, cut off where the quantity, or a difference of two, cannot be."""
    if quantity in CORRELATIONS:
        return correlation_interval(values)
    bounds = (-np.inf, np.inf)
    if quantity.startswith(("misallocation", "distinct", "copied")):
        bounds = (-1.0 if " - " in quantity else 0.0, 1.0)
    elif quantity.startswith("pearson - "):
        bounds = (-2.0, 2.0)
    mean, low, high = np.clip(mean_interval(values), *bounds)
    return float(mean), float(low), float(high)


def summary_table(agreement: pd.DataFrame, finals: pd.DataFrame) -> pd.DataFrame:
    """summary.csv: means over the crowds that have the quantity (of each crowd over its seeds) with 95 %
    intervals (interval_over_crowds): over crowds like these, dealt for these targets.

    quantity: pearson, spearman, within_kinds, misallocation, models; pearson - static, pearson - marginal,
    misallocation - equal, misallocation - alone: less that of the game of mean text vectors, of marginal points of the
    same grouping, of equal shares, of each person alone, in the same crowd and seed, where known; distinct, copied: of
    a competition's last model, of fresh samples, and value - ..., distinct - ..., copied - ...: less another model's.
    """
    rows: list[list[Any]] = []
    names = ["metric", "what", "grouping", "scoring"]

    def put(key: Sequence[Any], quantity: str, own: pd.DataFrame, column: str) -> None:
        means = own.groupby(["target", "crowd"])[column].mean().to_numpy()
        rows.append([*key, quantity, int(np.isfinite(means).sum()), *interval_over_crowds(quantity, means)])

    def less(own: pd.DataFrame, others: pd.DataFrame, measure: str, on: list[str]) -> pd.Series:
        return own[measure] - own[on].join(others.set_index(on)[measure], on=on)[measure]

    of_case = [*CASE, "metric"]
    compared = {
        "pearson - static": less(agreement, agreement[agreement["what"] == "static"], "pearson", of_case),
        "pearson - marginal": less(
            agreement, agreement[agreement["scoring"] == "marginal"], "pearson", [*of_case, "what", "grouping"]
        ),
        "misallocation - equal": less(agreement, agreement[agreement["what"] == "equal"], "misallocation", of_case),
        "misallocation - alone": less(agreement, agreement[agreement["what"] == "alone"], "misallocation", of_case),
    }
    for key, own in agreement.assign(**compared).groupby(names, sort=False):
        known = [difference for difference in compared if own[difference].notna().any()]
        for quantity in (*CORRELATIONS, "misallocation", *known, "models"):
            put(key, quantity, own, quantity)
    competition = finals[finals["model"] == "competition"]
    compared = {
        f"{measure} - {other}": less(competition, finals[finals["model"] == other], measure, of_case)
        for other in [name for name in finals["model"].unique() if name != "competition"]
        for measure in ("value", "distinct", "copied")
    }
    key_of = ["metric", "grouping", "scoring"]
    for (metric, grouping, scoring), own in competition.assign(**compared).groupby(key_of, sort=False):
        for quantity in ("distinct", "copied", *compared):
            put([metric, "points", grouping, scoring], quantity, own, quantity)
    return pd.DataFrame(rows, columns=[*names, "quantity", "crowds", "value", "low", "high"])


# ---------------------------------------------------------------- reliability.csv


def reliability_table(settings: Settings, cases: Sequence[Played], points: pd.DataFrame) -> pd.DataFrame:
    """
    reliability.csv, a row a case, metric and source. predicted: reliability at the number `at`; observed: the mean
    correlation of two such sets of values; needed: the number that gives 0.9.

    samples: texts that a model writes, with --reference exact, at half of them. texts: those that a person holds, in
    the static game, at half of them. seeds: at 1, the correlation with the other seeds' values; predicted is what the
    judge's noise alone would leave, so where observed is below it the noise is tuning's; needed follows from observed.
    """
    rows: list[list[Any]] = []
    for played in cases:
        for metric in settings.metric:
            key = [*played.key.values(), metric]
            rows += [[*key, *row] for row in (*sample_rows(settings, played, metric), *text_rows(played, metric))]
            predicted = case_reliability(settings, played, metric)
            rows += [[*key, *row] for row in seed_rows(points, key, predicted)]
    return pd.DataFrame(rows, columns=[*CASE, "metric", "source", "at", "predicted", "observed", "needed"])


def case_reliability(settings: Settings, played: Played, metric: str) -> float:
    """Of the Shapley values by retraining with all samples; NaN where not all coalitions were retrained."""
    if settings.reference != "exact":
        return np.nan
    vectors = played.retraining["vectors"]
    return exact_reliability(*values_of(vectors, played.case.crowd.centroid, metric_of(metric)))


def sample_rows(settings: Settings, played: Played, metric: str) -> list[list[Any]]:
    full = case_reliability(settings, played, metric)
    if np.isnan(full):
        return []
    vectors, rng = played.retraining["vectors"], np.random.default_rng(played.case.streams("halves of samples"))
    at = vectors.shape[1] // 2
    predicted = spearman_brown(full, at / vectors.shape[1])
    observed = split_samples(vectors, played.case.crowd.centroid, metric_of(metric), rng)
    return [["samples", at, predicted, observed, needed(at, predicted)]]


def text_rows(played: Played, metric: str) -> list[list[Any]]:
    texts = [own.astype(np.float64) for own in played.case.crowd.vectors]
    held = min(len(own) for own in texts)
    if held < 2 or len(texts) > MOST_USERS_EXACT:
        return []

    def values_of_means(means: np.ndarray) -> np.ndarray:
        return static_shapley(means, played.base, played.case.crowd.centroid, metric_of(metric))

    rng = np.random.default_rng(played.case.streams("halves of texts"))
    predicted = spearman_brown(text_reliability(texts, values_of_means), (held // 2) / held)
    observed = split_texts(texts, values_of_means, rng)
    return [["texts", held // 2, predicted, observed, needed(held // 2, predicted)]]


def seed_rows(points: pd.DataFrame, key: Sequence[Any], predicted: float) -> list[list[Any]]:
    """key: target, crowd, seed, metric. points: points.csv."""
    target, crowd, seed, metric = key
    own = points[(points[["target", "crowd", "metric"]] == [target, crowd, metric]).all(axis=1)]
    by_seed = {each: of.drop_duplicates("user")["shapley"].to_numpy(float) for each, of in own.groupby("seed")}
    others = [values for each, values in by_seed.items() if each != seed]
    if not others or not np.isfinite(by_seed[seed]).all():
        return []
    observed = mean_known(correlation(np.array(others), by_seed[seed]))
    return [["seeds", 1, predicted, observed, needed(1, observed)]]


def answer_of(tables: Tables) -> dict[str, list[float | None]]:
    """For run.json: what was measured -> value and ends of its interval."""
    return {
        " ".join(filter(None, (row.metric, row.what, row.grouping, row.scoring, row.quantity))): [
            None if np.isnan(end) else round(float(end), 4) for end in (row.value, row.low, row.high)
        ]
        for row in tables["summary"].itertuples()
    }
