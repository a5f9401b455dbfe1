"""What report.html says of a run: the question, the answer, the captions and the tables."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiment.report import Compared, Estimate, Illustration, Page, Table, Value, estimates, words
from experiment.statistics import mean_interval
from user_grouping_evaluation_sim.settings import Settings
from user_grouping_evaluation_sim.tables import COMBINATION, regret

REGRET = "Regret: (final - hull) / (start - hull), 0 at the nearest mixture of users, 1 where nothing was gained."
# By the beginning of the figure's name: title, caption, and what there is to see.
FIGURES = {
    "correlation_against_distance": (
        "Agreement against distance",
        "Every mark is a combination: the median over the runs, with bars from quartile to quartile. Top left is best: "
        "close to the expert, and points that follow the Shapley values. The dotted line is the nearest that any "
        "mixture of users comes.",
        "Scatter plot of the correlation between points and Shapley values against the final distance to the expert, "
        "one mark a combination, a panel a scoring.",
    ),
    "agreement_against_regret": (
        "Agreement against regret",
        f"Means with 95 % intervals; filled marks are the last scoring. {REGRET}",
        "Scatter plot of the mean correlation between points and Shapley values against the mean normalised regret, "
        "one mark a combination.",
    ),
    "distance_by_grouping": (
        "Distance by round, groupings compared",
        "Mean distance of the model to the expert after every round, with 95 % bands; a line a grouping, a column a "
        "metric. Star: start. Dotted: the nearest mixture of users.",
        "Line plots of the distance to the expert over the rounds, a line for each grouping, a panel for each metric "
        "and scoring.",
    ),
    "distance_by_metric": (
        "Distance by round, metrics compared",
        "The same rounds; a line a metric, a column a grouping.",
        "Line plots of the distance to the expert over the rounds, a line for each metric, a panel for each grouping "
        "and scoring.",
    ),
    "points_against_shapley": (
        "Points against Shapley values, {} points",
        "All users of all runs, both quantities in standard deviations within the run; darker cells hold more users. "
        "On the dotted diagonal points and Shapley values agree. Mean r with its 95 % interval above each panel.",
        "Density plots of users' points against their Shapley values, a panel for each grouping and metric, with the "
        "mean correlation.",
    ),
    "estimator_noise": (
        "What a noisy estimate of Shapley values hides",
        "The same points of the same runs, validated by our certified estimate and by shap.KernelExplainer as the "
        "study did. The gap is the estimator's noise, not the points' fault.",
        "Mean correlations of points with two estimates of the Shapley values, side by side for each combination.",
    ),
    "subset_influence": (
        "What pulls the model",
        "Four rounds of the first run of one combination, in the first two principal components of the crowd: the "
        "users whose group was chosen, their weighted centroid, the model's path so far and the expert.",
        "Four scatter plots of users in the plane of two principal components, with the chosen users, their centroid, "
        "the model's path and the expert.",
    ),
    "sweep_final_distance": (
        "Sweep: distance by crowd size, {} points",
        "Mean final distance with 95 % intervals against the number of users; a row a number of groups, a column a "
        "metric. Dotted: the nearest mixture of users.",
        "Line plots of the mean final distance against the number of users, a panel for each metric and number of "
        "groups.",
    ),
    "sweep_pearson": (
        "Sweep: agreement by crowd size, {} points",
        "Mean correlation of points and Shapley values with 95 % intervals against the number of users.",
        "Line plots of the mean correlation against the number of users, a panel for each metric and number of groups.",
    ),
    "sweep_best": (
        "Sweep: which combination is best how often",
        "The share of settings in which a combination has the least mean distance, or the highest mean correlation; "
        "95 % intervals of a bootstrap over the runs, paired.",
        "Bar charts of the share of settings in which each combination is best, for each scoring and measure.",
    ),
}
FILES = {
    "summary": "means with 95 % intervals, a row a combination",
    "paired": "differences between combinations, paired by run",
    "runs": "a row a combination and run",
    "rounds": "the distance after every round",
    "points": "every user's points and Shapley value",
    "estimators": "the points' correlation with either estimate of the Shapley values",
    "sweep": "the summary for every number of users and groups",
    "best": "how often each combination is best over the sweep",
}


def report_page(
    settings: Settings, frames: dict[str, pd.DataFrame], drawn: Sequence[str], data_shape: tuple[int, int]
) -> Page:
    """frames: the run's tables by name. drawn: its figures' names. data_shape: (users, dimensions) of the data."""
    runs = frames["runs"].assign(regret=regret(frames["runs"]))
    combinations = runs.groupby(COMBINATION, sort=False).ngroups
    own = [name for name in ("summary", "paired", "best") if name in frames]
    makers = {"summary": summary_table, "paired": paired_table, "best": best_table}
    tables = [makers[name](frames[name]) for name in own if len(frames[name])]
    if "estimators" in frames:
        tables.append(estimators_table(frames["estimators"]))
    return Page(
        experiment="user_grouping_evaluation_sim",
        title="Grouping users, judging candidates, paying points",
        question="Which way of grouping users and of judging variants converges best, and do the points agree with "
        "Shapley values?",
        answer=answer(runs),
        setting=[
            f"A crowd of {settings.num_users} users in {settings.num_groups} groups pulls a model towards an expert, "
            f"one user drawn at random and left out of the crowd. Each of {settings.num_rounds} rounds moves it a "
            f"share of {settings.delta:g} towards the weighted centroid of the group whose candidate is valued most "
            f"(with probability {settings.error_probability:g} of another one). Users are drawn from "
            f"{data_shape[0]} users x {data_shape[1]} dimensions.",
            f"{settings.num_runs} runs for each of {combinations} combinations of grouping, metric and scoring; all "
            "combinations of a run share expert, crowd and starting model, so they are compared in pairs.",
        ],
        figures=[_figure(name) for name in sorted(drawn, key=_place)],
        tables=tables,
        files=[(f"{name}.csv", what) for name, what in FILES.items() if name in frames],
        compared=Compared("runs", COMBINATION, ["run"], {"final_distance": -1, "pearson": 1, "spearman": 1}),
    )


def answer(runs: pd.DataFrame) -> list[str]:
    """The closest combination and its lead, the best agreement, and what another scoring changes."""
    distances = _by_run(runs, "final_distance")
    ranked = distances.mean().sort_values(kind="stable").index
    best = distances[ranked[0]]
    closest = (
        f"Closest to the expert came {_name(ranked[0])}: distance {words(_mean(best))}, from "
        f"{runs['start_distance'].mean():.2f}; the nearest mixture of users lies at {runs['hull_distance'].mean():.2f}."
    )
    lead = []
    if len(ranked) > 1:
        gap = words(_mean(distances[ranked[1]] - best), 3)
        lead = [
            f"The runner-up, {_name(ranked[1])}, is {gap} farther, run by run; the best of {len(ranked)} was "
            "picked on the same runs, which flatters it."
        ]
    if runs["pearson"].isna().all():
        return [closest, *lead]
    agreement = _by_run(runs, "pearson")
    top = agreement.mean().idxmax()
    agrees = f"Points agree best with Shapley values under {_name(top)}: r = {words(_mean(agreement[top]))}."
    changes = []
    reference, *others = runs["scoring"].unique()
    for other in others:
        moved = {
            measure: (table.xs(other, axis=1, level="scoring") - table.xs(reference, axis=1, level="scoring")).mean(
                axis=1
            )
            for measure, table in (("pearson", agreement), ("regret", _by_run(runs, "regret")))
        }
        changes.append(
            f"Over all groupings and metrics, {other} instead of {reference} points change r by "
            f"{words(_mean(moved['pearson']))} and the regret by {words(_mean(moved['regret']))}, run by run."
        )
    return [closest, agrees, *changes, *lead]


def summary_table(summary: pd.DataFrame) -> Table:
    shown = {
        "final distance": "final_distance",
        "regret": "regret",
        "r, points and Shapley": "pearson",
        "rank correlation": "spearman",
        "rounds to converge": "rounds_to_converge",
    }
    rows = [
        [*(row[name] for name in COMBINATION), *(estimates(row, column) for column in shown.values())]
        for row in summary.to_dict("records")
    ]
    caption = f"Means over {summary['runs'].iloc[0]} runs with 95 % intervals. {REGRET}"
    return Table("Combinations", caption, [*COMBINATION, *shown], rows, "summary.csv")


def paired_table(paired: pd.DataFrame) -> Table:
    """A row a comparison, its measures side by side."""
    measures = {"final_distance": "final distance", "regret": "regret", "pearson": "r, points and Shapley"}
    key = ["compared", "alternative", "reference", *COMBINATION]
    rows: list[list[Value]] = []
    for names, group in paired.fillna(dict.fromkeys(COMBINATION, "")).groupby(key, sort=False):
        by_measure = group.set_index("measure")
        fixed = ", ".join(name for name in names[3:] if name)
        rows.append(
            [
                f"{names[1]} − {names[2]}",
                fixed,
                *(estimates(by_measure.loc[measure].to_dict(), "difference", "low", "high") for measure in measures),
            ]
        )
    caption = (
        "Differences run by run, with 95 % intervals: an interval that leaves out 0 is a difference that the runs show."
        " Negative distance and regret, positive r: the first of the two is better."
    )
    return Table("Compared in pairs", caption, ["difference", "with", *measures.values()], rows, "paired.csv")


def best_table(best: pd.DataFrame) -> Table:
    titles = {"final_distance": "least distance", "pearson": "highest r"}
    rows = [
        [
            row["grouping"],
            row["metric"],
            row["scoring"],
            titles.get(row["measure"], row["measure"]),
            estimates({**row, "best_share_low": row["low"], "best_share_high": row["high"]}, "best_share"),
        ]
        for row in best.to_dict("records")
    ]
    caption = "The share of the sweep's settings in which a combination is best, with 95 % intervals."
    return Table("Best over the sweep", caption, [*COMBINATION, "best by", "share of settings"], rows, "best.csv")


def estimators_table(estimators: pd.DataFrame) -> Table:
    shown = {
        "r, our estimate": "pearson",
        "r, KernelExplainer": "pearson_kernel",
        "r, one estimate against the other": "kernel_against_shapley",
    }
    rows = [
        [*names, *(_mean(group[column]) for column in shown.values())]
        for names, group in estimators.groupby(COMBINATION, sort=False)
    ]
    caption = f"Means over {estimators['run'].nunique()} runs that both estimators validated, with 95 % intervals."
    return Table("Two estimates of the Shapley values", caption, [*COMBINATION, *shown], rows, "estimators.csv")


def _by_run(runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """(runs, combinations), in the table's order."""
    table = runs.pivot(index="run", columns=COMBINATION, values=measure)
    return table[list(runs[COMBINATION].drop_duplicates().itertuples(index=False, name=None))]


def _mean(values: pd.Series) -> Estimate:
    return Estimate(*(float(end) for end in mean_interval(values.to_numpy(np.float64))))


def _name(combination: tuple[str, str, str]) -> str:
    grouping, metric, scoring = combination
    return f"{grouping} grouping judged by {metric} with {scoring} points"


def _place(name: str) -> int:
    return next((i for i, start in enumerate(FIGURES) if name.startswith(start)), len(FIGURES))


def _figure(name: str) -> Illustration:
    start = next((start for start in FIGURES if name.startswith(start)), None)
    if start is None:
        return Illustration(name, name, "", f"Figure {name}")
    title, caption, alt = FIGURES[start]
    variant = name.removeprefix(start).strip("_")
    return Illustration(name, title.format(variant), caption, f"{alt} ({variant} points)" if variant else alt)
