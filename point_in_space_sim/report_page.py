"""What report.html says of a run: the question, the answer, the captions, the tables and the sampled comments."""

import math
from typing import Any

import pandas as pd

from experiment.report import Estimate, Illustration, Page, Sample, Table, Value, estimates, format_number, words
from point_in_space_sim.plots import LONG, PUBLISHED_MEAN_REDUCTION, PUBLISHED_MULTI, PUBLISHED_SINGLE
from point_in_space_sim.results import overall

COMMENTS_SHOWN = 5
FIGURES = (
    Illustration(
        "single_against_multi",
        "One model against competing variants",
        "Left: mean distance of fresh comments to the neighbourhood's centroid, one model tuned on all neighbours "
        "against the last winner of the competition. Right: by how much competition reduces it. Bars: 95 % bootstrap "
        "intervals over comments and, where there are several, seeds; of the mean, Student's over targets. Open marks: "
        "what the study published, with another base model and mapper.",
        "Dot plot of the mean distance with one model and with competing variants for each target, and of the "
        "reduction in per cent.",
    ),
    Illustration(
        "distances",
        "How far comments lie from the centroid",
        "All fresh comments of every model, a panel a target. The grey band is the neighbourhood's own spread: a model "
        "that writes just like it would lie on it.",
        "Box plots of comments' distance to the centroid, by protocol and generation, a panel for each target.",
    ),
    Illustration(
        "controls",
        "Competition against the controls",
        "Competition minus the single model, minus a random part without competition, and minus the averaged adapters, "
        "comment by comment. Below 0, competition is closer. Bars: 95 % intervals.",
        "Dot plots of paired differences between the competition and the single model, the random control and the "
        "averaged control.",
    ),
    Illustration(
        "movement",
        "Movement through emotion space",
        "Comments and their means in the first two principal components of a target's panel (first seed): from the "
        "base model, generation by generation, towards the centroid.",
        "Scatter plots of comments by generation in two principal components, with the path of the means and the "
        "centroid.",
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
    ("neighbourhoods.csv", "the targets and their nearest comments"),
    ("comments.md", "more of the sampled comments, to read"),
    ("run.json", "settings, versions, hashes, times"),
)


def report_page(
    comments: pd.DataFrame,
    generations: pd.DataFrame,
    neighbourhoods: pd.DataFrame,
    summary: pd.DataFrame,
    base_model: str,
    mapper: str,
) -> Page:
    """From the run's tables. base_model, mapper: their names."""
    targets, seeds = len(summary), comments["seed"].nunique()
    multi = generations[(generations["protocol"] == "multi") & (generations["role"] == "selection")]
    variants = multi.groupby(["emotion", "seed", "generation"]).size().max()
    samples = comments.groupby(["emotion", "protocol", "generation", "variant", "seed", "role"]).size().max()
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
            "The single model is tuned on all neighbours. The competition runs "
            f"{multi['generation'].max()} generations of {variants} variants, each tuned on a part of its own; "
            f"{samples} comments are sampled from each variant, the closest is kept and sampled again for what is "
            "reported. Controls with as many comments a variant: a random part without competition, and the "
            "variants' adapters averaged.",
        ],
        figures=FIGURES,
        tables=[published_table(summary), summary_table(summary), generations_table(generations)],
        samples=sampled(comments, neighbourhoods),
        samples_note=f"The first {COMMENTS_SHOWN} comments of each reported sample of the first seed, as drawn, not "
        "picked, with their distance to the centroid. They are what a language model and strangers wrote.",
        files=FILES,
    )


def answer(summary: pd.DataFrame) -> list[str]:
    """Whether competition came closer than a single model, and than the controls."""
    means = overall(summary)
    reduction, *controls = (
        estimates(
            summary.iloc[0], column, f"{column.removesuffix('_percent')}_low", f"{column.removesuffix('_percent')}_high"
        )
        if len(summary) == 1
        else _estimate(means, column)
        for column in ("reduction_percent", "multi_minus_sequential", "multi_minus_averaged")
    )
    units = "targets"
    if len(summary) == 1:
        units = "seeds and comments" if summary["seeds"].iloc[0] > 1 else "comments, one seed"
    compared = (
        "closer than"
        if reduction.low > 0
        else "less close than"
        if reduction.high < 0
        else ("neither clearly closer nor clearly farther than")
    )
    on = summary["emotion"].iloc[0] if len(summary) == 1 else f"{len(summary)} targets"
    first = (
        f"On {on}, competing variants ended {compared} a single model: mean distance "
        f"{means['multi_distance']:.3f} against {means['single_distance']:.3f}, a reduction of {words(reduction, 1)} % "
        f"(95 % interval over {units})."
    )
    others = (
        f"Competition minus a random pick without competition: {words(controls[0], 3)}; minus the averaged adapters: "
        f"{words(controls[1], 3)} (below 0, competition is closer)."
    )
    base, near = summary["base_distance"].mean(), summary["neighbourhood_distance"].mean()
    scale = f"For scale: the base model lies at {base:.3f}, the neighbourhood's own comments at {near:.3f}."
    return [first, others, scale]


def published_table(summary: pd.DataFrame) -> Table:
    means = overall(summary)
    ours = [_estimate(means, column) for column in ("single_distance", "multi_distance", "reduction_percent")]
    rows: list[list[Value]] = [
        ["this run", len(summary), *ours],
        ["Crowd-SFT (arXiv 2506.04063)", 28, PUBLISHED_SINGLE, PUBLISHED_MULTI, PUBLISHED_MEAN_REDUCTION],
    ]
    caption = (
        "Means over targets, 95 % intervals where there are several targets. The study tuned gpt-3.5-turbo through an "
        "API and mapped with RoBERTa: compare directions and sizes, not digits."
    )
    return Table("Beside the published study", caption, ["source", "targets", "single", "multi", "reduction (%)"], rows)


def summary_table(summary: pd.DataFrame) -> Table:
    protocols = ("base", "single", "multi", "sequential", "averaged")
    rows = [
        [
            row["emotion"],
            *(estimates(row, f"{name}_distance", f"{name}_low", f"{name}_high") for name in protocols),
            estimates(row, "reduction_percent", "reduction_low", "reduction_high"),
            *(estimates(row, f"multi_minus_{name}") for name in ("single", "sequential", "averaged")),
            estimates(row, "fresh_minus_selection"),
            row["neighbourhood_distance"],
        ]
        for row in summary.to_dict("records")
    ]
    columns = [
        "target",
        *protocols,
        "reduction (%)",
        "multi − single",
        "multi − sequential",
        "multi − averaged",
        "fresh − choosing sample",
        "neighbourhood",
    ]
    caption = (
        "Mean distance of fresh comments to the centroid, last model of each protocol. sequential: a random part, no "
        "competition; averaged: the variants' adapters averaged, brought back to the same rank. 95 % bootstrap "
        "intervals over comments and, where there are several, seeds; differences are paired."
    )
    return Table("Targets", caption, columns, rows, "summary.csv")


def generations_table(generations: pd.DataFrame) -> Table:
    report = generations[generations["role"] == "report"]
    rows = [
        [
            row["emotion"],
            row["seed"],
            row["protocol"],
            row["generation"],
            row["training_comments"],
            Estimate(row["mean_distance"], row["interval_low"], row["interval_high"]),
            row["centre_distance"],
            row["distinct_2"],
            row["broken"],
            row["copied"],
        ]
        for row in report.to_dict("records")
    ]
    columns = [
        "target",
        "seed",
        "protocol",
        "generation",
        "tuned on",
        "mean distance",
        "centre distance",
        "distinct pairs",
        "broken",
        "copied",
    ]
    caption = (
        "Fresh samples of every kept model. tuned on: comments in that generation. centre distance: of the sample's "
        "mean vector. distinct pairs: share of distinct word pairs. broken: share empty or cut off. copied: share that "
        "repeats a comment of the neighbourhood."
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
            if protocol == "multi" or generation == last[protocol]:
                several = protocol not in ("base", "single")
                title = LONG[protocol] + (f", generation {generation}" if several else "")
                shown.append(_sample(title, sample))
        samples[str(emotion)] = shown
    return samples


def _sample(title: str, table: pd.DataFrame) -> Sample:
    chosen = table.head(COMMENTS_SHOWN)
    mean = format_number(float(table["distance"].mean()), 2)
    texts = [(float(distance), str(said)) for distance, said in zip(chosen["distance"], chosen["text"], strict=True)]
    return Sample(f"{title[0].upper()}{title[1:]} (mean {mean})", texts)


def _estimate(means: dict[str, Any], column: str) -> Estimate:
    low, high = means.get(f"{column}_interval", (math.nan, math.nan))
    return Estimate(float(means[column]), low, high)
