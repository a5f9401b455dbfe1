"""A run's figures, from its tables and, for the figure of the people, from what was played."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crowd_fine_tuning_sim.cases import CASE, COMBINATION, Played
from crowd_fine_tuning_sim.estimates import ESTIMATES
from crowd_fine_tuning_sim.reliability import correlation
from crowd_fine_tuning_sim.results import Tables
from crowd_fine_tuning_sim.settings import KINDS
from experiment.figures import COLOURS, LINES, MARKERS, new_figure, save_figure
from experiment.report import Estimate, words
from experiment.statistics import correlation_interval, mean_interval

GREY = "#666666"
COMPETITION = "competition's model"
MODEL_MARKERS = {"centroid": "*", "untuned model": "o", COMPETITION: "s", "model on everybody": "^"}
LONGEST_NAME = 28  # of a person, in characters
MOST_LISTED = 40  # people beside the figure
KIND_STYLES = dict(zip(KINDS, zip(MARKERS, COLOURS, strict=True), strict=True))
KIND_STYLES["real"] = KIND_STYLES["on"]  # no crowd has both


def write_figures(folder: Path, tables: Tables, played: Sequence[Played]) -> list[str]:
    """Draws what the tables allow, each as .png and .pdf; gives the names."""
    figures = {"progress": progress_figure(tables["progress"])}
    if tables["points"]["shapley"].notna().any():
        figures["agreement"] = agreement_figure(tables["points"], tables["estimates"], tables["users"])
        figures["coalitions"] = coalitions_figure(tables["coalitions"])
    figures["people"] = people_figure(played[0], tables["points"], tables["users"])
    for name, figure in figures.items():
        save_figure(figure, folder, name)
    return list(figures)


def standardised(values: pd.Series) -> pd.Series:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else values * 0.0


def agreement_figure(points: pd.DataFrame, estimates: pd.DataFrame, users: pd.DataFrame) -> Figure:
    """A panel a scoring, then a panel an estimate: each against the Shapley values by retraining, in standard
    deviations within a crowd's repetition, people of all crowds, a style a kind, or a target where all are of one kind;
    bars: one standard error of the Shapley value; r: means over crowds with intervals."""
    metric = points["metric"].iloc[0]
    points = points[points["metric"] == metric].copy()
    spread = points.groupby([*CASE, *COMBINATION])["shapley"].transform("std")
    points["error"] = points["standard_error"] / spread
    shown: list[tuple[str, pd.DataFrame, str]] = []
    several = points["grouping"].nunique() > 1
    for (grouping, _, scoring), own in points.groupby(COMBINATION, sort=False):
        shown.append((f"{scoring} points" + (f", {grouping}" if several else ""), own, "points"))
    errors = points.drop_duplicates([*CASE, "user"]).set_index([*CASE, "user"])["error"]
    for name, (_, title, _) in ESTIMATES.items():
        own = estimates[(estimates["metric"] == metric) & (estimates["estimate"] == name)]
        if own["value"].notna().any() and own["value"].nunique() > 1:
            shown.append((title, own.join(errors, on=[*CASE, "user"]), "value"))
    columns = min(len(shown), min((4, 3), key=lambda count: -len(shown) % count))
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(rows, columns, width=7.4, height=0.5 + 2.0 * rows, sharex=True, sharey=True)
    kinds = users.set_index(["target", "crowd", "user"])["kind"]
    by, styles = "kind", KIND_STYLES
    if kinds.nunique() == 1:
        by = "target"
        styles = dict(zip(dict.fromkeys(users["target"]), cycle(zip(MARKERS, COLOURS, strict=True)), strict=False))
    for panel, (title, own, column) in zip(axes.flat, shown, strict=False):
        own = own.join(kinds, on=["target", "crowd", "user"])
        x = own.groupby(CASE)["shapley"].transform(standardised)
        y = own.groupby(CASE)[column].transform(standardised)
        for name, (marker, colour) in styles.items():
            of = own[by] == name
            if of.any():
                style: Any = {"fmt": marker, "color": colour, "markersize": 3.5, "elinewidth": 0.7}
                panel.errorbar(x[of], y[of], xerr=own["error"][of], label=name, alpha=0.8, **style)
        panel.axline((0, 0), slope=1, color=GREY, linewidth=0.7, linestyle=":")
        r = own.groupby(CASE)[["shapley", column]].apply(lambda o: float(correlation(*o.to_numpy(float).T)))
        found = Estimate(*correlation_interval(r.groupby(["target", "crowd"]).mean().to_numpy()))
        panel.set_title(f"{title}\n" + (f"r = {words(found)}" if r.notna().any() else "no r"), fontsize=8)
    for panel in axes.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in axes.flat[len(shown) - columns : len(shown)]:  # the last of their columns
        panel.tick_params(labelbottom=True)
    figure.supxlabel(f"Shapley value by retraining ({metric}; standard deviations within a crowd)", fontsize=8)
    figure.supylabel("points or estimate (standard deviations within a crowd)", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend: Any = {"loc": "outside upper center", "ncols": 7, "fontsize": 7, "title_fontsize": 7}
    note = "a mark: a person in one repetition; bar: one standard error; r: mean over crowds, 95 % interval"
    figure.legend(handles, labels, title=note, **legend)
    return figure


def coalitions_figure(coalitions: pd.DataFrame) -> Figure:
    """A panel a metric: each coalition's value by retraining against its value in the game of mean text vectors."""
    metrics = list(dict.fromkeys(coalitions["metric"]))
    figure, axes = new_figure(1, len(metrics), width=max(4.2, 3.2 * len(metrics)), height=3.4)
    sizes = coalitions["coalition"].str.count("1")
    norm = Normalize(0, sizes.max())
    for panel, metric in zip(axes[0], metrics, strict=True):
        own = coalitions[coalitions["metric"] == metric]
        of = sizes[own.index]
        marks = panel.scatter(own["static_value"], own["value"], c=of, cmap="cividis", norm=norm, s=10, linewidths=0)
        marks.set_alpha(0.8)
        r2 = own.groupby(CASE)[["value", "static_value"]].apply(lambda o: o.corr().iloc[0, 1] ** 2)
        panel.set_title(f"{metric}: {'mean ' * (len(r2) > 1)}R$^2$ = {r2.mean():.2f} within a crowd", fontsize=8)
        panel.set_xlabel("value in the game of mean text vectors")
    axes[0, 0].set_ylabel("value by retraining")
    bar = figure.colorbar(ScalarMappable(norm, "cividis"), ax=axes[0], label="people in the coalition")
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    return figure


def progress_figure(progress: pd.DataFrame) -> Figure:
    """A panel a metric and grouping: distance by round, a colour a scoring; language models and vectors."""
    panels_of = list(progress.groupby(["grouping", "metric"], sort=False))
    figure, axes = new_figure(1, len(panels_of), width=max(4.6, 3.0 * len(panels_of)), height=3.4, sharey=True)
    crowds, cases = progress.groupby(["target", "crowd"]).ngroups, progress.groupby(CASE).ngroups
    for panel, ((grouping, metric), own) in zip(axes[0], panels_of, strict=True):
        for number, (scoring, by_scoring) in enumerate(own.groupby("scoring", sort=False)):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            for world, line in (("text", LINES[0]), ("vector", LINES[1])):
                of = by_scoring[by_scoring["world"] == world]
                wide = of.pivot_table("distance", "round", ["target", "crowd"])  # means over seeds
                mean, low, high = mean_interval(wide.to_numpy())
                style: Any = {"color": colour, "linestyle": line, "marker": marker}
                label = f"{scoring}, {'language models' if world == 'text' else 'vectors'}"
                panel.plot(wide.index, mean, label=label, markersize=3, linewidth=1.2, **style)
                if crowds > 1 and world == "text":
                    panel.fill_between(wide.index, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set_title(f"{grouping}, {metric}", fontsize=8)
        panel.set_xlabel("round")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(0, None)
    axes[0, 0].set_ylabel("distance to the centroid (L2)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    note = f"means over {cases} repetitions" if cases > 1 else "one repetition"
    note += f", bands: 95 % intervals over {crowds} crowds" if crowds > 1 else ""
    legend: Any = {"loc": "outside upper center", "ncols": 2, "fontsize": 7, "title": note, "title_fontsize": 7}
    figure.legend(handles, labels, **legend)
    return figure


def people_figure(played: Played, points: pd.DataFrame, users: pd.DataFrame) -> Figure:
    """The first crowd: each person's mean vector, the centroid, and what models write, in the plane in which they
    differ most; numbers name the people, who are listed with kind and Shapley value by retraining."""
    means, centroid, base = played.means, played.case.crowd.centroid.astype(float), played.base
    (_, _, scoring), first = next(iter(played.competitions.items()))
    final = first["judged"][-1].astype(float)
    everybody = played.retraining["fresh"][1].astype(float).mean(axis=0)
    everything = np.vstack([means, centroid, base, final, everybody])
    _, singular, axes_of = np.linalg.svd(everything - everything.mean(axis=0), full_matrices=False)
    flat = (everything - everything.mean(axis=0)) @ axes_of[:2].T
    share = singular**2 / (singular**2).sum()
    key = played.key
    of_case = (points[CASE] == list(key.values())).all(axis=1)
    own = points[of_case].drop_duplicates("user")
    kinds = users[(users["target"] == key["target"]) & (users["crowd"] == key["crowd"])]["kind"].tolist()
    listed = own["user"].tolist()[:MOST_LISTED]
    figure, axes = new_figure(1, 1, width=7.4, height=max(4.0, 1.2 + 0.16 * len(listed)))
    panel = axes[0, 0]
    handles, labels = [], []
    for number, (user, value) in enumerate(zip(own["user"], own["shapley"], strict=True)):
        marker, colour = KIND_STYLES[kinds[number]]
        style: Any = {"color": colour, "markersize": 7, "linestyle": "", "markeredgecolor": "white"}
        handles += panel.plot(*flat[number], marker, markeredgewidth=0.4, zorder=4, **style)
        name = "" if str(user) == str(number + 1) else f" {shortened(str(user))}"  # the same if anonymous
        text = f"{number + 1}{name} ({kinds[number]})"
        labels.append(text + (f": {value:+.3f}".replace("-", "−") if np.isfinite(value) else ""))
    for number, (name, marker) in enumerate(MODEL_MARKERS.items()):
        place = flat[len(means) + number]
        look: Any = {"markerfacecolor": "none", "markeredgecolor": "black", "linestyle": ""}
        look["markersize"] = 15 if name == "centroid" else 11  # seen around people who lie on it
        panel.plot(*place, marker, label=name + f" ({scoring})" * (name == COMPETITION), **look)
    panel.set_xlabel(f"first principal component ({share[0]:.0%} of the variance)")
    panel.set_ylabel(f"second ({share[1]:.0%})")
    panel.margins(0.12)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, markerscale=0.7)
    left_out = len(labels) - len(listed)
    title = "people" + (f" (the first {len(listed)} of {len(labels)})" if left_out else "")
    if own["shapley"].notna().any():
        title += ", Shapley values"
    people: Any = {"loc": "outside right upper", "fontsize": 7, "title": title, "title_fontsize": 7}
    legend = figure.legend(handles[: len(listed)], labels[: len(listed)], **people)
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    number_marks(figure, panel, flat, len(listed))
    return figure


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def number_marks(figure: Figure, panel: Axes, marks: np.ndarray, count: int) -> None:
    """Writes 1, 2, ... beside the first `count` of the marks (m, 2), each where it is farthest from what is there."""
    figure.draw_without_rendering()  # now the panel has its place
    taken = panel.transData.transform(marks) * 72 / figure.dpi  # points
    own = taken[:count].copy()
    angles = np.arange(12) * np.pi / 6 + np.pi / 4
    steps = np.concatenate([radius * np.stack([np.cos(angles), np.sin(angles)], axis=1) for radius in (10, 16, 23)])
    for number, place in enumerate(own):
        others = np.delete(taken, number, axis=0)
        room = np.linalg.norm(place + steps[:, None] - others, axis=2).min(axis=1)
        step = steps[(np.minimum(room, 9) - 0.05 * np.linalg.norm(steps, axis=1)).argmax()]
        taken = np.vstack([taken, place + step])
        line: Any = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        style: Any = {"textcoords": "offset points", "fontsize": 7, "ha": "center", "va": "center", "zorder": 3}
        panel.annotate(str(number + 1), marks[number], xytext=tuple(step), arrowprops=line, **style)
