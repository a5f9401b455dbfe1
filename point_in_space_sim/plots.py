"""A run's figures and its page of sampled comments, from the run's tables.

Protocols have their colour and marker by their place in the registry; all else about them comes from there too.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, Patch

from experiment.figures import COLOURS, MARKERS, new_figure, save_figure
from experiment.statistics import mean_interval
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.measures import MEASURES
from point_in_space_sim.protocols import PROTOCOLS
from point_in_space_sim.results import comparisons, overall, pick, played, published

COMMENTS_SHOWN = 8
GREY = "#666666"
INTERVAL_OF_MEAN = 5.991  # the 0.95 quantile of chi-square with two degrees of freedom


def colour_of(protocol: str) -> str:
    return (GREY, *COLOURS)[list(PROTOCOLS).index(protocol) % (len(COLOURS) + 1)]


def marker_of(protocol: str) -> str:
    return MARKERS[list(PROTOCOLS).index(protocol) % len(MARKERS)]


def write_figures(
    folder: Path,
    comments: pd.DataFrame,
    generations: pd.DataFrame,
    neighbourhoods: pd.DataFrame,
    summary: pd.DataFrame,
    caption: str,
) -> list[str]:
    """Draws all figures, each as .png and .pdf; gives the names. caption: base model, mapper and so on, on each."""
    figures = {
        "competition": competition_figure(summary),
        "generations": generations_figure(generations, summary),
        "single_against_multi": single_against_multi_figure(summary, published()),
        "distances": distances_figure(comments, generations, neighbourhoods),
        "movement": movement_figure(comments, neighbourhoods),
        "selection": selection_figure(generations),
    }
    for name, figure in figures.items():
        figure.supxlabel(_plain(caption), fontsize=6.5, color="#555555", x=0.995, ha="right")
        save_figure(figure, folder, name)
    return list(figures)


def distances_figure(comments: pd.DataFrame, generations: pd.DataFrame, neighbourhoods: pd.DataFrame) -> Figure:
    """Box plots of the comments' distance to the centroid, by protocol and generation, a panel a target.

    The band is the neighbourhood's own spread: a model that writes just like it would lie on it.
    """
    report = comments[comments["role"] == "report"]
    emotions = list(dict.fromkeys(comments["emotion"]))
    figure, panels = _panels(emotions, height=2.7)
    groups = list(dict.fromkeys(zip(report["protocol"], report["generation"], strict=True)))
    groups.sort(key=lambda group: (list(PROTOCOLS).index(group[0]), group[1]))
    positions, position = [], 0.0
    for i, (protocol, _) in enumerate(groups):
        position += 1.0 if i == 0 or protocol == groups[i - 1][0] else 1.6
        positions.append(position)
    sizes = _sizes(generations)
    for axes, emotion in zip(panels, emotions, strict=True):
        own = report[report["emotion"] == emotion]
        spread = _neighbours(neighbourhoods, emotion)["distance"]
        axes.axhspan(*spread.quantile([0.25, 0.75]), color="#999999", alpha=0.35, linewidth=0)
        axes.axhline(spread.median(), color="#555555", linewidth=1.0)
        for (protocol, generation), at in zip(groups, positions, strict=True):
            values = own[(own["protocol"] == protocol) & (own["generation"] == generation)]["distance"]
            colour = colour_of(protocol)
            axes.boxplot(
                values,
                positions=[at],
                widths=0.75,
                patch_artist=True,
                showmeans=True,
                boxprops={"facecolor": colour, "alpha": 0.55, "edgecolor": colour},
                medianprops={"color": "white" if colour == "#000000" else "black", "linewidth": 1.2},
                whiskerprops={"color": colour},
                capprops={"color": colour},
                flierprops={"marker": ".", "markersize": 2.5, "markeredgecolor": colour, "alpha": 0.6},
                meanprops=_open_mark("D", 3),
            )
        axes.set_title(_short(emotion))
        axes.set_xticks(positions, [_tick(protocol, generation, sizes) for protocol, generation in groups])
        axes.tick_params(axis="x", labelsize=6.5, rotation=90)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 1.05 * report["distance"].max())
    for axes in panels[:: _columns(emotions)]:
        axes.set_ylabel("distance to centroid (L2)")
    handles: list[Any] = [
        Patch(facecolor=colour_of(name), alpha=0.55, label=PROTOCOLS[name].title)
        for name in dict.fromkeys(name for name, _ in groups)
    ]
    handles.append(Patch(facecolor="#999999", alpha=0.35, label="neighbourhood: median, quartiles"))
    handles.append(Line2D([], [], linestyle="", label="mean", **_open_mark("D", 4)))
    figure.legend(handles=handles, loc="outside upper center", ncols=_legend_columns(emotions), fontsize=7.5)
    return figure


def single_against_multi_figure(summary: pd.DataFrame, study: pd.DataFrame) -> Figure:
    """Left: a row a target, its distance with one model joined to that with competition; right: the reduction.

    The run's targets come first, by their reduction; below each, open marks, what the study published for it; then the
    study's other emotions, more tightly; last the means, over the run's targets and over all of the study's.
    """
    columns = ["single", "multi", "reduction_percent"]
    ours = _wide(summary, columns).sort_values("reduction_percent", ascending=False, ignore_index=True)
    theirs = study.rename(columns={"single_100": "single", "multi_3": "multi"})
    rest = theirs[~theirs["emotion"].isin(ours["emotion"])].sort_values("reduction_percent", ascending=False)
    shared = theirs[theirs["emotion"].isin(ours["emotion"])]
    ticks: list[tuple[float, str]] = []
    rules = []
    at = 0.0
    rows: list[tuple[float, Any, bool]] = []  # position, a row with estimates, whether it is ours
    for _, row in ours.iterrows():
        published_row = shared[shared["emotion"] == row["emotion"]]
        rows.append((at, row, True))
        rows += [(at + 0.34, own, False) for _, own in published_row.iterrows()]
        ticks.append((at + 0.17 * len(published_row), _short(row["emotion"])))
        at += 1.0
    for number, (_, row) in enumerate(rest.iterrows()):
        if number == 0:
            rules.append(at - 0.3)
        rows.append((at + 0.1, row, False))
        ticks.append((at + 0.1, row["emotion"]))
        at += 0.55
    at += 0.35
    rules.append(at - 0.4)
    if len(ours) > 1:
        rows.append((at, _means(ours, columns), True))
        if len(shared) > 1:
            rows.append((at + 0.34, _means(shared, columns), False))
        ticks.append((at + 0.17, f"mean of these {len(ours)}"))
        at += 1.0
    if len(rest):  # else the study's emotions are the run's
        rows.append((at, _means(theirs, columns), False))
        ticks.append((at, f"mean of the study's {len(theirs)}"))
    else:
        at -= 1.0

    figure, ((left, right),) = new_figure(1, 2, width=7.2, height=1.6 + 0.21 * (at + 1), sharey=True)
    for position, row, own in rows:
        for axes, names in ((left, ("single", "multi")), (right, ("reduction_percent",))):
            axes.plot([row[name] for name in names], [position] * len(names), color="#AAAAAA", linewidth=1.0, zorder=1)
            for name in names:
                colour = colour_of(name) if name in PROTOCOLS else "black"
                marker = marker_of(name) if name in PROTOCOLS else "D"
                # Both of a pair have intervals: a little apart, so that none hides the other.
                shift = {"single": -0.09, "multi": 0.09}.get(name, 0.0) * own
                axes.errorbar(
                    row[name],
                    position + shift,
                    xerr=_errors([row[name]], [row[f"{name}_low"]], [row[f"{name}_high"]]) if own else None,
                    fmt=marker,
                    color=colour,
                    markersize=4.5 if own else 3.8,
                    markerfacecolor=colour if own else "white",
                    markeredgewidth=0.9,
                    linewidth=1.1,
                    zorder=3 if own else 2,
                )
    near = pick(summary, "distance", "neighbourhood").set_index("emotion")["value"]
    left.plot(near[ours["emotion"]], np.arange(len(ours)), "|", markersize=9, color="black", zorder=2)
    right.axvline(0, color="black", linewidth=0.8)
    left.set_yticks([position for position, _ in ticks], [name for _, name in ticks], fontsize=7.5)
    for axes in (left, right):
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        for rule in rules:
            axes.axhline(rule, color="#999999", linewidth=0.6)
    left.set_ylim(at + 0.6, -0.6)
    left.set_xlim(left=0)
    left.set_xlabel("mean distance to centroid (L2)")
    right.set_xlabel("reduction by competition (%)")
    handles = [
        Line2D([], [], linestyle="", marker=marker_of(name), color=colour_of(name), markersize=4.5, label=label)
        for name, label in (("single", "single model, this run"), ("multi", "multi, this run"))
    ]
    handles.append(Line2D([], [], linestyle="", marker="D", color="black", markersize=4.5, label="reduction, this run"))
    handles.append(
        Line2D([], [], linestyle="", marker="|", color="black", markersize=9, label="neighbourhood's own, this run")
    )
    handles += [
        Line2D([], [], linestyle="", marker=marker, color=colour, markerfacecolor="white", markersize=4.5, label=label)
        for marker, colour, label in (
            (marker_of("single"), colour_of("single"), "single, published"),
            (marker_of("multi"), colour_of("multi"), "multi, published"),
            ("D", "black", "reduction, published"),
        )
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=4,
        fontsize=7,
        title="bars: 95 % intervals; published: Crowd-SFT, gpt-3.5-turbo and RoBERTa mapper, without intervals",
        title_fontsize=7,
    )
    return figure


def _wide(summary: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A row a target: of each protocol its mean distance, and the reduction, with the ends of their intervals."""
    table = pd.DataFrame({"emotion": summary["emotion"].unique()})
    for name in columns:
        said = (
            pick(summary, "distance", name)
            if name in PROTOCOLS
            else pick(summary, "reduction_percent", "multi", "single")
        ).set_index("emotion")
        for column, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            table[f"{name}{suffix}"] = said.loc[table["emotion"], column].to_numpy()
    return table


def _means(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, float]:
    """Means of the columns over the table's rows, and the ends of Student's intervals."""
    row = {}
    for name in columns:
        ends = map(float, mean_interval(table[name].to_numpy()))
        row[name], row[f"{name}_low"], row[f"{name}_high"] = ends
    return row


def competition_figure(summary: pd.DataFrame) -> Figure:
    """A column a measure. Above: the last model of every protocol. Below: paired differences of competition to others.

    Marks with bars: means over targets with 95 % intervals; dots: the targets.
    """
    means, protocols = overall(summary), played(summary)
    levels = [name for name in protocols if name != "base"]
    pairs = comparisons(protocols)
    targets = summary["emotion"].nunique()
    figure, (above, below) = new_figure(
        2,
        len(MEASURES),
        width=7.4,
        height=1.3 + 0.21 * (len(levels) + len(pairs)),
        sharey="row",
        height_ratios=[len(levels) + 0.5, len(pairs) + 1.0],
    )
    gaps = [0.7 * (list(dict.fromkeys(name for name, _ in pairs)).index(name)) for name, _ in pairs]
    rows_above = [(float(i), name, "", name) for i, name in enumerate(levels)]
    rows_below = [(i + gap, name, other, other) for i, ((name, other), gap) in enumerate(zip(pairs, gaps, strict=True))]
    for panels, rows in ((above, rows_above), (below, rows_below)):
        for axes, measure in zip(panels, MEASURES, strict=True):
            for at, name, other, mark in rows:
                own, mean = pick(summary, measure, name, other), pick(means, measure, name, other).iloc[0]
                if targets > 1:
                    axes.plot(own["value"], [at] * len(own), ".", color="#AAAAAA", markersize=2.5, zorder=1)
                style: Any = {"fmt": marker_of(mark), "color": colour_of(mark), "markersize": 4.5, "linewidth": 1.3}
                ends = _errors([mean["value"]], [mean["low"]], [mean["high"]])
                axes.errorbar(mean["value"], at, xerr=ends, zorder=3, **style)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="both", labelsize=6.5)
    for axes, shown in zip(above, MEASURES.values(), strict=True):
        axes.set_title(shown.short.replace(" ", "\n", 1), fontsize=8)
    for axes, (name, shown) in zip(below, MEASURES.items(), strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        better = "left" if shown.better < 0 else "right"
        axes.set_xlabel(f"{'share' if name == 'distinct' else 'L2'}; better: {better}", fontsize=7)
    above[0].set_yticks([at for at, *_ in rows_above], [PROTOCOLS[name].short for _, name, *_ in rows_above])
    below[0].set_yticks(
        [at for at, *_ in rows_below],
        [f"{PROTOCOLS[name].short} \N{MINUS SIGN} {PROTOCOLS[other].short}" for _, name, other, _ in rows_below],
    )
    above[0].set_ylim(len(levels) - 0.4, -0.6)
    below[0].set_ylim(rows_below[-1][0] + 0.6, -0.6)
    units = f"means over {targets} targets, 95 % intervals; dots: targets" if targets > 1 else "bars: 95 % intervals"
    figure.suptitle(f"Last models above, paired differences below ({units})", fontsize=8)
    return figure


def generations_figure(generations: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """The measures by generation of the protocols that have several, and the single models as lines across."""
    report = generations[generations["role"] == "report"]
    several = [
        name
        for name in played(report)
        if name != "single"
        and (report["protocol"] == name).sum()
        and report.loc[report["protocol"] == name, "generation"].nunique() > 1
    ]
    means = overall(summary)
    singles = [name for name in ("single", "chosen", "filter", "oracle") if name in played(report)]
    figure, (panels,) = new_figure(1, len(MEASURES), width=7.4, height=2.7)
    for axes, (name, measure) in zip(panels, MEASURES.items(), strict=True):
        for number, protocol in enumerate(several):
            own = (
                report[report["protocol"] == protocol]
                .groupby(["generation", "emotion"])[measure.column]
                .mean()
                .unstack()
            )
            mean, low, high = mean_interval(own.to_numpy())
            at = own.index.to_numpy() + 0.06 * (number - (len(several) - 1) / 2)
            ends = _errors(mean, low, high) if own.shape[1] > 1 else None
            style: Any = {
                "marker": marker_of(protocol),
                "color": colour_of(protocol),
                "markersize": 4,
                "linewidth": 1.2,
            }
            axes.errorbar(at, mean, yerr=ends, elinewidth=0.8, label=PROTOCOLS[protocol].title, **style)
        for protocol, dashes in zip(singles, ("-", "--", ":", "-."), strict=False):
            level = pick(means, name, protocol)["value"].item()
            axes.axhline(
                level, color=colour_of(protocol), linestyle=dashes, linewidth=1.1, label=PROTOCOLS[protocol].title
            )
        axes.set_title(measure.short.replace(" ", "\n", 1), fontsize=8)
        axes.set_xticks(sorted(report.loc[report["protocol"].isin(several), "generation"].unique()))
        axes.set_xlabel("generation", fontsize=7)
        axes.tick_params(labelsize=6.5)
        axes.set_ylabel("share" if name == "distinct" else "L2", fontsize=7)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7)
    return figure


def movement_figure(comments: pd.DataFrame, neighbourhoods: pd.DataFrame) -> Figure:
    """Where the models' mean comments lie around the centroid, a panel a target (first seed).

    Across: along the line from the base model's mean to the centroid, which is at 0. Up: the direction at right angles
    to it in which the means differ most. Ellipses: 95 % regions of the means.
    """
    report = comments[comments["role"] == "report"]
    shown = ["single", *dict.fromkeys(name for name, _ in comparisons(list(report["protocol"].unique())))]
    emotions = list(dict.fromkeys(comments["emotion"]))
    figure, panels = _panels(emotions, height=2.6)
    labels = list(EMOTIONS)
    for axes, emotion in zip(panels, emotions, strict=True):
        own = report[(report["emotion"] == emotion) & (report["seed"] == report["seed"].min())]
        near = _neighbours(neighbourhoods, emotion)[labels].to_numpy(np.float64)
        centroid = near.mean(axis=0)
        start = own.loc[own["protocol"] == "base", labels].to_numpy(np.float64).mean(axis=0)
        groups = {
            key: sample[labels].to_numpy(np.float64)
            for key, sample in own[own["protocol"].isin(shown)].groupby(["protocol", "generation"], sort=False)
        }
        along = (centroid - start) / np.linalg.norm(centroid - start)
        means = np.array([sample.mean(axis=0) for sample in groups.values()]) - centroid
        across = np.linalg.svd(means - np.outer(means @ along, along))[2][0]
        # A direction's sign is arbitrary: the label that weighs most points up.
        across *= np.sign(across[np.abs(across).argmax()])
        plane = np.column_stack([along, across])

        spread = np.cov(((near - centroid) @ plane).T) / len(near)
        axes.add_patch(_ellipse(np.zeros(2), spread, "black"))
        axes.plot(0, 0, "*", color="black", markersize=9, zorder=4)
        for protocol in shown:
            path = []
            for (name, generation), sample in groups.items():
                if name != protocol:
                    continue
                points = (sample - centroid) @ plane
                path.append(points.mean(axis=0))
                axes.add_patch(_ellipse(path[-1], np.cov(points.T) / len(points), colour_of(protocol)))
                # Later ones are larger: the order shows where labels would hide each other.
                axes.plot(
                    *path[-1],
                    marker_of(protocol),
                    color=colour_of(protocol),
                    markersize=3.5 + 1.3 * generation,
                    markeredgecolor="white",
                    markeredgewidth=0.7,
                    zorder=6,
                )
            axes.plot(*np.array(path).T, color=colour_of(protocol), linewidth=1.2, zorder=5)
        axes.set_title(f"{_short(emotion)} (base: {np.linalg.norm(centroid - start):.2f} left)")
        axes.set_xlabel("along base \N{RIGHTWARDS ARROW} centroid (L2)", fontsize=7)
        axes.set_ylabel(f"across, mostly {labels[int(np.abs(across).argmax())]} (L2)", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_aspect("equal", adjustable="datalim")
        axes.autoscale_view()
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker="*", markersize=9, color="black", label="centroid"),
        *(
            Line2D([], [], marker=marker_of(name), markersize=5.5, color=colour_of(name), label=label)
            for name, label in (
                (
                    name,
                    "single: on a third, two thirds, all" if name == "single" else f"{name}: generation by generation",
                )
                for name in shown
            )
        ),
        Patch(facecolor="#999999", alpha=0.3, label="95 % region of a mean"),
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=_legend_columns(emotions),
        fontsize=7.5,
        title="marks: means of 28 probabilities, larger ones later",
        title_fontsize=7.5,
    )
    return figure


def _ellipse(centre: np.ndarray, covariance: np.ndarray, colour: str) -> Ellipse:
    """The 95 % region of a mean with this covariance (2, 2)."""
    variances, directions = np.linalg.eigh(covariance)
    width, height = 2 * np.sqrt(INTERVAL_OF_MEAN * np.maximum(variances, 0))
    angle = np.degrees(np.arctan2(directions[1, 0], directions[0, 0]))
    return Ellipse((centre[0], centre[1]), width, height, angle=angle, facecolor=colour, alpha=0.15, linewidth=0)


def selection_figure(generations: pd.DataFrame) -> Figure:
    """Winner's curse: each kept variant's distance on the sample that chose it against that on a fresh one."""
    choosing = list(dict.fromkeys(generations.loc[generations["role"] == "selection", "protocol"]))
    key = ["emotion", "seed", "generation"]
    figure, (panels,) = new_figure(1, len(choosing), width=4.4 * len(choosing), height=4.4)
    for axes, protocol in zip(panels, choosing, strict=True):
        kept = generations[(generations["protocol"] == protocol) & generations["kept"]]
        both = kept[kept["role"] == "selection"].merge(kept[kept["role"] == "report"], on=key, suffixes=("", "_fresh"))
        for generation, own in both.groupby("generation"):
            errors = [
                _errors(own[f"mean_distance{end}"], own[f"interval_low{end}"], own[f"interval_high{end}"])
                for end in ("", "_fresh")
            ]
            index = int(generation) - 1
            axes.errorbar(
                own["mean_distance"],
                own["mean_distance_fresh"],
                xerr=errors[0],
                yerr=errors[1],
                fmt=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                markersize=5,
                elinewidth=0.6 if len(both) < 40 else 0.25,
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
            xlabel="mean distance (L2) on the sample that chose",
            ylabel="mean distance (L2) on a fresh sample",
        )
        bias = (both["mean_distance_fresh"] - both["mean_distance"]).mean()
        axes.set_title(f"{PROTOCOLS[protocol].short}: kept variants;\nfresh minus choosing {bias:+.3f} on average")
    longest = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[0]))
    figure.legend(*longest, loc="outside upper center", ncols=len(longest[0]))
    return figure


def comments_page(comments: pd.DataFrame, generations: pd.DataFrame, neighbourhoods: pd.DataFrame, caption: str) -> str:
    """Markdown: the first comments of every reported sample of the first seed, not picked, and their distances."""
    lines = [
        "# Sampled comments",
        f"The first {COMMENTS_SHOWN} comments of each reported sample (first seed), as drawn, with their distance to "
        f"the neighbourhood's centroid. {caption[0].upper()}{caption[1:]}.",
    ]
    sizes = _sizes(generations)
    report = comments[(comments["role"] == "report") & (comments["seed"] == comments["seed"].min())]
    for emotion, own in report.groupby("emotion", sort=False):
        lines.append(f"## {_escape(str(emotion))}")
        place = neighbourhoods[neighbourhoods["emotion"] == emotion]
        lines += _comment_list(f"Target, and {COMMENTS_SHOWN - 1} nearest of its neighbourhood", place)
        last = own.groupby("protocol")["generation"].max()
        shown: dict[tuple[str, ...], str] = {}
        for (protocol, generation), sample in own.groupby(["protocol", "generation"], sort=False):
            # Of the single model and the controls, the last one; of the competition, every generation.
            if PROTOCOLS[protocol].against or generation == last[protocol]:
                size = sizes.get((protocol, generation))
                title = PROTOCOLS[protocol].title
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


def _sizes(generations: pd.DataFrame) -> dict[tuple[str, int], int]:
    """(protocol, generation) -> number of comments, for the single models."""
    single = generations[generations["protocol"] == "single"].groupby("generation")["training_comments"].first()
    return {("single", int(generation)): int(count) for generation, count in single.items()}


def _tick(protocol: str, generation: int, sizes: dict[tuple[str, int], int]) -> str:
    short = PROTOCOLS[protocol].short
    return short if protocol == "base" else f"{short} {sizes.get((protocol, generation), generation)}"


def _errors(values: Any, low: Any, high: Any) -> np.ndarray:
    """Distances to both ends of the intervals: (2, n). A bootstrap interval need not hold the value by a hair."""
    values, low, high = (np.asarray(ends, dtype=float) for ends in (values, low, high))
    return np.maximum([values - low, high - values], 0)


def _open_mark(marker: str, size: float) -> dict[str, Any]:
    return {
        "marker": marker,
        "markersize": size,
        "markerfacecolor": "white",
        "markeredgecolor": "black",
        "markeredgewidth": 0.7,
    }


def _short(name: str) -> str:
    return _plain(textwrap.shorten(name, 28, placeholder=" ..."))


def _plain(text: str) -> str:
    """Without mathematics: matplotlib takes what stands between two dollar signs for a formula."""
    return text.replace("$", r"\$")
