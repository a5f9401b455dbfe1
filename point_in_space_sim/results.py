"""The tables of a run: sampled comments, models by generation, and each target's answer with its intervals.

comments.csv is the record: everything else derives from it and from neighbourhoods.csv.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiment.files import replace_atomically
from experiment.statistics import mean_interval
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.protocols import Averaged, Batch, Draw, Tuned, derived_seed
from point_in_space_sim.sampling import distinct_2
from point_in_space_sim.target import Neighbourhood

RESAMPLES = 4000
MODEL = ["emotion", "protocol", "generation", "variant", "seed", "role"]
"""The columns that name one sample of one model."""

DRAWS = ["training_comments", "kept", "broken"]
"""What comments.csv does not say of a sample and generations.csv does."""


def comment_table(emotion: str, seed: int, drawn: Sequence[tuple[Draw, Batch]]) -> pd.DataFrame:
    """comments.csv: one row a sampled comment. Probabilities have 4 decimals, distances 6."""
    tables = []
    for draw, batch in drawn:
        table = pd.DataFrame(np.round(batch.vectors.astype(np.float64), 4), columns=list(EMOTIONS))
        named = dict(zip(MODEL, [emotion, draw.protocol, draw.generation, draw.variant, seed, draw.role], strict=True))
        for position, (column, value) in enumerate({**named, "text": list(batch.texts)}.items()):
            table.insert(position, column, value)
        table["distance"] = np.round(batch.distances, 6)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def draw_table(emotion: str, seed: int, drawn: Sequence[tuple[Draw, Batch]]) -> pd.DataFrame:
    """What a sample was drawn from: how many comments the model was tuned on in its generation, kept or not."""
    rows = []
    for draw, batch in drawn:
        models = draw.model.models if isinstance(draw.model, Averaged) else (draw.model,)
        tuned_on = sum(len(model.texts) for model in models if isinstance(model, Tuned))
        rows.append([emotion, draw.protocol, draw.generation, draw.variant, seed, draw.role,
                     tuned_on, draw.kept, batch.broken])  # fmt: skip
    return pd.DataFrame(rows, columns=MODEL + DRAWS)


def neighbourhood_table(neighbourhood: Neighbourhood, texts: Sequence[str], vectors: np.ndarray) -> pd.DataFrame:
    """neighbourhoods.csv: the target (rank 0, without a distance of its own) and its neighbours, nearest first."""
    target, members = neighbourhood.target, neighbourhood.members
    target_text = target.name if target.comment is None else texts[target.comment]
    table = pd.DataFrame(
        np.round(np.vstack([target.vector, vectors[members]]).astype(np.float64), 4), columns=list(EMOTIONS)
    )
    table.insert(0, "emotion", target.name)
    table.insert(1, "rank", np.arange(len(table)))
    table.insert(2, "text", [target_text, *(texts[member] for member in members)])
    from_target = np.linalg.norm(neighbourhood.centroid - target.vector.astype(np.float64))
    table["distance"] = np.round([from_target, *neighbourhood.distances], 6)
    return table


def generation_table(comments: pd.DataFrame, draws: pd.DataFrame, neighbourhoods: pd.DataFrame) -> pd.DataFrame:
    """generations.csv: one row a sample (a kept variant of the competition has two, one a role).

    mean_distance with its 95 % bootstrap interval over comments; centre_distance: of the sample's mean vector, that is
    how far off the centroid the model aims, apart from how much its comments spread. distinct_2: share of distinct word
    pairs. broken: share of comments that are empty or were cut off. copied: share of comments that are one of the
    neighbourhood's, word for word.
    """
    groups = dict(list(comments.groupby(MODEL, sort=False)))
    centroids = neighbourhoods[neighbourhoods["rank"] > 0].groupby("emotion", sort=False)[list(EMOTIONS)].mean()
    known = {emotion: set(own["text"]) for emotion, own in neighbourhoods.groupby("emotion")}
    rows = []
    for row in draws.to_dict("records"):
        key = tuple(row[column] for column in MODEL)
        sample = groups[key]
        distances = sample["distance"].to_numpy()
        generator = np.random.default_rng(derived_seed(row["seed"], "interval", *map(str, key)))
        low, high = interval(bootstrap(distances[None], generator).mean(axis=(1, 2)))
        centre = sample[list(EMOTIONS)].mean() - centroids.loc[row["emotion"]]
        rows.append({
            **{column: row[column] for column in [*MODEL, "training_comments"]},
            "mean_distance": distances.mean(), "interval_low": low, "interval_high": high, "kept": row["kept"],
            "centre_distance": float(np.linalg.norm(centre)),
            "distinct_2": distinct_2(sample["text"].tolist()), "broken": row["broken"],
            "copied": sample["text"].isin(known[row["emotion"]]).mean(),
        })  # fmt: skip
    return pd.DataFrame(rows).round(6)


def bootstrap(values: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """Resampled values (resamples, seeds, n) of values (seeds, n): seeds drawn with replacement, then their comments.

    Use `bootstrap_indices` where several arrays are to be resampled alike.
    """
    seeds, comments = bootstrap_indices(values.shape, generator, resamples)
    return values[seeds[:, :, None], comments]


def bootstrap_indices(
    shape: tuple[int, ...], generator: np.random.Generator, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of seeds (resamples, seeds) and of comments (resamples, seeds, n) for a two-level bootstrap."""
    seeds = generator.integers(shape[0], size=(resamples, shape[0]))
    return seeds, generator.integers(shape[1], size=(resamples, *shape))


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summary_row(comments: pd.DataFrame, generations: pd.DataFrame, neighbourhood: pd.DataFrame) -> dict[str, object]:
    """summary.csv's row of one target, from its rows of the other tables.

    All distances are means over fresh (report) samples of the protocols' last models. Intervals: 95 %, bootstrap over
    seeds and, within them, comments. The protocols' reported samples share their random streams, comment by comment,
    so they are resampled together (paired).
    """
    seeds = sorted(comments["seed"].unique())
    report = comments[comments["role"] == "report"]
    last = report.groupby("protocol", sort=False)["generation"].max().to_dict()

    def distances(protocol: str, role: str = "report") -> np.ndarray:
        """(seeds, n) of the protocol's last kept model."""
        rows = comments[(comments["protocol"] == protocol) & (comments["generation"] == last[protocol])]
        rows = rows[rows["role"] == role]
        if role == "selection":
            kept = generations[(generations["role"] == "selection") & generations["kept"]]
            rows = rows.merge(kept[MODEL], on=MODEL)
        return np.stack([rows.loc[rows["seed"] == seed, "distance"].to_numpy() for seed in seeds])

    observed = {protocol: distances(protocol) for protocol in last}
    emotion = str(comments["emotion"].iloc[0])
    generator = np.random.default_rng(derived_seed(int(seeds[0]), emotion, "summary"))
    drawn_seeds, drawn_comments = bootstrap_indices(observed["multi"].shape, generator)
    means = {protocol: values.mean() for protocol, values in observed.items()}
    resampled = {
        protocol: values[drawn_seeds[:, :, None], drawn_comments].mean(axis=(1, 2))
        for protocol, values in observed.items()
    }
    row: dict[str, object] = {"emotion": emotion, "seeds": len(seeds)}

    def put(name: str, statistic: Callable[[dict[str, float]], float], *, short: str | None = None) -> None:
        row[name] = statistic(means)
        row[f"{short or name}_low"], row[f"{short or name}_high"] = interval(statistic(resampled))  # type: ignore

    for protocol in last:
        put(f"{protocol}_distance", lambda mean, protocol=protocol: mean[protocol], short=protocol)  # type: ignore
    put("reduction_percent", lambda mean: 100 * (mean["single"] - mean["multi"]) / mean["single"], short="reduction")
    for other in ("single", "sequential", "averaged"):
        put(f"multi_minus_{other}", lambda mean, other=other: mean["multi"] - mean[other])  # type: ignore
    # The sample that chose the winner, beside the fresh one: independent draws, so not paired.
    selection = distances("multi", "selection")
    row["selection_distance"] = selection.mean()
    difference = resampled["multi"] - bootstrap(selection, generator).mean(axis=(1, 2))
    row["fresh_minus_selection"] = means["multi"] - selection.mean()
    row["fresh_minus_selection_low"], row["fresh_minus_selection_high"] = interval(difference)
    row["neighbourhood_distance"] = neighbourhood.loc[neighbourhood["rank"] > 0, "distance"].mean()
    final = generations[(generations["role"] == "report") & (generations["protocol"] == "multi")]
    final = final[final["generation"] == last["multi"]]
    for column in ("distinct_2", "broken", "copied"):
        row[f"multi_{column}"] = final[column].mean()
    return row


def summary_table(
    comments: pd.DataFrame, generations: pd.DataFrame, neighbourhoods: pd.DataFrame
) -> pd.DataFrame:
    """summary.csv: one row a target."""
    rows = []
    for emotion, own in comments.groupby("emotion", sort=False):
        rows.append(summary_row(own, generations[generations["emotion"] == emotion],
                                neighbourhoods[neighbourhoods["emotion"] == emotion]))  # fmt: skip
    return pd.DataFrame(rows).round(6)


ANSWERS = (
    "single_distance", "multi_distance", "sequential_distance", "averaged_distance", "reduction_percent",
    "multi_minus_single", "multi_minus_sequential", "multi_minus_averaged", "fresh_minus_selection",
)  # fmt: skip


def overall(summary: pd.DataFrame) -> dict[str, object]:
    """The answer over all targets: means with 95 % t-intervals (targets as the units; none for a single target)."""
    answer: dict[str, object] = {"targets": len(summary)}
    for column in ANSWERS:
        values = summary[column].to_numpy()
        answer[column] = round(float(values.mean()), 4)
        if len(values) > 1:
            answer[f"{column}_interval"] = [round(float(end), 4) for end in mean_interval(values)[1:]]
    return answer


def answer_in_words(summary: pd.DataFrame) -> str:
    """One sentence: what competition came to."""
    mean = summary[list(ANSWERS)].mean()
    if len(summary) == 1:
        on, low, high = summary["emotion"][0], summary["reduction_low"][0], summary["reduction_high"][0]
    else:
        on, (low, high) = f"{len(summary)} targets", mean_interval(summary["reduction_percent"].to_numpy())[1:]
    return (
        f"{on}: distance {mean['single_distance']:.3f} with one model, {mean['multi_distance']:.3f} with competing "
        f"variants, {mean['reduction_percent']:.1f} % [{low:.1f}, {high:.1f}] less; a random pick "
        f"{mean['sequential_distance']:.3f}, the average {mean['averaged_distance']:.3f}"
    )


def write_csv(table: pd.DataFrame, path: Path) -> None:
    with replace_atomically(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    """What write_csv wrote, every number exactly."""
    return pd.read_csv(path, keep_default_na=False, float_precision="round_trip", dtype={"text": str, "emotion": str})
