"""The tables of a run: sampled comments, models by generation, and each target's answer with its intervals.

comments.csv is the record: everything else derives from it and from neighbourhoods.csv. A finished game is a file with
its rows of these two tables, and of what comments.csv does not say (draws).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiment.files import ROOT
from experiment.run_folder import load_arrays, save_arrays
from experiment.statistics import mean_interval, pooled_interval
from experiment.tables import read_table as read_any_table
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.recipes import Averaged, Sampled, Tuned
from point_in_space_sim.engine.sampling import distinct_2
from point_in_space_sim.measures import MEASURES
from point_in_space_sim.pool import Pool
from point_in_space_sim.protocols import PROTOCOLS, Draw
from point_in_space_sim.target import Neighbourhood, distances_to

MODEL = ["emotion", "protocol", "generation", "variant", "seed", "role"]
"""The columns that name one sample of one model."""

QUANTITY = ["measure", "protocol", "against"]
"""The columns that name one estimate of summary.csv."""

DESCRIPTIONS = ("distinct_2", "broken", "copied")
"""Of a protocol's last models, without intervals."""

DRAWS = ["training_comments", "kept", "broken"]
"""What comments.csv does not say of a sample and generations.csv does."""

TEXT = dict.fromkeys(("text", "emotion", "protocol", "role", "writes", "measure", "against"), str)
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

    mean_distance has Student's 95 % interval over comments; the other measures stand beside it. distinct_2: share of
    distinct word pairs. broken: share of comments that are empty or were cut off. copied: share of comments that are
    one of the neighbourhood's, word for word.
    """
    groups = dict(list(comments.groupby(MODEL, sort=False)))
    near = neighbour_vectors(neighbourhoods)
    # Samples have single spaces.
    known = {
        emotion: {" ".join(text.split()) for text in own["text"]}
        for emotion, own in neighbourhoods[neighbourhoods["rank"] > 0].groupby("emotion")
    }
    rows = []
    for row in draws.to_dict("records"):
        sample = groups[tuple(row[column] for column in MODEL)]
        values = measured(sample, near[row["emotion"]])
        mean, low, high = mean_interval(values["distance"])
        rows.append(
            {
                **{column: row[column] for column in [*MODEL, "training_comments"]},
                "mean_distance": float(mean),
                "interval_low": float(low),
                "interval_high": float(high),
                "kept": row["kept"],
                **{measure.column: values[name].mean() for name, measure in MEASURES.items() if name != "distance"},
                "distinct_2": distinct_2(sample["text"].tolist()),
                "broken": row["broken"],
                "copied": sample["text"].isin(known[row["emotion"]]).mean(),
            }
        )
    return pd.DataFrame(rows).round(6)


def neighbour_vectors(neighbourhoods: pd.DataFrame) -> dict[str, np.ndarray]:
    """By target, its neighbours' vectors (k, 28)."""
    near = neighbourhoods[neighbourhoods["rank"] > 0]
    return {
        str(emotion): own[list(EMOTIONS)].to_numpy(np.float64) for emotion, own in near.groupby("emotion", sort=False)
    }


def measured(sample: pd.DataFrame, near: np.ndarray) -> dict[str, np.ndarray]:
    """By measure, the comments' values (n,). near: the neighbourhood's vectors (k, 28)."""
    vectors, texts = sample[list(EMOTIONS)].to_numpy(np.float64), sample["text"].tolist()
    values = {name: measure.values(vectors, texts, near) for name, measure in MEASURES.items()}
    return values | {"distance": sample["distance"].to_numpy()}  # before the probabilities were rounded


def summary_table(comments: pd.DataFrame, generations: pd.DataFrame, neighbourhoods: pd.DataFrame) -> pd.DataFrame:
    """summary.csv: rows of (emotion, measure, protocol, against), with the value and the ends of its 95 % interval.

    Values are of fresh (report) samples of a protocol's last model, of several chains their mean; with `against`, a
    difference to another protocol, paired comment by comment, since reported samples share their random streams.
    Against "selection": to the sample that chose the model (winner's curse). reduction_percent: by how many per cent
    competition's distance is less than the single model's. Intervals: with one seed over comments; with several over
    seeds, whose variance is pooled over the targets (statistics.pooled_interval). The neighbourhood's own mean distance
    and DESCRIPTIONS have none.
    """
    near = neighbour_vectors(neighbourhoods)
    report = comments[comments["role"] == "report"]
    last = {name: report.loc[report["protocol"] == name, "generation"].max() for name in played(report)}
    emotions, seeds = list(dict.fromkeys(comments["emotion"])), sorted(comments["seed"].unique())
    final = report[report["generation"] == report["protocol"].map(last)]
    samples = {
        key: measured(own, near[key[0]]) for key, own in final.groupby(["emotion", "seed", "protocol", "variant"])
    }
    by_protocol: dict[str, dict[tuple[str, int], list[dict[str, np.ndarray]]]] = {}
    for (emotion, seed, protocol, _), values in samples.items():
        by_protocol.setdefault(protocol, {}).setdefault((emotion, seed), []).append(values)

    def values_of(protocol: str, measure: str) -> np.ndarray:
        """(targets, seeds, n)."""
        own = by_protocol[protocol]
        return np.array([[np.mean([v[measure] for v in own[e, s]], axis=0) for s in seeds] for e in emotions])

    rows: list[pd.DataFrame] = []

    def put(measure: str, protocol: str, against: str, values: np.ndarray) -> None:
        ends = mean_interval(values[:, 0]) if len(seeds) == 1 else pooled_interval(values.mean(axis=2))
        rows.append(_rows(emotions, measure, protocol, against, len(seeds), *ends))

    for measure in MEASURES:
        for protocol in last:
            put(measure, protocol, "", values_of(protocol, measure))
        for protocol, other in comparisons(list(last)):
            put(measure, protocol, other, values_of(protocol, measure) - values_of(other, measure))
    put(
        "reduction_percent",
        "multi",
        "single",
        reduction(values_of("single", "distance"), values_of("multi", "distance")),
    )
    selection = comments[comments["role"] == "selection"]
    kept = generations.loc[(generations["role"] == "selection") & generations["kept"], MODEL]
    for protocol in played(selection):
        own = selection[(selection["protocol"] == protocol) & (selection["generation"] == last[protocol])].merge(kept)
        chose = {key: rows["distance"].to_numpy() for key, rows in own.groupby(["emotion", "seed"])}
        # Its comments are others than the fresh ones: differences of any pairs have the right mean and variance.
        fresh = values_of(protocol, "distance")
        put("distance", protocol, "selection", fresh - np.array([[chose[e, s] for s in seeds] for e in emotions]))
    none = np.full(len(emotions), np.nan)
    own_distance = neighbourhoods[neighbourhoods["rank"] > 0].groupby("emotion")["distance"].mean()
    rows.append(_rows(emotions, "distance", "neighbourhood", "", 1, own_distance[emotions].to_numpy(), none, none))
    described = generations[
        (generations["role"] == "report") & (generations["generation"] == generations["protocol"].map(last))
    ]
    for name in DESCRIPTIONS:
        for protocol in last:
            means = described[described["protocol"] == protocol].groupby("emotion")[name].mean()
            rows.append(_rows(emotions, name, protocol, "", len(seeds), means[emotions].to_numpy(), none, none))
    table = pd.concat(rows, ignore_index=True)
    table["emotion"] = pd.Categorical(table["emotion"], emotions)
    table = table.sort_values("emotion", kind="stable", ignore_index=True).astype({"emotion": str})
    return table.astype({"emotion": object}).round(6)


def _rows(
    emotions: Sequence[str],
    measure: str,
    protocol: str,
    against: str,
    seeds: int,
    value: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> pd.DataFrame:
    named = {"emotion": emotions, "measure": measure, "protocol": protocol, "against": against, "seeds": seeds}
    return pd.DataFrame(named | {"value": value, "low": low, "high": high})


def reduction(single: np.ndarray, multi: np.ndarray) -> np.ndarray:
    """100 (mean single - mean multi) / mean single, a comment's number each, as in measures.py.

    Distances (targets, seeds, n); means over seeds and comments of a target.
    """
    of_single, of_multi = (values.mean(axis=(1, 2), keepdims=True) for values in (single, multi))
    change = multi - of_multi - (single - of_single) * of_multi / of_single
    return 100 * (of_single - of_multi - change) / of_single


def comparisons(protocols: Sequence[str]) -> list[tuple[str, str]]:
    """(protocol, what it is compared with) for all of these that are compared."""
    return [(name, other) for name in protocols for other in PROTOCOLS[name].against if other in protocols]


def pick(table: pd.DataFrame, measure: str, protocol: str, against: str = "") -> pd.DataFrame:
    """The rows of summary.csv, or of `overall`, that say this."""
    said = (table["measure"] == measure) & (table["protocol"] == protocol) & (table["against"] == against)
    return table[said].reset_index(drop=True)


def overall(summary: pd.DataFrame) -> pd.DataFrame:
    """summary.csv's rows as means over targets, with Student's 95 % intervals, targets as the units.

    Of a single target, its own rows.
    """
    rows = []
    for key, own in summary.groupby(QUANTITY, sort=False):
        mean, low, high = (float(end) for end in mean_interval(own["value"].to_numpy()))
        if len(own) == 1:
            mean, low, high = own[["value", "low", "high"]].iloc[0]
        rows.append([*key, len(own), mean, low, high])
    return pd.DataFrame(rows, columns=[*QUANTITY, "targets", "value", "low", "high"]).round(6)


def answer_of(summary: pd.DataFrame) -> dict[str, list[float | None]]:
    """For run.json: what was measured -> value and ends of its interval."""
    return {
        f"{row.measure} {row.protocol}" + (f" - {row.against}" if row.against else ""): [
            None if np.isnan(end) else round(float(end), 4) for end in (row.value, row.low, row.high)
        ]
        for row in overall(summary).itertuples()
        if row.measure not in DESCRIPTIONS
    }


def answer_in_words(summary: pd.DataFrame) -> str:
    """One sentence: what competition came to."""
    means = overall(summary)
    targets = summary["emotion"].unique()
    on = targets[0] if len(targets) == 1 else f"{len(targets)} targets"
    distances = ", ".join(
        f"{PROTOCOLS[name].short} {pick(means, 'distance', name)['value'].item():.3f}"
        for name in played(summary)
        if name != "base"
    )
    first, against = headline(played(summary))
    row = pick(means, "distance", first, against).iloc[0]
    return (
        f"{on}: mean distance {distances}; {PROTOCOLS[first].short} minus {PROTOCOLS[against].short} "
        f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    )


def headline(protocols: Sequence[str]) -> tuple[str, str]:
    """The comparison that answers the question: the better rule against the better single model, of those played."""
    rule = "multi_plus" if "multi_plus" in protocols else "multi"
    return rule, "chosen" if "chosen" in protocols else "single"


def played(table: pd.DataFrame) -> list[str]:
    """The protocols of a table, in the registry's order."""
    held = set(table["protocol"])
    return [name for name in PROTOCOLS if name in held]


def published() -> pd.DataFrame:
    """The study's published distances by emotion (data/study/README.md), with their reduction by competition.

    Columns: emotion, neighbourhood, single_33, single_66, single_100, multi_1, multi_2, multi_3, reduction_percent.
    """
    table = pd.read_csv(ROOT / "data" / "study" / "point_in_space.csv")
    table["reduction_percent"] = 100 * (table["single_100"] - table["multi_3"]) / table["single_100"]
    return table


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """A run's table, every number exactly, and texts as they are."""
    nothing = {column: [""] for column in ("low", "high")}
    return read_any_table(folder, name, keep_default_na=False, na_values=nothing, dtype=TEXT)
