"""The figures of a run: each is one function of the tables, in the order of the file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiment.figures import COLOURS, LINES, MARKERS, legend_below, new_figure, save_figure
from experiment.statistics import mean_interval
from user_grouping_evaluation_sim.competition import NONE
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.tables import Combination, regret

DISTANCE = "distance to the expert (L2, rating points)"
CORRELATION = "Pearson r, points and Shapley values"
FILLS = ("full", "left", "none", "bottom")  # of marks, so that colours are told apart in grey too
EDGE = 4  # standard deviations that points_against_shapley shows


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
    folder: Path,
    frames: dict[str, pd.DataFrame],
    combinations: Sequence[Combination],
    crowd: Crowd,
    game: str = "static",
) -> list[Drawing]:
    """What the tables of a run allow to draw. crowd: of the first run. game: whose Shapley values the tables hold."""
    drawings: list[Drawing] = []

    def add(name: str, function: Callable[..., Figure], *arguments: object) -> None:
        drawings.append(Drawing(folder, name.replace(":", "."), function, arguments))

    runs = frames["runs"]
    validated = bool(runs["pearson"].notna().any())
    for scoring, rounds in frames["rounds"].groupby("scoring", sort=False):
        add(f"distance_by_grouping_{scoring}", distance_over_rounds, rounds, runs, "grouping", "metric")
        add(f"distance_by_metric_{scoring}", distance_over_rounds, rounds, runs, "metric", "grouping")
    if np.linalg.matrix_rank(crowd.users[0] - crowd.users[0].mean(axis=0)) > 1:  # else there is no plane to draw in
        add("subset_influence", subset_influence, list(combinations), crowd)
    if validated:
        for scoring, points in frames["points"].groupby("scoring", sort=False):
            add(f"points_against_shapley_{scoring}", points_against_shapley, points, runs, game)
        add("correlation_against_distance", correlation_against_distance, runs, game)
        add("agreement_against_regret", agreement_against_regret, runs, game)
    if "audit" in frames:
        add("audit", audit_figure, frames["audit"])
    if "estimators" in frames and validated:
        add("estimator_noise", estimator_noise, frames["estimators"])
    if "sweep" in frames:
        differences = frames["sweep_paired"]
        for scoring, sweep in frames["sweep"].groupby("scoring", sort=False):
            paired = differences[(differences["compared"] == "grouping") & (differences["scoring"] == scoring)]
            for measure in ("final_distance", *(["pearson"] if validated else [])):
                add(f"sweep_{measure}_{scoring}", sweep_by_size, sweep, paired, measure)
        replication = frames.get("replication", frames["best"].iloc[:0])
        if len(replication):
            add("replication", best_shares, replication)
        if len(frames["best"]) > len(replication):
            add("sweep_best", best_shares, frames["best"])
    return drawings


def distance_over_rounds(rounds: pd.DataFrame, runs: pd.DataFrame, line: str, panel: str) -> Figure:
    """One scoring. Above, the mean distance by round, a line each `line`, a column each `panel`; below, each line's
    difference to the first one, run by run, with its 95 % interval."""
    lines, panels = list(rounds[line].unique()), list(rounds[panel].unique())
    rows = 1 + (len(lines) > 1)
    figure, axes = new_figure(
        rows,
        len(panels),
        width=1 + 2.4 * len(panels),
        height=1.4 + 2 * rows,
        sharex=True,
        sharey="row",
        height_ratios=[3, 2][:rows],
    )
    floor, start = runs["hull_distance"].mean(), runs["start_distance"].mean()
    for column, title in enumerate(panels):
        top = axes[0, column]
        tables = [
            rounds[(rounds[panel] == title) & (rounds[line] == name)].pivot(
                index="round", columns="run", values="distance"
            )
            for name in lines
        ]
        _, low, high = mean_interval(tables[0].to_numpy())
        top.fill_between(
            tables[0].index, low, high, color="0.85", linewidth=0, label=f"95 % interval over crowds, {lines[0]}"
        )
        for i, (name, table) in enumerate(zip(lines, tables, strict=True)):
            style = {"color": COLOURS[i % 7], "linestyle": LINES[i % 4], "marker": MARKERS[i % 7], "ms": 4}
            style["markevery"] = (5 * i, 25)
            top.plot(table.index, table.mean(axis=1), label=name, **style)
            if i:
                mean, low, high = mean_interval((table - tables[0]).to_numpy())
                axes[1, column].plot(table.index, mean, **style)
                axes[1, column].fill_between(table.index, low, high, color=style["color"], alpha=0.25, linewidth=0)
        top.axhline(floor, color="black", linewidth=1, linestyle=(0, (1, 1)), label="nearest mixture of users (hull)")
        top.plot([0], [start], "k*", ms=8, label="start", clip_on=False, linestyle="none")
        top.set_title(title)
        top.set_ylim(bottom=0)
        if rows > 1:
            axes[1, column].axhline(0, color=COLOURS[0], linewidth=1)
        axes[-1, column].set_xlabel("round")
    axes[0, 0].set_ylabel(_two_lines(f"mean {DISTANCE}"))
    if rows > 1:
        axes[1, 0].set_ylabel(f"minus {lines[0]},\nrun by run (95 % interval)")
    figure.suptitle(f"{rounds['scoring'].iloc[0]} points, {runs['run'].nunique()} runs", fontsize=9)
    legend_below(figure, axes[0, 0], 3)
    return figure


def points_against_shapley(points: pd.DataFrame, runs: pd.DataFrame, game: str = "static") -> Figure:
    """Every user of every run, both quantities standardised within the run; the mean r with its 95 % interval."""
    groupings, metrics = list(points["grouping"].unique()), list(points["metric"].unique())
    scoring = points["scoring"].iloc[0]
    figure, axes = new_figure(
        len(groupings),
        len(metrics),
        width=1.6 + 2.0 * len(metrics),
        height=0.6 + 2.2 * len(groupings),
        sharex=True,
        sharey=True,
    )
    cells = []
    for row, grouping in enumerate(groupings):
        for column, metric in enumerate(metrics):
            ax = axes[row, column]
            chosen = points[(points["grouping"] == grouping) & (points["metric"] == metric)]
            by_run = chosen.groupby("run")[["shapley", "points"]]
            z = (chosen[["shapley", "points"]] - by_run.transform("mean")) / by_run.transform("std")
            z = z.replace([np.inf, -np.inf], np.nan).dropna().clip(-EDGE, EDGE)
            cells.append(
                ax.hexbin(
                    z["shapley"],
                    z["points"],
                    gridsize=26,
                    extent=(-EDGE, EDGE, -EDGE, EDGE),
                    mincnt=1,
                    cmap="cividis_r",
                    linewidths=0.1,
                )
            )
            ax.plot([-EDGE, EDGE], [-EDGE, EDGE], color="black", linewidth=0.8, linestyle=":")
            same = (runs["grouping"] == grouping) & (runs["metric"] == metric) & (runs["scoring"] == scoring)
            mean, low, high = mean_interval(runs.loc[same, "pearson"].to_numpy())
            ax.set_title(f"{grouping}, {metric}\nr = {mean:.2f} [{low:.2f}, {high:.2f}]")
            ax.set_aspect("equal")
            ax.set_xticks(range(-EDGE, EDGE + 1, 2))
            ax.set_yticks(range(-EDGE, EDGE + 1, 2))
    largest = max((cell.get_array().max() for cell in cells if cell.get_array().size), default=1)
    norm = LogNorm(1, max(2, largest))  # one scale for all panels
    for cell in cells:
        cell.set_norm(norm)
    shapley = f"Shapley value ({game} game)"
    figure.supxlabel(f"{shapley}, standard deviations of its run (beyond ±{EDGE}: on the edge)", fontsize=9)
    figure.supylabel(f"{scoring} points, standard deviations of their run", fontsize=9)
    figure.colorbar(cells[0], ax=axes, label="users in a cell (log scale)", shrink=0.6)
    return figure


def correlation_against_distance(runs: pd.DataFrame, game: str = "static") -> Figure:
    """The study's main figure: a mark a combination at the medians over the runs, bars from quartile to quartile."""

    def quartiles(values: np.ndarray) -> tuple[float, float, float]:
        low, middle, high = np.nanquantile(values, [0.25, 0.5, 0.75])
        return middle, low, high

    figure, axes = _agreement(runs, "final_distance", quartiles, game, same_range=True)
    for ax in axes:
        floor = runs["hull_distance"].median()
        ax.axvline(floor, color="black", linewidth=1, linestyle=(0, (1, 1)), label="nearest mixture of users (hull)")
        ax.set_xlabel(_two_lines(f"final {DISTANCE}"))
    figure.suptitle(f"Medians and quartiles of {runs['run'].nunique()} runs", fontsize=9)
    legend_below(figure, axes[0], 3)
    return figure


def agreement_against_regret(runs: pd.DataFrame, game: str = "static") -> Figure:
    """Mean agreement against mean normalised regret, with 95 % intervals."""
    runs = runs.assign(regret=regret(runs))
    figure, axes = _agreement(runs, "regret", mean_interval, game, same_range=False)
    for ax in axes:
        ax.set_xlim(left=0)
        ax.set_xlabel("normalised regret\n(final - hull) / (start - hull)")
    figure.suptitle(f"Means of {runs['run'].nunique()} runs with 95 % intervals", fontsize=9)
    legend_below(figure, axes[0], 2)
    return figure


def _agreement(
    runs: pd.DataFrame,
    measure: str,
    summarise: Callable[[np.ndarray], tuple[Any, Any, Any]],
    game: str,
    *,
    same_range: bool,
) -> tuple[Figure, np.ndarray]:
    """r against a measure, a column a metric (in the same range or its own); a marker a grouping, a colour a scoring.

    summarise: middle, low and high of the runs. Gives the figure and its axes (metrics,), with entries for a legend.
    """
    groupings, metrics, scorings = (list(runs[name].unique()) for name in ("grouping", "metric", "scoring"))
    figure, axes = new_figure(1, len(metrics), width=1 + 2.6 * len(metrics), height=4, sharex=same_range, sharey=True)
    for i, grouping in enumerate(groupings):
        axes[0, 0].plot([], [], color="0.4", marker=MARKERS[i % 7], linestyle="none", label=f"{grouping} grouping")
    for i, scoring in enumerate(scorings):
        axes[0, 0].plot([], [], **_mark("o", i), label=f"{scoring} points")
    for (metric, scoring, grouping), group in runs.groupby(["metric", "scoring", "grouping"], sort=False):
        x, y = (summarise(group[name].to_numpy()) for name in (measure, "pearson"))
        axes[0, metrics.index(metric)].errorbar(
            x[0],
            y[0],
            xerr=[[x[0] - x[1]], [x[2] - x[0]]],
            yerr=[[y[0] - y[1]], [y[2] - y[0]]],
            elinewidth=0.8,
            **_mark(MARKERS[groupings.index(grouping) % 7], scorings.index(scoring)),
        )
    for ax, metric in zip(axes[0], metrics, strict=True):
        ax.set_title(metric)
    axes[0, 0].set_ylabel(f"{CORRELATION}\n({game} game)")
    return figure, axes[0]


def _two_lines(label: str) -> str:
    """A label with its unit on a line of its own."""
    return label.replace(" (", "\n(")


def _mark(marker: str, i: int) -> dict[str, Any]:
    """The style of the i-th of what is told apart by colour and fill."""
    fill = {"fillstyle": FILLS[i % 4], "markerfacecoloralt": "white"}
    return {"color": COLOURS[i % 7], "marker": marker, "linestyle": "none", "ms": 6, **fill}


def estimator_noise(estimators: pd.DataFrame) -> Figure:
    """The same points of the same runs, correlated with either estimate of the Shapley values: a line a run, from one
    to the other. Beside each combination, the mean difference with its 95 % interval."""
    scorings = list(estimators["scoring"].unique())
    names = list(estimators[["grouping", "metric"]].drop_duplicates().itertuples(index=False, name=None))
    figure, axes = new_figure(
        1, len(scorings), width=1.6 + 3.2 * len(scorings), height=1.4 + 0.42 * len(names), sharex=True, sharey=True
    )
    for ax, scoring in zip(axes[0], scorings, strict=True):
        for place, (grouping, metric) in enumerate(names):
            same = estimators["grouping"].eq(grouping) & estimators["metric"].eq(metric)
            part = estimators[same & estimators["scoring"].eq(scoring)]
            y = place + np.linspace(-0.3, 0.3, len(part))
            first = place == 0
            ax.hlines(y, part["pearson_kernel"], part["pearson"], color="0.6", linewidth=0.8, zorder=1)
            ax.scatter(
                part["pearson_kernel"],
                y,
                s=12,
                marker="s",
                color="white",
                edgecolor=COLOURS[5],
                linewidth=0.8,
                label="shap.KernelExplainer, 10,000 samples" if first else None,
            )
            ax.scatter(part["pearson"], y, s=12, color=COLOURS[0], label="our estimate, certified" if first else None)
            gap, low, high = mean_interval((part["pearson"] - part["pearson_kernel"]).to_numpy())
            ax.text(1.02, place, f"{gap:.2f} [{low:.2f}, {high:.2f}]", transform=ax.get_yaxis_transform(), va="center")
        ax.set_title(f"{scoring} points")
        ax.set_xlabel(CORRELATION)
        ax.text(1.02, 1.01, "mean difference", transform=ax.transAxes, va="bottom")
    axes[0, 0].set_yticks(range(len(names)), [", ".join(name) for name in names])
    axes[0, 0].invert_yaxis()
    figure.suptitle(f"{estimators['run'].nunique()} runs of each combination, each a line", fontsize=9)
    legend_below(figure, axes[0, 0], 2)
    return figure


def subset_influence(combinations: Sequence[Combination], crowd: Crowd) -> Figure:
    """Four rounds of the first run of one combination, in the first two principal components of the crowd; below,
    what each round moves, enlarged."""
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
    shown = moved[np.linspace(0, len(moved) - 1, min(4, len(moved))).astype(int)]
    figure, axes = new_figure(2, max(1, len(shown)), width=1 + 2.4 * max(1, len(shown)), height=6)
    for column, t in enumerate(shown):
        whole, near = axes[:, column]
        merged = trace.taken[t] > trace.labels.max()
        weights = (
            trace.merged_weights[t] if merged else np.where(trace.labels[t] == trace.taken[t], trace.weights[t], 0)
        )
        pull = weights @ flat_users
        for ax in (whole, near):
            _draw_pull(ax, flat_users, weights, path[: t + 1], pull, flat_expert)
        ends = np.stack([path[t], pull, flat_expert])
        half = 0.65 * max(np.ptp(ends, axis=0).max(), 1e-3 * np.ptp(flat_users, axis=0).max())
        middle = (ends.max(axis=0) + ends.min(axis=0)) / 2
        whole.set_aspect("equal", adjustable="datalim")
        near.set(xlim=middle[0] + [-half, half], ylim=middle[1] + [-half, half], aspect="equal")
        whole.add_patch(Rectangle(middle - half, 2 * half, 2 * half, fill=False, linewidth=0.8, zorder=5))
        whole.set_title(f"round {t + 1}: {'merged candidate' if merged else f'group {trace.taken[t]}'}")
        near.set_title("the square, enlarged")
        near.set_xlabel(f"1st principal component\n({explained[0]:.0%} of variance)")
    for ax in axes[:, 0]:
        ax.set_ylabel(f"2nd principal component\n({explained[1]:.0%} of variance)")
    figure.suptitle(", ".join(combination.names) + " points: what pulls the model", fontsize=9)
    legend_below(figure, axes[0, 0], 3)
    return figure


def _draw_pull(
    ax: Axes, users: np.ndarray, weights: np.ndarray, path: np.ndarray, pull: np.ndarray, expert: np.ndarray
) -> None:
    """Users (n, 2) by weight (n,), the model's path (t + 1, 2), the centroid (2,) it is pulled to, the expert (2,)."""
    chosen = weights > 1e-3 * weights.max()
    ax.scatter(users[~chosen, 0], users[~chosen, 1], s=8, color="0.75", label="user")
    sizes = 10 + 70 * weights[chosen] / weights.max()
    ax.scatter(
        users[chosen, 0],
        users[chosen, 1],
        s=sizes,
        color=COLOURS[4],
        edgecolor="black",
        linewidth=0.4,
        label="user of the chosen subset (area: weight)",
    )
    ax.plot(*path.T, color=COLOURS[0], linewidth=1, label="model until this round")
    ax.plot(*expert, "k*", ms=9, linestyle="none", label="expert")
    ax.plot(*path[-1], "o", color="white", mec=COLOURS[0], ms=5, linestyle="none", label="model before the round")
    ax.plot(*pull, "P", color=COLOURS[1], ms=7, mec="black", mew=0.5, linestyle="none", label="weighted centroid")
    ax.annotate(
        "",
        (pull[0], pull[1]),
        (path[-1, 0], path[-1, 1]),
        arrowprops={"arrowstyle": "->", "color": COLOURS[5], "linewidth": 1.5},
        annotation_clip=True,
    )


def sweep_by_size(sweep: pd.DataFrame, paired: pd.DataFrame, measure: str) -> Figure:
    """One scoring. A column a metric, a line a number of groups, against the number of users: the first grouping's
    mean, then every other grouping's difference to it, run by run; all with 95 % intervals."""
    metrics, counts = list(sweep["metric"].unique()), sorted(sweep["num_groups"].unique())
    first, *others = sweep["grouping"].unique()
    figure, axes = new_figure(
        1 + len(others),
        len(metrics),
        width=1.2 + 2.4 * len(metrics),
        height=1 + 1.9 * (1 + len(others)),
        sharex=True,
        sharey="row",
    )
    rows = [(first, sweep[sweep["grouping"] == first], measure, f"{measure}_low", f"{measure}_high")]
    differences = paired[paired["measure"] == measure]
    rows += [(name, differences[differences["alternative"] == name], "difference", "low", "high") for name in others]
    for row, (grouping, table, middle, low, high) in enumerate(rows):
        for column, metric in enumerate(metrics):
            ax = axes[row, column]
            for i, count in enumerate(counts):
                part = table[(table["metric"] == metric) & (table["num_groups"] == count)].sort_values("num_users")
                y = part[middle]
                ax.errorbar(
                    part["num_users"] + 1.2 * (i - (len(counts) - 1) / 2),
                    y,
                    yerr=[y - part[low], part[high] - y],
                    color=COLOURS[i % 7],
                    linestyle=LINES[i % 4],
                    linewidth=1,
                    marker=MARKERS[i % 7],
                    ms=4,
                    elinewidth=0.8,
                    label=f"{count} groups",
                )
            if row:
                ax.axhline(0, color="black", linewidth=0.8)
            elif measure == "final_distance":
                hull = table.groupby("num_users")["hull_distance"].first()
                ax.plot(hull.index, hull, "k", linewidth=1, linestyle=(0, (1, 1)), label="nearest mixture of users")
            ax.set_title(f"{metric}: {grouping}" + (f" minus {first}" if row else ""))
    for ax in axes[-1]:
        ax.set_xlabel("users in the crowd")
    axes[0, 0].set_ylabel(_two_lines(f"final {DISTANCE}") if measure == "final_distance" else "Pearson r")
    # Differences in one range, so that they can be compared by eye.
    ends = [ax.get_ylim() for ax in axes[1:, 0]]
    for ax in axes[1:, 0]:
        ax.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        ax.set_ylabel("difference, run by run")
    figure.suptitle(f"{sweep['scoring'].iloc[0]} points, {sweep['runs'].iloc[0]} runs, 95 % intervals", fontsize=9)
    legend_below(figure, axes[0, 0], 5)
    return figure


def best_shares(best: pd.DataFrame) -> Figure:
    """How often each combination is best over the settings of the sweep; beside it, where `best` has them, the shares
    that the study published."""
    scorings, measures = list(best["scoring"].unique()), list(best["measure"].unique())
    names = list(best[["grouping", "metric"]].drop_duplicates().itertuples(index=False, name=None))
    figure, axes = new_figure(
        1, len(measures), width=1.6 + 2.9 * len(measures), height=1.4 + 0.36 * len(names), sharey=True
    )
    titles = {"final_distance": "least mean final distance", "pearson": "highest mean r, points and Shapley"}
    for ax, measure in zip(axes[0], measures, strict=True):
        for i, scoring in enumerate(scorings):
            part = best[(best["scoring"] == scoring) & (best["measure"] == measure)]
            y = np.arange(len(part)) + 0.22 * (i - (len(scorings) - 1) / 2)
            # A bootstrap's interval need not hold the value.
            bars = [(part["best_share"] - part["low"]).clip(lower=0), (part["high"] - part["best_share"]).clip(lower=0)]
            label = f"{scoring} points, 95 % interval"
            ax.errorbar(part["best_share"], y, xerr=bars, elinewidth=1, label=label, **_mark("o", i))
        if "published_share" in best:
            known = best[best["measure"] == measure].reset_index(drop=True)["published_share"].dropna()
            ax.plot(known, known.index, "D", ms=8, color="black", mfc="none", label="published by the study")
        ax.set_title(titles[measure])
        ax.set_xlim(-0.03, 1.03)
        ax.set_xlabel("share of settings where best")
    axes[0, 0].set_yticks(range(len(names)), [", ".join(name) for name in names])
    axes[0, 0].invert_yaxis()
    legend_below(figure, axes[0, -1], 3)
    return figure


MOST_SHOWN = 5.0  # ratio; what is beyond lies on the edge, with its number


def audit_figure(audit: pd.DataFrame) -> Figure:
    """Of the first grouping and metric: a line a strategy; pay and Shapley value over the honest twin's, and regret."""
    first = audit.iloc[0]
    audit = audit[(audit["grouping"] == first["grouping"]) & (audit["metric"] == first["metric"])]
    strategies, scorings = audit["strategy"].unique(), audit["scoring"].unique()
    figure, axes = new_figure(1, 2, width=8.6, height=0.9 + 0.34 * len(strategies), sharey=True, width_ratios=[3, 2])
    pay, regrets = axes[0]
    places = np.arange(len(strategies), dtype=float)
    style: dict[str, Any]
    for number, scoring in enumerate(scorings):
        own = audit[audit["scoring"] == scoring].set_index("strategy").loc[strategies]
        y = places + 0.2 * (number - (len(scorings) - 1) / 2)
        style = {"color": COLOURS[number % 7], "ms": 4, "linestyle": ""}
        ratio = own["pay_vs_twin"].clip(upper=MOST_SHOWN)
        errors = [ratio - own["low"].clip(0, MOST_SHOWN), own["high"].clip(upper=MOST_SHOWN) - ratio]
        marker = MARKERS[number % 7]
        pay.errorbar(
            ratio, y, xerr=np.maximum(errors, 0), fmt=marker, elinewidth=0.8, label=f"{scoring} points", **style
        )
        for place, value in zip(y, own["pay_vs_twin"], strict=True):
            if value > MOST_SHOWN:
                pay.annotate(f"{value:.1f}", (MOST_SHOWN, place), (4, -2), textcoords="offset points", fontsize=6)
        regrets.plot(own["regret"], y, marker, **style)
        regrets.axvline(own["regret"].iloc[0], color=COLOURS[number % 7], linewidth=0.7, linestyle=":")
    values = audit[audit["scoring"] == scorings[0]].set_index("strategy").loc[strategies]["shapley_vs_twin"]
    pay.plot(
        values.clip(0, MOST_SHOWN),
        places,
        "D",
        mfc="none",
        mec="black",
        ms=6,
        linestyle="",
        label="Shapley value (none below 0)",
    )
    pay.axvline(1, color="black", linewidth=0.6)
    pay.set_xlim(-0.1, MOST_SHOWN + 0.2)
    users = audit.drop_duplicates("strategy")["users"]
    pay.set_yticks(
        places, [f"{name.partition(',')[0]} ({who})" for name, who in zip(strategies, users, strict=True)], fontsize=7
    )
    pay.invert_yaxis()
    pay.set_xlabel("pay, and Shapley value, over the honest twin's")
    regrets.set_xlabel("normalised regret of the crowd")
    figure.suptitle(f"{first['grouping']} grouping, {first['metric']}", fontsize=9)
    legend_below(figure, pay, len(scorings) + 1)
    return figure
