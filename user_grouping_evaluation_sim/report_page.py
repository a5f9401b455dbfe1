"""What report.html says of a run: the question, the answer, the captions and the tables."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd

from experiment.report import Compared, Estimate, Illustration, Page, Table, Value, estimate_of, words
from experiment.statistics import mean_interval
from experiment.tables import file_name
from user_grouping_evaluation_sim.settings import Settings
from user_grouping_evaluation_sim.tables import COMBINATION, regret

WHOSE = {
    "ranked": "the study's own: its published numbers were made with them",
    "marginal": "differences of value, of the study's earlier code",
    "attributed": "ours, by regression; they also steer",
}
GAMES = {
    "static": "Shapley values are those of the static game, v(S) = metric(mean of S, expert).",
    "protocol": "Shapley values are those of the protocol game of each combination: v(S) is what a competition among "
    "the users in S alone reaches, by the same rules and from the same start.",
}
PUBLISHED = (
    "The study validated by shap.KernelExplainer at 10,000 samples, a noisy estimate, and ran on MovieLens "
    "ml-latest-small of 2018."
)
BEST_BY = {"final_distance": "least distance", "pearson": "highest r"}
REGRET = "Regret: (final - hull) / (start - hull), 0 at the nearest mixture of users, 1 where nothing was gained."
# In the order of the page, by the beginning of the figure's name: title, caption, and what there is to see.
FIGURES = {
    "correlation_against_distance": (
        "Agreement against distance",
        "Every mark is a combination: the median over the runs, with bars from quartile to quartile; a column a metric,"
        " each with its own range of distances. Top left is best: close to the expert, and points that follow the "
        "Shapley values of the {game} game. The dotted line is the nearest that any mixture of users comes.",
        "Scatter plots of the correlation between points and Shapley values against the final distance to the expert, "
        "one mark a combination, a panel a metric.",
    ),
    "agreement_against_regret": (
        "Agreement against regret",
        f"The same, as means with 95 % intervals. {REGRET}",
        "Scatter plots of the mean correlation between points and Shapley values against the mean normalised regret, "
        "one mark a combination, a panel a metric.",
    ),
    "distance_by_grouping": (
        "Distance by round, groupings compared, {} points",
        "Above, the mean distance of the model to the expert after every round, a line a grouping, a column a metric. "
        "The grey band tells how much crowds differ, which all groupings share; below, the differences to the first "
        "grouping, run by run, with 95 % intervals. Star: start. Dotted: the nearest mixture of users.",
        "Line plots of the distance to the expert over the rounds, a line for each grouping, a panel for each metric, "
        "and of the differences to the first grouping.",
    ),
    "distance_by_metric": (
        "Distance by round, metrics compared, {} points",
        "The same rounds; a line a metric, a column a grouping, differences to the first metric.",
        "Line plots of the distance to the expert over the rounds, a line for each metric, a panel for each grouping, "
        "and of the differences to the first metric.",
    ),
    "points_against_shapley": (
        "Points against Shapley values, {} points",
        "All users of all runs, both quantities in standard deviations within the run; darker cells hold more users, "
        "on one scale for all panels. Users beyond 4 standard deviations lie on the edge. On the dotted diagonal points"
        " and Shapley values of the {game} game agree. Mean r with its 95 % interval above each panel.",
        "Density plots of users' points against their Shapley values, a panel for each grouping and metric, with the "
        "mean correlation.",
    ),
    "audit": (
        "Users who do not play along",
        "Left, a strategist's pay over that of the same user when honest, with 95 % intervals, a mark a scoring; the "
        "open diamond is the same of Shapley values, for strategies that stay the same over the rounds. Right, the "
        "crowd's regret with the strategist in it; dotted: without.",
        "For each strategy the ratio of pay to the honest twin's pay, a mark for each scoring, with intervals, and the "
        "crowd's regret.",
    ),
    "estimator_noise": (
        "What a noisy estimate of Shapley values hides",
        "The same points of the same runs, validated by our certified estimate (filled) and by shap.KernelExplainer as "
        "the study did (open); a line a run, beside it the mean difference with its 95 % interval. The gap is the "
        "estimator's noise, not the points' fault.",
        "For each combination the correlations of points with two estimates of the Shapley values, a line a run, and "
        "the mean difference.",
    ),
    "subset_influence": (
        "What pulls the model",
        "Four rounds of the first run of one combination, in the first two principal components of the crowd: the "
        "users whose group was chosen, their weighted centroid, the model's path so far and the expert. Below, the "
        "square around model, centroid and expert, enlarged.",
        "Scatter plots of users in the plane of two principal components, with the chosen users, their centroid, "
        "the model's path and the expert, a column a round, and an enlarged part of each.",
    ),
    "replication": (
        "Beside the study's sweep",
        f"How often, over the sweep's settings, a combination is best with the study's points; 95 % intervals of a "
        f"bootstrap over the runs, paired. {PUBLISHED}",
        "The share of settings in which each combination is best, with intervals, and the two shares that the study "
        "published.",
    ),
    "sweep_best": (
        "Sweep: which combination is best how often",
        "The share of settings in which a combination has the least mean distance, or the highest mean correlation, "
        "among those of the same scoring; 95 % intervals of a bootstrap over the runs, paired.",
        "The share of settings in which each combination is best, with intervals, for each scoring and measure.",
    ),
    "sweep_final_distance": (
        "Sweep: distance by crowd size, {} points",
        "Above, the first grouping's mean final distance against the number of users, a line a number of groups, a "
        "column a metric; below, the other groupings' differences to it, run by run: below 0 is nearer. 95 % intervals."
        " Dotted: the nearest mixture of users.",
        "Line plots of the mean final distance of the first grouping against the number of users, and of the other "
        "groupings' differences to it, a panel for each metric and grouping.",
    ),
    "sweep_pearson": (
        "Sweep: agreement by crowd size, {} points",
        "The same for the mean correlation of points and Shapley values of the {game} game: above 0 agrees better.",
        "Line plots of the mean correlation of the first grouping against the number of users, and of the other "
        "groupings' differences to it, a panel for each metric and grouping.",
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
    "sweep_paired": "the differences, paired by run, for every number of users and groups",
    "audit": "strategies of users who do not play along: their pay beside that of honest twins",
    "ablation": "every pay with every steering, among honest users",
    "best": "how often each combination is best over the sweep",
    "replication": "the same of the study's points, beside the shares that it published",
}


def report_page(
    settings: Settings, frames: dict[str, pd.DataFrame], drawn: Sequence[str], data_shape: tuple[int, int]
) -> Page:
    """frames: the run's tables by name. drawn: its figures' names. data_shape: (users, dimensions) of the data."""
    runs = frames["runs"].assign(regret=regret(frames["runs"]))
    combinations = runs.groupby(COMBINATION, sort=False).ngroups
    makers: dict[str, Callable[[pd.DataFrame], Table]] = {
        "replication": replication_table,
        "summary": partial(summary_table, game=settings.reference),
        "paired": paired_table,
        "audit": audit_table,
        "ablation": ablation_table,
        "best": best_table,
        "estimators": estimators_table,
    }
    tables = [maker(frames[name]) for name, maker in makers.items() if name in frames and len(frames[name])]
    return Page(
        experiment="user_grouping_evaluation_sim",
        title="Grouping users, judging candidates, paying points",
        question="Which way of grouping users and of judging variants converges best, and do the points agree with "
        "Shapley values?",
        answer=answer(runs, settings.reference),
        setting=[
            f"A crowd of {settings.num_users} users in {settings.num_groups} groups pulls a model towards an expert, "
            f"one user drawn at random and left out of the crowd. Each of {settings.num_rounds} rounds moves it a "
            f"share of {settings.delta:g} towards the weighted centroid of the group whose candidate is valued most "
            f"(with probability {settings.error_probability:g} of another one). Users are drawn from "
            f"{data_shape[0]} users x {data_shape[1]} dimensions.",
            f"{settings.num_runs} runs for each of {combinations} combinations of grouping, metric and scoring; all "
            "combinations of a run share expert, crowd and starting model, so they are compared in pairs.",
            *whose(settings.scoring),
            *([] if settings.shapley == "none" else [GAMES[settings.reference]]),
        ],
        figures=[_figure(name, settings.reference) for name in sorted(drawn, key=_place)],
        tables=tables,
        files=[(file_name(frames[name], name), what) for name, what in FILES.items() if name in frames],
        compared=Compared("runs", COMBINATION, ["run"], {"final_distance": -1, "pearson": 1, "spearman": 1}),
    )


def whose(scorings: Sequence[str]) -> list[str]:
    """A sentence on whose points these are, where that is known."""
    known = [f"{name} ({WHOSE[name]})" for name in scorings if name in WHOSE]
    return [f"Points: {'; '.join(known)}."] if known else []


def answer(runs: pd.DataFrame, game: str = "static") -> list[str]:
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
    agrees = (
        f"Points agree best with Shapley values of the {game} game under {_name(top)}: "
        f"r = {words(_mean(agreement[top]))}"
        + (f", the best of {len(agreement.columns)}, picked on the same runs." if len(agreement.columns) > 1 else ".")
    )
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


def summary_table(summary: pd.DataFrame, game: str) -> Table:
    shown = {
        "final distance": "final_distance",
        "regret": "regret",
        "r, points and Shapley": "pearson",
        "rank correlation": "spearman",
        "rounds to converge": "rounds_to_converge",
    }
    rows = [
        [
            *(row[name] for name in COMBINATION),
            *(estimate_of(row, c, f"{c}_low", f"{c}_high") for c in shown.values()),
        ]
        for row in summary.to_dict("records")
    ]
    points = " ".join(whose(summary["scoring"].unique()))
    caption = f"Means over {summary['runs'].iloc[0]} runs with 95 % intervals. {REGRET} r: {game} game. {points}"
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
                *(estimate_of(by_measure.loc[measure].to_dict(), "difference", "low", "high") for measure in measures),
            ]
        )
    caption = (
        "Differences run by run, with 95 % intervals: an interval that leaves out 0 is a difference that the runs show."
        " Negative distance and regret, positive r: the first of the two is better."
    )
    return Table("Compared in pairs", caption, ["difference", "with", *measures.values()], rows, "paired.csv")


def ablation_table(ablation: pd.DataFrame) -> Table:
    shown = {"r, points and Shapley": "pearson", "regret": "regret", "misallocated": "misallocation"}
    rows: list[list[Value]] = [
        [
            row["pay"],
            row["steering"],
            *(estimate_of(row, c, f"{c}_low", f"{c}_high") for c in shown.values()),
        ]
        for row in ablation.to_dict("records")
    ]
    first = ablation.iloc[0]
    caption = (
        "What users are paid by, and what weighs them in the next round, in all pairs: squared points in groups, or a "
        f"merged candidate (see scoring.py). {first['grouping']} grouping, {first['metric']}, {first['runs']} runs of "
        f"honest users, static game; 95 % intervals. {REGRET} Misallocated: the share of the budget that goes to "
        "others than Shapley values say."
    )
    return Table("Pay and steering apart", caption, ["pay", "steering", *shown], rows, "ablation.csv")


def audit_table(audit: pd.DataFrame) -> Table:
    rows = [
        [
            row["strategy"],
            row["users"],
            *(row[name] for name in COMBINATION),
            estimate_of(row, "pay_vs_twin", "low", "high"),
            row["shapley_vs_twin"],
            row["regret"],
            row["pearson"],
        ]
        for row in audit.to_dict("records")
    ]
    caption = (
        "Each strategy played by the users named, chosen by Shapley value. Pay and Shapley value: over those of the "
        "same users when honest, with 95 % intervals; no Shapley value where a strategy changes over the rounds. "
        "Regret: the crowd's. r: of the other users' points with their Shapley values."
    )
    measures = ["pay, twin's = 1", "Shapley value, twin's = 1", "regret", "r, others"]
    return Table(
        "Users who do not play along", caption, ["strategy", "users", *COMBINATION, *measures], rows, "audit.csv"
    )


def replication_table(replication: pd.DataFrame) -> Table:
    """The combinations that are best somewhere, here or as published."""
    shown = replication[(replication["best_share"] > 0) | replication["published_share"].notna()]
    rows = [
        [
            BEST_BY[row["measure"]],
            row["grouping"],
            row["metric"],
            row["published_share"],
            estimate_of(row, "best_share", "low", "high"),
        ]
        for row in shown.to_dict("records")
    ]
    scoring = replication["scoring"].iloc[0]
    caption = (
        f"The share of settings in which a combination is best with {scoring} points: as the study published it where "
        f"that is known, and here over this sweep's settings, with 95 % intervals. {PUBLISHED}"
    )
    columns = ["best by", "grouping", "metric", "study", "here"]
    return Table("Beside the study's sweep", caption, columns, rows, "replication.csv")


def best_table(best: pd.DataFrame) -> Table:
    rows = [
        [
            *(row[name] for name in COMBINATION),
            BEST_BY[row["measure"]],
            estimate_of(row, "best_share", "low", "high"),
        ]
        for row in best.to_dict("records")
    ]
    caption = (
        "The share of the sweep's settings in which a combination is best of those with its scoring, with 95 % "
        f"intervals. {' '.join(whose(best['scoring'].unique()))}"
    )
    return Table("Best over the sweep", caption, [*COMBINATION, "best by", "share of settings"], rows, "best.csv")


def estimators_table(estimators: pd.DataFrame) -> Table:
    shown = {
        "r, our estimate": "pearson",
        "r, KernelExplainer": "pearson_kernel",
        "difference, run by run": "gap",
        "r, one estimate against the other": "kernel_against_shapley",
    }
    estimators = estimators.assign(gap=estimators["pearson"] - estimators["pearson_kernel"])
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


def _figure(name: str, game: str) -> Illustration:
    start = next((start for start in FIGURES if name.startswith(start)), None)
    if start is None:
        return Illustration(name, name, "", f"Figure {name}")
    title, caption, alt = FIGURES[start]
    variant = name.removeprefix(start).strip("_")
    return Illustration(
        name, title.format(variant), caption.format(game=game), f"{alt} ({variant} points)" if variant else alt
    )
