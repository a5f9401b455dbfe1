"""The tables of a run: sampled comments, models by generation, and each target's answer with its intervals.

comments.csv is the record: everything else derives from it and from neighbourhoods.csv. A finished game is a file with
its rows of these two tables, and of what comments.csv does not say (draws).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiment.files import ROOT
from experiment.run_folder import load_arrays, save_arrays
from experiment.statistics import mean_interval
from experiment.tables import read_table as read_any_table
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.recipes import Averaged, Sampled, Tuned
from point_in_space_sim.engine.sampling import distinct_2
from point_in_space_sim.pool import Pool
from point_in_space_sim.protocols import PROTOCOLS, Draw, derived_seed
from point_in_space_sim.target import Neighbourhood, distances_to

RESAMPLES = 4000
MODEL = ["emotion", "protocol", "generation", "variant", "seed", "role"]
"""The columns that name one sample of one model."""

DRAWS = ["training_comments", "kept", "broken"]
"""What comments.csv does not say of a sample and generations.csv does."""

TEXT = {"text": str, "emotion": str, "protocol": str, "role": str, "writes": str}
Tables = dict[str, pd.DataFrame]


def game_tables(
    neighbourhood: Neighbourhood,
    pool: Pool,
    texts: Sequence[str],
    vectors: np.ndarray,
    seed: int,
    drawn: Sequence[tuple[Draw, Sampled]],
) -> Tables:
    """A finished game's rows of comments, draws and neighbourhoods, and of users where it has them.

    texts, vectors: the corpus's.
    """
    emotion = neighbourhood.target.name
    tables = {
        "comments": comment_table(emotion, neighbourhood.centroid, seed, drawn),
        "draws": draw_table(emotion, seed, drawn),
        "neighbourhoods": neighbourhood_table(neighbourhood, texts, vectors),
    }
    return tables | ({"users": user_table(emotion, seed, pool, texts)} if pool.users else {})


def user_table(emotion: str, seed: int, pool: Pool, texts: Sequence[str]) -> pd.DataFrame:
    """users.csv: a row a comment of a user's. writes: what the comments are near, the target or another emotion."""
    rows = [
        [emotion, seed, number, user.writes, user.on_target, texts[i]]
        for number, user in enumerate(pool.users, start=1)
        for i in user.members
    ]
    return pd.DataFrame(rows, columns=["emotion", "seed", "user", "writes", "on_target", "text"])


def save_game(path: Path, tables: Tables) -> None:
    arrays = {
        f"{name}/{column}": values.to_numpy(dtype=str if column in TEXT else None)
        for name, table in tables.items()
        for column, values in table.items()
    }
    save_arrays(path, arrays)


def load_game(path: Path) -> Tables | None:
    """What save_game wrote, every number exactly; None where there is none that can be read."""
    tables: dict[str, dict[str, np.ndarray]] = {}
    for key, values in (load_arrays(path) or {}).items():
        name, _, column = key.partition("/")
        tables.setdefault(name, {})[column] = values.astype(object) if column in TEXT else values
    return {name: pd.DataFrame(columns) for name, columns in tables.items()} or None


def finished_targets(folder: Path, seeds: Iterable[int]) -> dict[str, list[Tables]]:
    """The games of every target whose games with all these seeds are finished, emotions first, in their order."""
    games: dict[str, dict[int, Tables]] = {}
    for path in sorted(folder.glob("[!.]*.npz")):
        if (game := load_game(path)) is not None:
            draws = game["draws"]
            games.setdefault(draws["emotion"].iloc[0], {})[int(draws["seed"].iloc[0])] = game
    names = [*(emotion for emotion in EMOTIONS if emotion in games), *sorted(games.keys() - set(EMOTIONS))]
    seeds = list(seeds)
    return {name: [games[name][seed] for seed in seeds] for name in names if games[name].keys() >= set(seeds)}


def run_tables(games: Sequence[Sequence[Tables]]) -> Tables:
    """comments, generations, neighbourhoods, summary and, where there are any, users of a run. games: each target's."""
    comments, draws = (pd.concat([game[name] for own in games for game in own]) for name in ("comments", "draws"))
    comments, draws = comments.reset_index(drop=True), draws.reset_index(drop=True)
    # A target has one neighbourhood, whatever the seed.
    neighbourhoods = pd.concat([own[0]["neighbourhoods"] for own in games], ignore_index=True)
    generations = generation_table(comments, draws, neighbourhoods)
    summary = summary_table(comments, generations, neighbourhoods)
    tables = {
        "comments": comments,
        "generations": generations,
        "neighbourhoods": neighbourhoods,
        "summary": summary,
    }
    users = [game["users"] for own in games for game in own if "users" in game]
    return tables | ({"users": pd.concat(users, ignore_index=True)} if users else {})


def comment_table(emotion: str, centroid: np.ndarray, seed: int, drawn: Sequence[tuple[Draw, Sampled]]) -> pd.DataFrame:
    """comments.csv: one row a sampled comment. Probabilities have 4 decimals, distances to the centroid 6."""
    tables = []
    for draw, sample in drawn:
        table = pd.DataFrame(np.round(sample.vectors.astype(np.float64), 4), columns=list(EMOTIONS))
        named = dict(zip(MODEL, [emotion, draw.protocol, draw.generation, draw.variant, seed, draw.role], strict=True))
        for position, (column, value) in enumerate({**named, "text": list(sample.texts)}.items()):
            table.insert(position, column, value)
        table["distance"] = np.round(distances_to(centroid, sample.vectors), 6)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def draw_table(emotion: str, seed: int, drawn: Sequence[tuple[Draw, Sampled]]) -> pd.DataFrame:
    """What a sample was drawn from: how many comments the model was tuned on in its generation, kept or not."""
    rows = []
    for draw, sample in drawn:
        models = draw.model.models if isinstance(draw.model, Averaged) else (draw.model,)
        tuned_on = sum(len(model.texts) for model in models if isinstance(model, Tuned))
        rows.append(
            [emotion, draw.protocol, draw.generation, draw.variant, seed, draw.role, tuned_on, draw.kept, sample.broken]
        )
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
    near = neighbourhoods[neighbourhoods["rank"] > 0]
    centroids = near.groupby("emotion", sort=False)[list(EMOTIONS)].mean()
    # Samples have single spaces.
    known = {emotion: {" ".join(text.split()) for text in own["text"]} for emotion, own in near.groupby("emotion")}
    rows = []
    for row in draws.to_dict("records"):
        key = tuple(row[column] for column in MODEL)
        sample = groups[key]
        distances = sample["distance"].to_numpy()
        generator = np.random.default_rng(derived_seed(row["seed"], "interval", *map(str, key)))
        low, high = interval(resampled_means(distances[None], *bootstrap_indices((1, len(distances)), generator)))
        centre = sample[list(EMOTIONS)].mean() - centroids.loc[row["emotion"]]
        rows.append(
            {
                **{column: row[column] for column in [*MODEL, "training_comments"]},
                "mean_distance": distances.mean(),
                "interval_low": low,
                "interval_high": high,
                "kept": row["kept"],
                "centre_distance": float(np.linalg.norm(centre)),
                "distinct_2": distinct_2(sample["text"].tolist()),
                "broken": row["broken"],
                "copied": sample["text"].isin(known[row["emotion"]]).mean(),
            }
        )
    return pd.DataFrame(rows).round(6)


def bootstrap_indices(shape: tuple[int, ...], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of seeds (RESAMPLES, seeds) and of comments (RESAMPLES, seeds, n) for a two-level bootstrap.

    Arrays that are resampled by the same indices are resampled in pairs.
    """
    seeds = generator.integers(shape[0], size=(RESAMPLES, shape[0]))
    return seeds, generator.integers(shape[1], size=(RESAMPLES, *shape))


def resampled_means(values: np.ndarray, seeds: np.ndarray, comments: np.ndarray) -> np.ndarray:
    """Means (resamples,) of values (seeds, n) resampled by bootstrap_indices.

    Seeds drawn with replacement from S vary less than the seeds they stand for, by (S - 1) / S: their part of the
    deviation from the mean is stretched by the root of its inverse (Davison and Hinkley, 1997, section 3.8). With one
    seed there is none, and the interval is over comments alone.
    """
    drawn = values[seeds[:, :, None], comments].mean(axis=(1, 2))
    if len(values) == 1:
        return drawn
    between = values.mean(axis=1)[seeds].mean(axis=1)
    stretch = np.sqrt(len(values) / (len(values) - 1))
    return drawn + (stretch - 1) * (between - values.mean())


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap values."""
    low, high = np.quantile(values, [0.025, 0.975])
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
        protocol: resampled_means(values, drawn_seeds, drawn_comments) for protocol, values in observed.items()
    }
    row: dict[str, Any] = {"emotion": emotion, "seeds": len(seeds)}

    def put(name: str, value: float, drawn: np.ndarray) -> None:
        row[name] = value
        row[f"{ends_of(name)}_low"], row[f"{ends_of(name)}_high"] = interval(drawn)

    for protocol in last:
        put(f"{protocol}_distance", means[protocol], resampled[protocol])
    put("reduction_percent", reduction(means), reduction(resampled))
    for protocol, other in comparisons(list(last)):
        put(f"{protocol}_minus_{other}", means[protocol] - means[other], resampled[protocol] - resampled[other])
    # The sample that chose the winner, beside the fresh one of the same model: comments are not paired, seeds are.
    for protocol in comments.loc[comments["role"] == "selection", "protocol"].unique():
        selection = distances(protocol, "selection")
        row[f"{protocol}_selection_distance"] = selection.mean()
        _, own_comments = bootstrap_indices(selection.shape, generator)
        difference = resampled[protocol] - resampled_means(selection, drawn_seeds, own_comments)
        put(f"{protocol}_fresh_minus_selection", means[protocol] - selection.mean(), difference)
    row["neighbourhood_distance"] = neighbourhood.loc[neighbourhood["rank"] > 0, "distance"].mean()
    final = generations[generations["role"] == "report"]
    for protocol in last:
        own = final[(final["protocol"] == protocol) & (final["generation"] == last[protocol])]
        for column in ("distinct_2", "broken", "copied"):
            row[f"{protocol}_{column}"] = own[column].mean()
    return row


def comparisons(protocols: Sequence[str]) -> list[tuple[str, str]]:
    """(protocol, what it is compared with) for all of these that are compared."""
    return [(name, other) for name in protocols for other in PROTOCOLS[name].against if other in protocols]


def reduction(distances: "dict[str, Any]") -> Any:
    """By how many per cent competition's distance is less than the single model's; numbers or arrays by protocol."""
    return 100 * (distances["single"] - distances["multi"]) / distances["single"]


def ends_of(column: str) -> str:
    """What the columns with the ends of an estimate's interval begin with."""
    return column.removesuffix("_distance").removesuffix("_percent")


def summary_table(comments: pd.DataFrame, generations: pd.DataFrame, neighbourhoods: pd.DataFrame) -> pd.DataFrame:
    """summary.csv: one row a target."""
    rows = []
    for emotion, own in comments.groupby("emotion", sort=False):
        rows.append(
            summary_row(
                own,
                generations[generations["emotion"] == emotion],
                neighbourhoods[neighbourhoods["emotion"] == emotion],
            )
        )
    return pd.DataFrame(rows).round(6)


def answers(summary: pd.DataFrame) -> list[str]:
    """summary.csv's columns that are estimates with an interval."""
    return [column for column in summary if f"{ends_of(column)}_low" in summary]


def overall(summary: pd.DataFrame) -> dict[str, object]:
    """The answer over all targets: means with 95 % t-intervals (targets as the units; none for a single target)."""
    answer: dict[str, object] = {"targets": len(summary)}
    for column in answers(summary):
        values = summary[column].to_numpy()
        answer[column] = round(float(values.mean()), 4)
        if len(values) > 1:
            answer[f"{column}_interval"] = [round(float(end), 4) for end in mean_interval(values)[1:]]
    return answer


def answer_in_words(summary: pd.DataFrame) -> str:
    """One sentence: what competition came to."""
    mean = summary[answers(summary)].mean()
    if len(summary) == 1:
        on, low, high = summary["emotion"][0], summary["reduction_low"][0], summary["reduction_high"][0]
    else:
        on, (low, high) = f"{len(summary)} targets", mean_interval(summary["reduction_percent"].to_numpy())[1:]
    others = [
        f"{PROTOCOLS[name].short} {mean[f'{name}_distance']:.3f}"
        for name in played(summary)
        if name not in ("base", "single", "multi")
    ]
    first = (
        f"{on}: distance {mean['single_distance']:.3f} with one model, {mean['multi_distance']:.3f} with competing "
        f"variants, {mean['reduction_percent']:.1f} % [{low:.1f}, {high:.1f}] less"
    )
    return "; ".join([first, *([", ".join(others)] if others else [])])


def played(summary: pd.DataFrame) -> list[str]:
    """The protocols of a run, in the registry's order."""
    return [name for name in PROTOCOLS if f"{name}_distance" in summary]


def published() -> pd.DataFrame:
    """The study's published distances by emotion (data/study/README.md), with their reduction by competition.

    Columns: emotion, neighbourhood, single_33, single_66, single_100, multi_1, multi_2, multi_3, reduction_percent.
    """
    table = pd.read_csv(ROOT / "data" / "study" / "point_in_space.csv")
    table["reduction_percent"] = reduction({"single": table["single_100"], "multi": table["multi_3"]})
    return table


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """A run's table, every number exactly, and texts as they are."""
    return read_any_table(folder, name, keep_default_na=False, dtype=TEXT)
