"""What report.html says of a run: the question, the answer, the captions, the tables and the sampled comments."""

from collections.abc import Collection, Sequence

import pandas as pd

from experiment.report import (
    Compared,
    Estimate,
    Illustration,
    Page,
    Sample,
    Table,
    Value,
    estimate_of,
    format_number,
    words,
)
from experiment.statistics import mean_interval
from point_in_space_sim.measures import MEASURES
from point_in_space_sim.protocols import ALWAYS, PROTOCOLS
from point_in_space_sim.results import (
    DESCRIPTIONS,
    comparisons,
    headline,
    overall,
    pick,
    played,
    published,
)

COMMENTS_SHOWN = 5
FIGURES = (
    Illustration(
        "competition",
        "Competition against its comparators",
        "A column a measure. Above: the last model of every protocol. Below: differences of competition, by plus and "
        "by comma selection, to each comparator, comment by comment. Marks: means over targets with Student's 95 % "
        "intervals (of a single target, its own); dots: the targets. Of the three distances less is nearer; a model "
        "that repeats itself may have a small mean distance, but a large energy distance and few distinct texts.",
        "Dot plots of four measures for every protocol, and of paired differences between competition and the others.",
    ),
    Illustration(
        "generations",
        "Generation by generation",
        "The measures of the kept model after each generation, means over targets with 95 % intervals; across, the "
        "single models.",
        "Lines of four measures by generation for each protocol that has generations.",
    ),
    Illustration(
        "single_against_multi",
        "One model against competing variants",
        "The study's own comparison. Left: mean distance of fresh comments to the neighbourhood's centroid, one model "
        "tuned on all neighbours against the last winner by comma selection. Right: by how much competition reduces "
        "it. Bars: Student's 95 % intervals, over comments or, where there are several, seeds; of the mean, over "
        "targets. Open marks: what the study published for all of its 28 emotions, with another base model and mapper.",
        "Dot plot of the mean distance with one model and with competing variants for each target, and of the "
        "reduction in per cent.",
    ),
    Illustration(
        "distances",
        "How far comments lie from the centroid",
        "All fresh comments of every model, a panel a target: of the single models by the comments they were tuned on, "
        "of the other protocols by generation. The grey band is the neighbourhood's own spread: a model "
        "that writes just like it would lie on it.",
        "Box plots of comments' distance to the centroid, by protocol and generation, a panel for each target.",
    ),
    Illustration(
        "movement",
        "Movement through emotion space",
        "Where the mean of each model's comments lies around the centroid (first seed): across, along the line from "
        "the base model's mean, which lies far to the left; up, the direction at right angles to it in which they "
        "differ most. Larger marks are later models; ellipses are 95 % regions of the means.",
        "A plane for each target with the centroid and the path of the models' means around it.",
    ),
    Illustration(
        "selection",
        "Winner's curse",
        "Each kept variant's distance on the sample that chose it against that on a fresh one. Above the diagonal the "
        "choosing sample flattered it; all distances reported here are of fresh samples.",
        "Scatter plot of the distance of kept variants on a fresh sample against the sample that chose them.",
    ),
)
FILES = (
    ("summary.csv", "the answer for each target, with intervals"),
    ("generations.csv", "a row a sample of a model"),
    ("comments.csv", "every sampled comment with its 28 probabilities and distance"),
    ("users.csv", "who holds which comments, where the pool belongs to users"),
    ("neighbourhoods.csv", "the targets and their nearest comments"),
    ("comments.md", "more of the sampled comments, to read"),
    ("run.json", "settings, versions, hashes, times"),
)


def report_page(
    comments: pd.DataFrame,
    generations: pd.DataFrame,
    neighbourhoods: pd.DataFrame,
    summary: pd.DataFrame,
    drawn: Sequence[str],
    base_model: str,
    mapper: str,
    written: Collection[str],
) -> Page:
    """From the run's tables. drawn: its figures' names. base_model, mapper: their names. written: the run's files."""
    targets, seeds = summary["emotion"].nunique(), comments["seed"].nunique()
    multi = generations[(generations["protocol"] == "multi") & (generations["role"] == "selection")]
    variants = multi.groupby(["emotion", "seed", "generation"]).size().max()
    samples = comments.groupby(["emotion", "protocol", "generation", "variant", "seed", "role"]).size().max()
    others = [name for name in played(summary) if name not in ALWAYS]
    return Page(
        experiment="point_in_space_sim",
        title="A point in emotion space",
        question="Does a language model that is tuned on comments near a point in emotion space come to write such "
        "comments, and do competing variants come closer than a single model?",
        answer=answer(summary),
        setting=[
            f"Base model {base_model}; the mapper {mapper} turns a comment into 28 emotion probabilities. A target's "
            f"neighbourhood is its {neighbourhoods['rank'].max()} nearest comments; the distance is that to their mean "
            f"(L2). {targets} target{'s' * (targets > 1)}, {seeds} seed{'s' * (seeds > 1)} each.",
            "The single model is tuned on the whole pool. The competition runs "
            f"{multi['generation'].max()} generations of {variants} variants, each tuned on a part of its own; "
            f"{samples} comments are sampled from each variant, the closest becomes the model (comma selection, the "
            "study's) or does so only if it is closer than the model (plus selection), and is sampled again for what "
            "is reported. Also played: "
            + ("; ".join(PROTOCOLS[name].title for name in others) or "nothing else")
            + ".",
        ],
        figures=[figure for figure in FIGURES if figure.name in drawn],
        tables=[
            levels_table(summary),
            differences_table(summary),
            published_table(summary),
            targets_table(summary),
            generations_table(generations),
        ],
        samples=sampled(comments, neighbourhoods),
        samples_note=f"The first {COMMENTS_SHOWN} comments of each reported sample of the first seed, as drawn, not "
        "picked, with their distance to the centroid. They are what a language model and strangers wrote.",
        files=[(file, what) for name, what in FILES for file in (name, f"{name}.gz") if file in (*written, "run.json")],
        compared=Compared(
            "generations",
            ["protocol"],
            ["emotion", "seed"],
            {measure.column: measure.better for measure in MEASURES.values()},
            where={"role": "report"},
            last="generation",
            breakdown="emotion",
        ),
    )


def answer(summary: pd.DataFrame) -> list[str]:
    """Whether competition came closer than the best single model, and than the others, by all measures."""
    means, protocols = overall(summary), played(summary)
    targets = summary["emotion"].unique()
    several = len(targets) > 1
    on = f"{len(targets)} targets" if several else str(targets[0])
    units = "targets" if several else "seeds" if summary["seeds"].max() > 1 else "comments, one seed"
    first, against = headline(protocols)
    row = pick(means, "distance", first, against).iloc[0]
    verdict = (
        "closer than"
        if row["high"] < 0
        else "less close than"
        if row["low"] > 0
        else "neither clearly closer nor clearly farther than"
    )
    lines = [
        f"On {on}, competition ({PROTOCOLS[first].title}) ended {verdict} {_article(against)}: "
        f"{_all_measures(means, first, against)} (first minus second, 95 % intervals over {units})."
    ]
    for name, other in comparisons(protocols):
        if (name, other) != (first, against) and (name == first or other == "single"):
            lines.append(
                f"{PROTOCOLS[name].short} minus {PROTOCOLS[other].short}: {_all_measures(means, name, other)}."
            )
    base, near = (pick(means, "distance", name)["value"].item() for name in ("base", "neighbourhood"))
    reduced = words(estimate_of(pick(means, "reduction_percent", "multi", "single").iloc[0]), 1)
    lines.append(
        f"Comma selection, the study's, reduces the single model's mean distance by {reduced} %. For scale: the base "
        f"model lies at {base:.3f}, the neighbourhood's own comments at {near:.3f}."
    )
    return lines


def _article(protocol: str) -> str:
    return f"the {PROTOCOLS[protocol].title}"


def _all_measures(means: pd.DataFrame, protocol: str, against: str) -> str:
    return "; ".join(
        f"{measure.short} {words(estimate_of(pick(means, name, protocol, against).iloc[0]), 3)}"
        for name, measure in MEASURES.items()
    )


def levels_table(summary: pd.DataFrame) -> Table:
    means = overall(summary)
    rows: list[list[Value]] = []
    for name in played(summary):
        measured = [estimate_of(pick(means, measure, name).iloc[0]) for measure in MEASURES]
        described = [float(pick(means, column, name)["value"].item()) for column in DESCRIPTIONS]
        rows.append([PROTOCOLS[name].title, *measured, *described])
    caption = (
        "The last model of every protocol: means over targets with 95 % intervals (of a single target, its own). "
        "distinct pairs: share of distinct word pairs. broken: share of comments that are empty or were cut off. "
        "copied: share that repeats a comment of the neighbourhood."
    )
    columns = ["protocol", *(measure.short for measure in MEASURES.values()), "distinct pairs", "broken", "copied"]
    return Table("Protocols", caption, columns, rows, "summary.csv")


def differences_table(summary: pd.DataFrame) -> Table:
    means = overall(summary)
    rows: list[list[Value]] = [
        [f"{name} − {other}", *(estimate_of(pick(means, measure, name, other).iloc[0]) for measure in MEASURES)]
        for name, other in comparisons(played(summary))
    ]
    caption = (
        "Differences between protocols, paired comment by comment, and means over targets with 95 % intervals. Below "
        "0, the first is closer; of distinct texts, above 0 it repeats itself less."
    )
    columns = ["difference", *(measure.short for measure in MEASURES.values())]
    return Table("Differences", caption, columns, rows, "summary.csv")


def published_table(summary: pd.DataFrame) -> Table:
    """Our means beside the study's, over the same emotions and over all of its own."""
    study, means = published(), overall(summary)
    targets = summary["emotion"].unique()
    same = study[study["emotion"].isin(targets)]
    said = [("distance", "single", ""), ("distance", "multi", ""), ("reduction_percent", "multi", "single")]
    ours = [estimate_of(pick(means, *which).iloc[0]) for which in said]
    rows: list[list[Value]] = [["this run", len(targets), *ours]]
    for name, table in (("the same emotions", same), ("all", study)):
        if len(table):
            columns = ("single_100", "multi_3", "reduction_percent")
            means_of = (Estimate(*map(float, mean_interval(table[column].to_numpy()))) for column in columns)
            rows.append([f"Crowd-SFT (arXiv 2506.04063), {name}", len(table), *means_of])
    caption = (
        "Means over targets, with Student's 95 % intervals where there are several. The reduction is the mean of the "
        "emotions' own. The study tuned gpt-3.5-turbo through an API and mapped with RoBERTa: compare directions and "
        "sizes, not digits. In its first generation the best of three variants was no nearer than its single model on "
        f"as many comments ({study['multi_1'].mean():.3f} against {study['single_33'].mean():.3f})."
    )
    return Table("Beside the published study", caption, ["source", "targets", "single", "multi", "reduction (%)"], rows)


def targets_table(summary: pd.DataFrame) -> Table:
    """A row a target: the mean distance of every protocol, and the answer in all measures."""
    protocols = played(summary)
    first, against = headline(protocols)
    rows: list[list[Value]] = []
    for emotion, own in summary.groupby("emotion", sort=False):
        distances = [estimate_of(pick(own, "distance", name).iloc[0]) for name in protocols]
        differences = [estimate_of(pick(own, measure, first, against).iloc[0]) for measure in MEASURES]
        curse = [estimate_of(pick(own, "distance", name, "selection").iloc[0]) for name in _choosing(summary)]
        near = pick(own, "distance", "neighbourhood")["value"].item()
        rows.append([str(emotion), *distances, *differences, *curse, float(near)])
    columns = [
        "target",
        *protocols,
        *(f"{first} − {against}: {measure.short}" for measure in MEASURES.values()),
        *(f"{name}: fresh − choosing sample" for name in _choosing(summary)),
        "neighbourhood",
    ]
    caption = (
        "Mean distance of fresh comments to the centroid, last model of each protocol ("
        + "; ".join(f"{name}: {PROTOCOLS[name].title}" for name in protocols if name not in PROTOCOLS[name].title)
        + "), and the differences that answer the question. 95 % intervals over comments, or, where there are several, "
        "over seeds, whose variance is pooled over the targets; differences are paired."
    )
    return Table("Targets", caption, columns, rows, "summary.csv")


def _choosing(summary: pd.DataFrame) -> list[str]:
    return [name for name in played(summary) if len(pick(summary, "distance", name, "selection"))]


def generations_table(generations: pd.DataFrame) -> Table:
    """A row a protocol and generation: means over targets, of seeds and chains together."""
    report = generations[generations["role"] == "report"]
    measures = [measure.column for measure in MEASURES.values()]
    rows: list[list[Value]] = []
    for (protocol, generation), own in report.groupby(["protocol", "generation"], sort=False):
        by_target = own.groupby("emotion")[measures].mean()
        estimates_of = [Estimate(*map(float, mean_interval(by_target[column].to_numpy()))) for column in measures]
        rows.append([str(protocol), int(generation), float(own["training_comments"].mean()), *estimates_of])
    columns = ["protocol", "generation", "tuned on", *(measure.short for measure in MEASURES.values())]
    caption = (
        "Fresh samples of every kept model, means over targets with 95 % intervals. tuned on: comments in that "
        "generation; of the single models, the generation counts the thirds."
    )
    return Table("Generations", caption, columns, rows, "generations.csv")


def sampled(comments: pd.DataFrame, neighbourhoods: pd.DataFrame) -> dict[str, list[Sample]]:
    """By target: its nearest neighbours, the base model, the single model, each generation and the last controls."""
    report = comments[(comments["role"] == "report") & (comments["seed"] == comments["seed"].min())]
    samples: dict[str, list[Sample]] = {}
    for emotion, own in report.groupby("emotion", sort=False):
        near = neighbourhoods[(neighbourhoods["emotion"] == emotion) & (neighbourhoods["rank"] > 0)]
        shown = [_sample("nearest of the neighbourhood", near)]
        last = own.groupby("protocol")["generation"].max()
        for (protocol, generation), sample in own.groupby(["protocol", "generation"], sort=False):
            if PROTOCOLS[protocol].against or generation == last[protocol]:
                several = protocol not in ("base", "single")
                title = PROTOCOLS[protocol].title + (f", generation {generation}" if several else "")
                shown.append(_sample(title, sample))
        samples[str(emotion)] = shown
    return samples


def _sample(title: str, table: pd.DataFrame) -> Sample:
    chosen = table.head(COMMENTS_SHOWN)
    mean = format_number(float(table["distance"].mean()), 2)
    texts = [(float(distance), str(said)) for distance, said in zip(chosen["distance"], chosen["text"], strict=True)]
    return Sample(f"{title[0].upper()}{title[1:]} (mean {mean})", texts)
