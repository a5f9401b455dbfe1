"""A run's figures and its page of sampled comments, from the run's tables."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiment.figures import COLOURS, new_figure, save_figure
from experiment.files import replace_atomically
from experiment.statistics import mean_interval
from point_in_space_sim.corpus import EMOTIONS

COLOUR = {
    "base": "#7F7F7F",
    "single": COLOURS[1],
    "multi": COLOURS[0],
    "sequential": COLOURS[2],
    "averaged": COLOURS[3],
}
MARKER = {"base": "P", "single": "o", "multi": "s", "sequential": "^", "averaged": "D"}
LONG = {
    "base": "base model",
    "single": "single model",
    "multi": "multi: best of the variants",
    "sequential": "control: a random part, no competition",
    "averaged": "control: adapters averaged",
}

# Crowd-SFT (arXiv 2506.04063): gpt-3.5-turbo tuned through an API, RoBERTa mapper, mean over 28 emotions.
PUBLISHED_SINGLE, PUBLISHED_MULTI = 0.609, 0.448
PUBLISHED_REDUCTION = {"nervousness": 5.2, "gratitude": 78.5}
PUBLISHED_MEAN_REDUCTION = 28.5
PUBLISHED = "published (gpt-3.5-turbo, RoBERTa mapper)"
COMMENTS_SHOWN = 8


def write_figures(
    folder: Path,
    comments: pd.DataFrame,
    generations: pd.DataFrame,
    neighbourhoods: pd.DataFrame,
    summary: pd.DataFrame,
    caption: str,
) -> None:
    """All figures as .png and .pdf, and comments.md. caption: base model, mapper and so on, named on each."""
    figures = {
        "distances": distances_figure(comments, neighbourhoods),
        "single_against_multi": single_against_multi_figure(summary),
        "movement": movement_figure(comments, neighbourhoods),
        "controls": controls_figure(summary),
        "selection": selection_figure(generations),
    }
    for name, figure in figures.items():
        figure.supxlabel(_plain(caption), fontsize=6.5, color="#555555", x=0.995, ha="right")
        save_figure(figure, folder, name)
    with replace_atomically(folder / "comments.md") as temporary:
        temporary.write_text(comments_page(comments, neighbourhoods, caption), encoding="utf-8")


def distances_figure(comments: pd.DataFrame, neighbourhoods: pd.DataFrame) -> Figure:
    """Box plots of the comments' distance to the centroid, by protocol and generation, a panel a target.

    The band is the neighbourhood's own spread: a model that writes just like it would lie on it.
    """
    report = comments[comments["role"] == "report"]
    emotions = list(dict.fromkeys(comments["emotion"]))
    figure, panels = _panels(emotions, height=2.5)
    groups = list(dict.fromkeys(zip(report["protocol"], report["generation"], strict=True)))
    groups.sort(key=lambda group: (list(COLOUR).index(group[0]), group[1]))
    positions, position = [], 0.0
    for i, (protocol, _) in enumerate(groups):
        position += 1.0 if i == 0 or protocol == groups[i - 1][0] else 1.6
        positions.append(position)
    sizes = _sizes(comments, neighbourhoods)
    for axes, emotion in zip(panels, emotions, strict=True):
        own = report[report["emotion"] == emotion]
        spread = _neighbours(neighbourhoods, emotion)["distance"]
        axes.axhspan(*spread.quantile([0.25, 0.75]), color="#999999", alpha=0.35, linewidth=0)
        axes.axhline(spread.median(), color="#555555", linewidth=1.0)
        for (protocol, generation), at in zip(groups, positions, strict=True):
            values = own[(own["protocol"] == protocol) & (own["generation"] == generation)]["distance"]
            axes.boxplot(
                values,
                positions=[at],
                widths=0.75,
                patch_artist=True,
                showmeans=True,
                boxprops={"facecolor": COLOUR[protocol], "alpha": 0.55, "edgecolor": COLOUR[protocol]},
                medianprops={"color": "black", "linewidth": 1.2},
                whiskerprops={"color": COLOUR[protocol]},
                capprops={"color": COLOUR[protocol]},
                flierprops={"marker": ".", "markersize": 2.5, "markeredgecolor": COLOUR[protocol], "alpha": 0.6},
                meanprops={
                    "marker": "D",
                    "markersize": 3,
                    "markerfacecolor": "white",
                    "markeredgecolor": "black",
                    "markeredgewidth": 0.7,
                },
            )
        axes.set_title(_short(emotion))
        axes.set_xticks(positions, [_tick(protocol, generation, sizes) for protocol, generation in groups])
        axes.tick_params(axis="x", labelsize=7, rotation=90)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(bottom=0)
    for axes in panels[:: _columns(emotions)]:
        axes.set_ylabel("distance to centroid")
    handles: list[Any] = [
        Patch(facecolor=COLOUR[name], alpha=0.55, label=LONG[name])
        for name in dict.fromkeys(name for name, _ in groups)
    ]
    handles.append(Patch(facecolor="#999999", alpha=0.35, label="neighbourhood: median, quartiles"))
    handles.append(
        Line2D(
            [],
            [],
            linestyle="",
            marker="D",
            markersize=4,
            markerfacecolor="white",
            markeredgecolor="black",
            label="mean",
        )
    )
    figure.legend(handles=handles, loc="outside upper center", ncols=_legend_columns(emotions), fontsize=7.5)
    return figure


def single_against_multi_figure(summary: pd.DataFrame) -> Figure:
    """Left: distances with one model and with competition, sorted by the reduction (right); published ones beside."""
    table = summary.sort_values("reduction_percent", ignore_index=True)
    mean_at = len(table)
    figure, (axes_row,) = new_figure(1, 2, width=7.2, height=1.7 + 0.26 * (len(table) + 1), sharey=True)
    left, right = axes_row
    rows = np.arange(len(table))
    for protocol, shift in (("single", 0.12), ("multi", -0.12)):
        values = table[f"{protocol}_distance"]
        errors = _errors(values, table[f"{protocol}_low"], table[f"{protocol}_high"])
        left.errorbar(
            values,
            rows + shift,
            xerr=errors,
            fmt=MARKER[protocol],
            color=COLOUR[protocol],
            markersize=4.5,
            linewidth=1.2,
            label=f"{LONG[protocol].partition(':')[0]}, ours",
        )
    left.scatter(
        table["neighbourhood_distance"], rows, marker="|", s=60, color="#555555", label="neighbourhood's own mean"
    )
    for protocol, value, shift in (("single", PUBLISHED_SINGLE, 0.12), ("multi", PUBLISHED_MULTI, -0.12)):
        if len(summary) > 1:
            _mean_over_targets(
                left, summary[f"{protocol}_distance"], mean_at + shift, MARKER[protocol], COLOUR[protocol]
            )
        left.plot(
            value,
            mean_at,
            MARKER[protocol],
            markersize=7,
            markerfacecolor="none",
            color=COLOUR[protocol],
            label=f"{LONG[protocol].partition(':')[0]}, {PUBLISHED}",
        )
    errors = _errors(table["reduction_percent"], table["reduction_low"], table["reduction_high"])
    right.errorbar(
        table["reduction_percent"],
        rows,
        xerr=errors,
        fmt="o",
        color="black",
        markersize=4.5,
        linewidth=1.2,
        label="reduction, ours",
    )
    published = [
        (row, PUBLISHED_REDUCTION[name]) for row, name in enumerate(table["emotion"]) if name in PUBLISHED_REDUCTION
    ]
    published.append((mean_at, PUBLISHED_MEAN_REDUCTION))
    right.plot(
        [value for _, value in published],
        [row for row, _ in published],
        "D",
        markersize=6,
        markerfacecolor="none",
        color=COLOURS[5],
        label=f"reduction, {PUBLISHED}",
    )
    if len(summary) > 1:
        _mean_over_targets(right, summary["reduction_percent"], mean_at, "o", "black")
    right.axvline(0, color="black", linewidth=0.8)
    left.set_yticks([*rows, mean_at], [*map(_short, table["emotion"]), f"mean of {len(table)} (published: of 28)"])
    left.get_yticklabels()[-1].set_fontweight("bold")
    for axes in (left, right):
        axes.axhline(mean_at - 0.5, color="#999999", linewidth=0.6)
        axes.set_ylim(-0.6, mean_at + 0.6)
    left.set_xlim(left=0)
    left.set_xlabel("mean distance to centroid")
    right.set_xlabel("reduction by competition (%)")
    handles = dict(
        zip(
            *(
                one + other
                for one, other in zip(
                    left.get_legend_handles_labels()[::-1], right.get_legend_handles_labels()[::-1], strict=True
                )
            ),
            strict=True,
        )
    )
    order = sorted(handles, key=lambda label: (PUBLISHED in label, not label.endswith("ours")))
    figure.legend(
        [handles[label] for label in order],
        order,
        loc="outside upper center",
        ncols=2,
        fontsize=7,
        title="bars: 95 % intervals",
        title_fontsize=7,
    )
    return figure


def _mean_over_targets(axes: Axes, values: pd.Series, at: float, marker: str, color: str) -> None:
    mean, low, high = map(float, mean_interval(values.to_numpy()))
    axes.errorbar(mean, at, xerr=[[mean - low], [high - mean]], fmt=marker, color=color, markersize=5.5, linewidth=1.5)


def movement_figure(comments: pd.DataFrame, neighbourhoods: pd.DataFrame) -> Figure:
    """Base, generations and neighbourhood in the first two principal components of all of a panel's points.

    Large marks are samples' means (first seed); small ones are comments, of a protocol's last sample.
    """
    report = comments[(comments["role"] == "report") & comments["protocol"].isin(["base", "single", "multi"])]
    emotions = list(dict.fromkeys(comments["emotion"]))
    figure, panels = _panels(emotions, height=2.9)
    labels = list(EMOTIONS)
    for axes, emotion in zip(panels, emotions, strict=True):
        own = report[(report["emotion"] == emotion) & (report["seed"] == report["seed"].min())]
        near = _neighbours(neighbourhoods, emotion)
        last = own.loc[own["protocol"] == "single", "generation"].max()
        own = own[(own["protocol"] != "single") | (own["generation"] == last)]
        points = np.vstack([near[labels], own[labels]]).astype(np.float64)
        centre = points.mean(axis=0)
        _, singular, directions = np.linalg.svd(points - centre, full_matrices=False)
        # A component's sign is arbitrary: the label that weighs most points to the right and up.
        directions = directions[:2] * np.sign(directions[:2][[0, 1], np.abs(directions[:2]).argmax(axis=1)])[:, None]
        share = singular[:2] ** 2 / (singular**2).sum()

        def project(table: pd.DataFrame, centre: np.ndarray = centre, axes_: np.ndarray = directions) -> np.ndarray:
            return (table[labels].to_numpy(np.float64) - centre) @ axes_.T

        cloud = project(near)
        axes.scatter(cloud[:, 0], cloud[:, 1], s=7, color="black", alpha=0.35, linewidth=0)
        axes.plot(*cloud.mean(axis=0), "*", color="black", markersize=10, zorder=5)
        path = []
        ends = own.groupby("protocol")["generation"].max()
        for (protocol, generation), sample in own.groupby(["protocol", "generation"], sort=False):
            cloud = project(sample)
            middle = cloud.mean(axis=0)
            if generation == ends[protocol]:
                axes.scatter(
                    cloud[:, 0],
                    cloud[:, 1],
                    s=7,
                    marker=MARKER[protocol],
                    color=COLOUR[protocol],
                    linewidth=0,
                    alpha=0.4,
                )
            axes.plot(
                *middle,
                MARKER[protocol],
                color=COLOUR[protocol],
                markersize=8,
                markeredgecolor="white",
                zorder=8 if protocol == "single" else 6,
            )
            if protocol == "multi":
                axes.annotate(
                    str(generation),
                    middle,
                    ha="center",
                    va="center_baseline",
                    fontsize=5.5,
                    color="white",
                    fontweight="bold",
                    zorder=7,
                )
            if protocol in ("base", "multi"):
                path.append(middle)
        axes.plot(*np.array(path).T, color=COLOUR["multi"], linewidth=1.2, zorder=4)
        names = [labels[i] for i in np.abs(directions).argmax(axis=1)]
        axes.set_xlabel(f"1st component ({share[0]:.0%}), mostly {names[0]}", fontsize=7)
        axes.set_ylabel(f"2nd ({share[1]:.0%}), mostly {names[1]}", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_title(_short(emotion))
    handles = [
        Line2D([], [], linestyle="", marker=".", markersize=7, color="black", alpha=0.5, label="neighbourhood"),
        Line2D([], [], linestyle="", marker="*", markersize=10, color="black", label="centroid"),
        *(
            Line2D(
                [],
                [],
                linestyle="-" if name == "multi" else "",
                marker=MARKER[name],
                markersize=6,
                color=COLOUR[name],
                label={"multi": "multi, after each generation", "single": "single, on all neighbours"}.get(name, name),
            )
            for name in ("base", "single", "multi")
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5 if len(emotions) > 4 else 3, fontsize=7.5)
    return figure


def controls_figure(summary: pd.DataFrame) -> Figure:
    """Paired differences: competition minus the single model and minus each control, below 0 where it is closer."""
    table = summary.sort_values("reduction_percent", ignore_index=True)
    figure, (axes_row,) = new_figure(1, 3, width=7.2, height=1.3 + 0.26 * (len(table) + 1), sharey=True, sharex=True)
    rows = np.arange(len(table))
    titles = {"single": "single model", "sequential": "random part, no competition", "averaged": "adapters averaged"}
    for axes, (other, title) in zip(axes_row, titles.items(), strict=True):
        column = f"multi_minus_{other}"
        errors = _errors(table[column], table[f"{column}_low"], table[f"{column}_high"])
        axes.errorbar(
            table[column], rows, xerr=errors, fmt=MARKER[other], color=COLOUR[other], markersize=4.5, linewidth=1.2
        )
        if len(table) > 1:
            _mean_over_targets(axes, table[column], len(table), MARKER[other], "black")
            axes.axhline(len(table) - 0.5, color="#999999", linewidth=0.6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"multi minus\n{title}")
        axes.set_ylim(-0.6, len(table) + (0.6 if len(table) > 1 else -0.4))
    ticks = [*map(_short, table["emotion"])] + (["mean over targets"] if len(table) > 1 else [])
    axes_row[0].set_yticks(range(len(ticks)), ticks)
    axes_row[1].set_xlabel("difference of mean distances, 95 % interval (below 0: competition is closer)")
    return figure


def selection_figure(generations: pd.DataFrame) -> Figure:
    """Winner's curse: each kept variant's distance on the sample that chose it against that on a fresh one."""
    multi = generations[(generations["protocol"] == "multi") & generations["kept"]]
    key = ["emotion", "seed", "generation"]
    both = multi[multi["role"] == "selection"].merge(multi[multi["role"] == "report"], on=key, suffixes=("", "_fresh"))
    figure, ((axes,),) = new_figure(width=4.6, height=4.4)
    for generation, own in both.groupby("generation"):
        errors = [
            _errors(own[f"mean_distance{end}"], own[f"interval_low{end}"], own[f"interval_high{end}"])
            for end in ("", "_fresh")
        ]
        index = (int(generation) - 1) % 5
        axes.errorbar(
            own["mean_distance"],
            own["mean_distance_fresh"],
            xerr=errors[0],
            yerr=errors[1],
            fmt="os^Dv"[index],
            color=COLOURS[index],
            markersize=5,
            linewidth=0.7,
            elinewidth=0.6,
            label=f"generation {generation}",
        )
    ends = (
        both[["interval_low", "interval_low_fresh"]].min().min(),
        both[["interval_high", "interval_high_fresh"]].max().max(),
    )
    margin = 0.05 * (ends[1] - ends[0]) + 1e-3
    limits = (ends[0] - margin, ends[1] + margin)
    axes.plot(limits, limits, color="black", linewidth=0.8)
    axes.set(
        xlim=limits,
        ylim=limits,
        aspect="equal",
        xlabel="distance on the sample that chose the variant",
        ylabel="distance on a fresh sample",
    )
    bias = (both["mean_distance_fresh"] - both["mean_distance"]).mean()
    axes.set_title(f"kept variants; fresh minus choosing: {bias:+.3f} on average")
    axes.legend(loc="lower right")
    return figure


def comments_page(comments: pd.DataFrame, neighbourhoods: pd.DataFrame, caption: str) -> str:
    """Markdown: the first comments of every reported sample of the first seed, not picked, and their distances."""
    lines = [
        "# Sampled comments",
        f"The first {COMMENTS_SHOWN} comments of each reported sample (first seed), as drawn, with their distance to "
        f"the neighbourhood's centroid. {caption[0].upper()}{caption[1:]}.",
    ]
    sizes = _sizes(comments, neighbourhoods)
    report = comments[(comments["role"] == "report") & (comments["seed"] == comments["seed"].min())]
    for emotion, own in report.groupby("emotion", sort=False):
        lines.append(f"## {_escape(str(emotion))}")
        place = neighbourhoods[neighbourhoods["emotion"] == emotion]
        lines += _comment_list(f"Target, and {COMMENTS_SHOWN - 1} nearest of its neighbourhood", place)
        last = own.groupby("protocol")["generation"].max()
        shown: dict[tuple[str, ...], str] = {}
        for (protocol, generation), sample in own.groupby(["protocol", "generation"], sort=False):
            # Of the single model and the controls, the last one; of the competition, every generation.
            if protocol == "multi" or generation == last[protocol]:
                size = sizes.get((protocol, generation))
                title = LONG[protocol]
                if protocol != "base":
                    title += f" on {size} comments" if size else f", generation {generation}"
                title = f"{title[0].upper()}{title[1:]} (mean {sample['distance'].mean():.2f})"
                # Protocols may have come to the same model.
                same = shown.setdefault(tuple(sample["text"]), title)
                lines += [f"**{title}**", f"- as: {same}"] if same != title else _comment_list(title, sample)
    return "\n\n".join(lines) + "\n"


def _comment_list(title: str, table: pd.DataFrame) -> list[str]:
    rows = [
        f"- {distance:.2f} {_escape(text)}"
        for text, distance in zip(table["text"][:COMMENTS_SHOWN], table["distance"], strict=False)
    ]
    return [f"**{title}**", "\n".join(rows)]


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|~$" else letter for letter in text) or "(empty)"


def _panels(emotions: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each emotion."""
    columns = _columns(emotions)
    rows = -(-len(emotions) // columns)
    figure, axes = new_figure(rows, columns, width=(5.0, 7.2, 9.0, 12.0)[columns - 1], height=height * rows + 1.0)
    flat = list(axes.flat)
    for unused in flat[len(emotions) :]:
        unused.remove()
    return figure, flat[: len(emotions)]


def _columns(emotions: Sequence[str]) -> int:
    return 1 if len(emotions) == 1 else 2 if len(emotions) <= 4 else 3 if len(emotions) <= 9 else 4


def _legend_columns(emotions: Sequence[str]) -> int:
    return (2, 3, 4, 4)[_columns(emotions) - 1]


def _neighbours(neighbourhoods: pd.DataFrame, emotion: str) -> pd.DataFrame:
    return neighbourhoods[(neighbourhoods["emotion"] == emotion) & (neighbourhoods["rank"] > 0)]


def _sizes(comments: pd.DataFrame, neighbourhoods: pd.DataFrame) -> dict[tuple[str, int], int]:
    """(protocol, generation) -> number of comments, for the single models."""
    neighbours = int(neighbourhoods["rank"].max())
    thirds = sorted(comments.loc[comments["protocol"] == "single", "generation"].unique())
    return {("single", third): neighbours * third // len(thirds) for third in thirds}


def _tick(protocol: str, generation: int, sizes: dict[tuple[str, int], int]) -> str:
    return "base" if protocol == "base" else str(sizes.get((protocol, generation), generation))


def _errors(values: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Distances to both ends of the intervals: (2, n). A bootstrap interval need not hold the value by a hair."""
    return np.maximum([values - low, high - values], 0)


def _short(name: str) -> str:
    return _plain(textwrap.shorten(name, 28, placeholder=" ..."))


def _plain(text: str) -> str:
    """Without mathematics: matplotlib takes what stands between two dollar signs for a formula."""
    return text.replace("$", r"\$")
