"""What report.html says of a run: the question, the answer, the captions, the tables and the sampled comments."""

import math
from typing import Any

import pandas as pd

from experiment.report import (
    Compared,
    Estimate,
    Illustration,
    Page,
    Sample,
    Table,
    Value,
    estimates,
    format_number,
    words,
)
from experiment.statistics import mean_interval
from point_in_space_sim.protocols import ALWAYS, PROTOCOLS
from point_in_space_sim.results import comparisons, ends_of, overall, played, published

COMMENTS_SHOWN = 5
FIGURES = (
    Illustration(
        "single_against_multi",
        "One model against competing variants",
        "Left: mean distance of fresh comments to the neighbourhood's centroid, one model tuned on all neighbours "
        "against the last winner of the competition. Right: by how much competition reduces it. Bars: 95 % bootstrap "
        "intervals over comments and, where there are several, seeds; of the mean, Student's over targets. Open marks: "
        "what the study published for all of its 28 emotions, with another base model and mapper.",
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
        "controls",
        "Competition against the controls",
        "Competition minus the single model and minus each control, comment by comment. Below 0, competition is "
        "closer. Bars: 95 % intervals.",
        "Dot plots of paired differences between the competition and the single model and each control.",
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
    controls = [name for name in played(summary) if name not in ALWAYS]
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
            "reported. Also played: "
            + ("; ".join(PROTOCOLS[name].title for name in controls) or "nothing else")
            + ". Every protocol's variants are tuned on as many comments.",
        ],
        figures=FIGURES,
        tables=[published_table(summary), summary_table(summary), generations_table(generations)],
        samples=sampled(comments, neighbourhoods),
        samples_note=f"The first {COMMENTS_SHOWN} comments of each reported sample of the first seed, as drawn, not "
        "picked, with their distance to the centroid. They are what a language model and strangers wrote.",
        files=FILES,
        compared=Compared(
            "generations",
            ["protocol"],
            ["emotion", "seed"],
            {"mean_distance": -1},
            where={"role": "report"},
            last="generation",
            breakdown="emotion",
        ),
    )


def answer(summary: pd.DataFrame) -> list[str]:
    """Whether competition came closer than a single model, and than the controls."""
    means = overall(summary)

    def of(column: str) -> Estimate:
        return _of(summary.iloc[0], column) if len(summary) == 1 else _estimate(means, column)

    reduction = of("reduction_percent")
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
    others = [
        f"{PROTOCOLS[name].short} minus {PROTOCOLS[other].short} {words(of(f'{name}_minus_{other}'), 3)}"
        for name, other in comparisons(played(summary))
    ]
    base, near = summary["base_distance"].mean(), summary["neighbourhood_distance"].mean()
    scale = f"For scale: the base model lies at {base:.3f}, the neighbourhood's own comments at {near:.3f}."
    return [first, f"Mean distances: {'; '.join(others)} (below 0, the first is closer).", scale]


def published_table(summary: pd.DataFrame) -> Table:
    """Our means beside the study's, over the same emotions and over all of its own."""
    study, means = published(), overall(summary)
    same = study[study["emotion"].isin(summary["emotion"])]
    ours = [_estimate(means, column) for column in ("single_distance", "multi_distance", "reduction_percent")]
    rows: list[list[Value]] = [["this run", len(summary), *ours]]
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


def summary_table(summary: pd.DataFrame) -> Table:
    protocols = played(summary)
    pairs = comparisons(protocols)
    choosing = [name for name in protocols if f"{name}_fresh_minus_selection" in summary]
    rows = [
        [
            row["emotion"],
            *(_of(row, f"{name}_distance") for name in protocols),
            _of(row, "reduction_percent"),
            *(_of(row, f"{name}_minus_{other}") for name, other in pairs),
            *(_of(row, f"{name}_fresh_minus_selection") for name in choosing),
            row["neighbourhood_distance"],
        ]
        for row in summary.to_dict("records")
    ]
    columns = [
        "target",
        *protocols,
        "reduction (%)",
        *(f"{name} − {other}" for name, other in pairs),
        *(f"{name}: fresh − choosing sample" for name in choosing),
        "neighbourhood",
    ]
    caption = (
        "Mean distance of fresh comments to the centroid, last model of each protocol ("
        + "; ".join(f"{name}: {PROTOCOLS[name].title}" for name in protocols if name not in PROTOCOLS[name].title)
        + "). 95 % bootstrap intervals over comments and, where there are several, seeds; differences are paired."
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


def _of(row: Any, column: str) -> Estimate:
    return estimates(row, column, f"{ends_of(column)}_low", f"{ends_of(column)}_high")


def _estimate(means: dict[str, Any], column: str) -> Estimate:
    low, high = means.get(f"{column}_interval", (math.nan, math.nan))
    return Estimate(float(means[column]), low, high)
