"""The figures of a run: each is one function of the tables, in the order of the file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiment.figures import COLOURS, LINES, MARKERS, legend_below, new_figure, save_figure
from experiment.statistics import mean_interval
from user_grouping_evaluation_sim.competition import NONE
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.tables import COMBINATION, Combination, regret

DISTANCE = "distance to the expert (L2, rating points)"
CORRELATION = "Pearson r, points and Shapley values"


@dataclass(frozen=True)
class Drawing:
    """A figure that is still to be drawn: name.png and name.pdf in `folder`, by function(*arguments)."""

    folder: Path
    name: str
    function: Callable[..., Figure]
    arguments: tuple[Any, ...]


def draw(drawing: Drawing) -> None:
    save_figure(drawing.function(*drawing.arguments), drawing.folder, drawing.name)


def figures_of(
    folder: Path, frames: dict[str, pd.DataFrame], combinations: Sequence[Combination], crowd: Crowd
) -> list[Drawing]:
    """What the tables of a run allow to draw. crowd: of the first run."""
    runs = frames["runs"]
    validated = bool(runs["pearson"].notna().any())
    drawings = [
        Drawing(folder, "distance_by_grouping", distance_over_rounds, (frames["rounds"], runs, "grouping", "metric")),
        Drawing(folder, "distance_by_metric", distance_over_rounds, (frames["rounds"], runs, "metric", "grouping")),
        Drawing(folder, "subset_influence", subset_influence, (list(combinations), crowd)),
    ]
    if validated:
        drawings += [
            Drawing(folder, f"points_against_shapley_{scoring.replace(':', '.')}", points_against_shapley, (part, runs))
            for scoring, part in frames["points"].groupby("scoring", sort=False)
        ]
        drawings += [
            Drawing(folder, "correlation_against_distance", correlation_against_distance, (runs,)),
            Drawing(folder, "agreement_against_regret", agreement_against_regret, (runs,)),
        ]
    if "estimators" in frames and validated:
        drawings.append(Drawing(folder, "estimator_noise", estimator_noise, (frames["estimators"],)))
    if "sweep" in frames:
        measures = [("final_distance", DISTANCE), *([("pearson", CORRELATION)] if validated else [])]
        drawings += [
            Drawing(folder, f"sweep_{measure}_{scoring.replace(':', '.')}", sweep_facets, (part, measure, label))
            for scoring, part in frames["sweep"].groupby("scoring", sort=False)
            for measure, label in measures
        ]
        drawings.append(Drawing(folder, "sweep_best", best_shares, (frames["best"],)))
    return drawings


def distance_over_rounds(rounds: pd.DataFrame, runs: pd.DataFrame, line: str, panel: str) -> Figure:
    """Mean distance by round with 95 % bands; a line each `line`, a column each `panel`, a row each scoring."""
    lines, panels, scorings = (list(rounds[name].unique()) for name in (line, panel, "scoring"))
    figure, axes = new_figure(
        len(scorings),
        len(panels),
        width=1 + 2.4 * len(panels),
        height=0.8 + 2.1 * len(scorings),
        sharex=True,
        sharey=True,
    )
    floor, start = runs["hull_distance"].mean(), runs["start_distance"].mean()
    for row, scoring in enumerate(scorings):
        for column, title in enumerate(panels):
            ax = axes[row, column]
            for i, name in enumerate(lines):
                chosen = rounds[(rounds["scoring"] == scoring) & (rounds[panel] == title) & (rounds[line] == name)]
                table = chosen.pivot(index="round", columns="run", values="distance")
                mean, low, high = mean_interval(table.to_numpy())
                style = {"color": COLOURS[i % 7], "linestyle": LINES[i % 4]}
                ax.plot(table.index, mean, label=name, marker=MARKERS[i % 7], markevery=(5 * i, 25), ms=4, **style)
                ax.fill_between(table.index, low, high, color=style["color"], alpha=0.18, linewidth=0)
            ax.axhline(
                floor, color="black", linewidth=1, linestyle=(0, (1, 1)), label="nearest mixture of users (hull)"
            )
            ax.plot([0], [start], "k*", ms=8, label="start", clip_on=False, linestyle="none")
            ax.set_title(f"{title}, {scoring} points")
            ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("round")
    for ax in axes[:, 0]:
        ax.set_ylabel(DISTANCE.replace(" (", "\n("))
    figure.suptitle(f"Mean of {runs['run'].nunique()} runs with 95 % interval", fontsize=9)
    legend_below(figure, axes[0, 0], 5)
    return figure


def points_against_shapley(points: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Every user of every run, both quantities standardised within the run; the mean r with its 95 % interval."""
    groupings, metrics = list(points["grouping"].unique()), list(points["metric"].unique())
    scoring = points["scoring"].iloc[0]
    figure, axes = new_figure(
        len(groupings),
        len(metrics),
        width=1 + 2.1 * len(metrics),
        height=0.6 + 2.0 * len(groupings),
        sharex=True,
        sharey=True,
    )
    density = None
    for row, grouping in enumerate(groupings):
        for column, metric in enumerate(metrics):
            ax = axes[row, column]
            chosen = points[(points["grouping"] == grouping) & (points["metric"] == metric)]
            by_run = chosen.groupby("run")[["shapley", "points"]]
            z = (chosen[["shapley", "points"]] - by_run.transform("mean")) / by_run.transform("std")
            z = z.replace([np.inf, -np.inf], np.nan).dropna()
            density = ax.hexbin(
                z["shapley"],
                z["points"],
                gridsize=28,
                extent=(-4, 4, -4, 4),
                bins="log",
                mincnt=1,
                cmap="cividis_r",
                linewidths=0.1,
            )
            ax.plot([-4, 4], [-4, 4], color="black", linewidth=0.8, linestyle=":")
            same = (runs["grouping"] == grouping) & (runs["metric"] == metric) & (runs["scoring"] == scoring)
            mean, low, high = mean_interval(runs.loc[same, "pearson"].to_numpy())
            ax.set_title(f"{grouping}, {metric}\nr = {mean:.2f} [{low:.2f}, {high:.2f}]")
            ax.set_aspect("equal")
    figure.supxlabel("Shapley value (standard deviations of its run)", fontsize=9)
    figure.supylabel(f"{scoring} points (standard deviations of their run)", fontsize=9)
    if density is not None:
        figure.colorbar(density, ax=axes, label="users (log scale)", shrink=0.6)
    return figure


def correlation_against_distance(runs: pd.DataFrame) -> Figure:
    """The study's main figure: a mark a combination at the medians over the runs, bars from quartile to quartile."""
    scorings = list(runs["scoring"].unique())
    figure, axes = new_figure(1, len(scorings), width=1 + 3.2 * len(scorings), height=3.9, sharex=True, sharey=True)
    for ax, scoring in zip(axes[0], scorings, strict=True):
        for label, style, group in _marks(runs[runs["scoring"] == scoring]):
            x = group["final_distance"].quantile([0.25, 0.5, 0.75]).to_numpy()
            y = group["pearson"].quantile([0.25, 0.5, 0.75]).to_numpy()
            ax.errorbar(
                x[1],
                y[1],
                xerr=[[x[1] - x[0]], [x[2] - x[1]]],
                yerr=[[y[1] - y[0]], [y[2] - y[1]]],
                label=label,
                elinewidth=0.8,
                ms=6,
                **style,
            )
        floor = runs["hull_distance"].median()
        ax.axvline(floor, color="black", linewidth=1, linestyle=(0, (1, 1)), label="median hull distance")
        ax.set_title(f"{scoring} points")
        ax.set_xlabel(f"final {DISTANCE}")
    axes[0, 0].set_ylabel(f"{CORRELATION}\n(median, quartiles over {runs['run'].nunique()} runs)")
    legend_below(figure, axes[0, 0], 4)
    return figure


def agreement_against_regret(runs: pd.DataFrame) -> Figure:
    """Mean agreement against mean normalised regret, 95 % intervals; filled marks for the last scoring."""
    runs = runs.assign(regret=regret(runs))
    figure, axes = new_figure(1, 1, width=6.4, height=4.4)
    ax = axes[0, 0]
    scorings = list(runs["scoring"].unique())
    for scoring in scorings:
        for label, style, group in _marks(runs[runs["scoring"] == scoring]):
            x, y = mean_interval(group["regret"].to_numpy()), mean_interval(group["pearson"].to_numpy())
            fill = {} if scoring == scorings[-1] else {"mfc": "white"}
            ax.errorbar(
                x[0],
                y[0],
                xerr=[[x[0] - x[1]], [x[2] - x[0]]],
                yerr=[[y[0] - y[1]], [y[2] - y[0]]],
                label=f"{label}, {scoring}",
                elinewidth=0.8,
                ms=6,
                **style,
                **fill,
            )
    ax.set_xlabel("normalised regret: (final - hull) / (start - hull), mean with 95 % interval")
    ax.set_ylabel(f"{CORRELATION}\n(mean with 95 % interval)")
    ax.set_xlim(left=0)
    legend_below(figure, ax, 3)
    return figure


def estimator_noise(estimators: pd.DataFrame) -> Figure:
    """The same points of the same runs, correlated with either estimate of the Shapley values."""
    scorings = list(estimators["scoring"].unique())
    figure, axes = new_figure(1, len(scorings), width=1 + 3.2 * len(scorings), height=3.6, sharey=True)
    for ax, scoring in zip(axes[0], scorings, strict=True):
        groups = list(estimators[estimators["scoring"] == scoring].groupby(["grouping", "metric"], sort=False))
        for offset, column, colour, marker, label in (
            (-0.15, "pearson", COLOURS[0], "o", "our estimate, certified"),
            (0.15, "pearson_kernel", COLOURS[1], "s", "shap.KernelExplainer, 10,000 samples"),
        ):
            mean, low, high = mean_interval(np.stack([group[column].to_numpy() for _, group in groups]))
            ax.errorbar(
                np.arange(len(groups)) + offset,
                mean,
                yerr=[mean - low, high - mean],
                fmt=marker,
                color=colour,
                ms=5,
                elinewidth=1,
                label=label,
            )
        ax.set_xticks(
            np.arange(len(groups)),
            [f"{grouping}, {metric}" for (grouping, metric), _ in groups],
            rotation=45,
            ha="right",
        )
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_title(f"{scoring} points")
    axes[0, 0].set_ylabel(f"{CORRELATION}\n(mean of {estimators['run'].nunique()} runs, 95 % interval)")
    legend_below(figure, axes[0, 0], 2)
    return figure


def subset_influence(combinations: Sequence[Combination], crowd: Crowd) -> Figure:
    """Four rounds of the first run of one combination, in the first two principal components of the crowd."""
    l2 = [combination for combination in combinations if combination.names[1] == "l2"] or combinations
    combination = l2[-1]
    trace, users, expert = combination.trace, crowd.users[0], crowd.experts[0]
    centre = users.mean(axis=0)
    _, spread, components = np.linalg.svd(users - centre, full_matrices=False)
    explained = spread**2 / (spread**2).sum()
    plane = components[:2].T
    flat_users, flat_expert = (users - centre) @ plane, (expert - centre) @ plane
    path = (trace.models - centre) @ plane
    moved = np.flatnonzero(trace.taken != NONE)
    shown = moved[np.linspace(0, len(moved) - 1, min(4, len(moved))).astype(int)] if len(moved) else np.zeros(0, int)
    figure, axes = new_figure(2, 2, width=7, height=6.2, sharex=True, sharey=True)
    for ax, t in zip(axes.flat, shown, strict=False):
        merged = trace.taken[t] > trace.labels.max()
        weights = (
            trace.merged_weights[t] if merged else np.where(trace.labels[t] == trace.taken[t], trace.weights[t], 0)
        )
        chosen = weights > 1e-3 * weights.max()
        pull = weights @ flat_users
        ax.scatter(*flat_users[~chosen].T, s=10, color="0.75", label="user")
        sizes = 12 + 90 * weights[chosen] / weights.max()
        ax.scatter(
            *flat_users[chosen].T,
            s=sizes,
            color=COLOURS[4],
            edgecolor="black",
            linewidth=0.4,
            label="user of the chosen subset (area: weight)",
        )
        ax.plot(*path[: t + 1].T, color=COLOURS[0], linewidth=1.2, label="model until this round")
        ax.plot(*path[t], "o", color=COLOURS[0], ms=6)
        ax.plot(*pull, "P", color=COLOURS[1], ms=8, mec="black", mew=0.5, linestyle="none", label="weighted centroid")
        ax.annotate("", pull, path[t], arrowprops={"arrowstyle": "->", "color": COLOURS[5], "linewidth": 1.4})
        ax.plot(*flat_expert, "k*", ms=11, linestyle="none", label="expert")
        ax.set_title(f"round {t + 1}: {'merged candidate' if merged else f'group {trace.taken[t]}'}")
    for ax in axes[-1]:
        ax.set_xlabel(f"1st principal component ({explained[0]:.0%} of variance)")
    for ax in axes[:, 0]:
        ax.set_ylabel(f"2nd principal component ({explained[1]:.0%})")
    figure.suptitle(", ".join(combination.names) + " points: what pulls the model", fontsize=9)
    legend_below(figure, axes[0, 0], 3)
    return figure


def sweep_facets(sweep: pd.DataFrame, measure: str, label: str) -> Figure:
    """Mean with 95 % interval against the number of users: a column a metric, a row a number of groups."""
    metrics, groups = list(sweep["metric"].unique()), sorted(sweep["num_groups"].unique())
    figure, axes = new_figure(
        len(groups),
        len(metrics),
        width=1 + 2.3 * len(metrics),
        height=0.8 + 1.5 * len(groups),
        sharex=True,
        sharey=True,
    )
    for row, count in enumerate(groups):
        for column, metric in enumerate(metrics):
            ax = axes[row, column]
            chosen = sweep[(sweep["num_groups"] == count) & (sweep["metric"] == metric)]
            for i, (grouping, part) in enumerate(chosen.groupby("grouping", sort=False)):
                part = part.sort_values("num_users")
                y, x = part[measure].to_numpy(), part["num_users"].to_numpy() + 0.8 * (i - 1)
                bars = [y - part[f"{measure}_low"], part[f"{measure}_high"] - y]
                ax.errorbar(
                    x,
                    y,
                    yerr=bars,
                    color=COLOURS[i % 7],
                    linestyle=LINES[i % 4],
                    marker=MARKERS[i % 7],
                    ms=4,
                    elinewidth=0.8,
                    label=grouping,
                )
            if measure == "final_distance":
                hull = chosen.groupby("num_users")["hull_distance"].first()
                ax.plot(hull.index, hull, "k", linewidth=1, linestyle=(0, (1, 1)), label="hull")
            ax.set_title(f"{metric}, {count} groups")
    for ax in axes[-1]:
        ax.set_xlabel("users in the crowd")
    figure.supylabel(label, fontsize=9)
    figure.suptitle(
        f"{sweep['scoring'].iloc[0]} points: mean of {sweep['runs'].iloc[0]} runs with 95 % interval", fontsize=9
    )
    legend_below(figure, axes[0, 0], 4)
    return figure


def best_shares(best: pd.DataFrame) -> Figure:
    """How often each combination is best over the settings of the sweep."""
    scorings, measures = list(best["scoring"].unique()), list(best["measure"].unique())
    figure, axes = new_figure(
        len(scorings), len(measures), width=7.4, height=0.8 + 2.3 * len(scorings), sharex=True, sharey=True
    )
    titles = {"final_distance": "least final distance", "pearson": "highest mean r with Shapley values"}
    for row, scoring in enumerate(scorings):
        for column, measure in enumerate(measures):
            ax = axes[row, column]
            part = best[(best["scoring"] == scoring) & (best["measure"] == measure)]
            y = np.arange(len(part))
            ax.barh(y, part["best_share"], color=COLOURS[4], edgecolor="black", linewidth=0.5)
            bars = [(part["best_share"] - part["low"]).clip(lower=0), (part["high"] - part["best_share"]).clip(lower=0)]
            ax.errorbar(part["best_share"], y, xerr=bars, fmt="none", color="black", elinewidth=1)
            ax.set_yticks(y, part["grouping"] + ", " + part["metric"])
            ax.set_title(f"{titles[measure]},\n{scoring} points")
            ax.set_xlim(0, 1)
    for ax in axes[-1]:
        ax.set_xlabel("share of settings where best (95 % interval)")
    return figure


def _marks(runs: pd.DataFrame) -> "list[tuple[str, dict[str, Any], pd.DataFrame]]":
    """Label, style and runs of each grouping (marker) and metric (colour)."""
    groupings, metrics = list(runs["grouping"].unique()), list(runs["metric"].unique())
    marks = []
    for (grouping, metric, _), group in runs.groupby(COMBINATION, sort=False):
        style = {"fmt": MARKERS[groupings.index(grouping) % 7], "color": COLOURS[metrics.index(metric) % 7]}
        marks.append((f"{grouping}, {metric}", style, group))
    return marks
