"""Whether a finished run's tables agree with each other, with its adapters and with its corpus and models.

comments.csv and neighbourhoods.csv are the record, with probabilities of four decimals; all else derives from them,
but for how many comments a model was tuned on, and the share of broken samples, which the tables say once.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open

from experiment.errors import InputError
from experiment.files import ROOT
from point_in_space_sim.corpus import EMOTIONS, load_corpus
from point_in_space_sim.engine.assets import MINILM_WHEEL, wheel_cache
from point_in_space_sim.engine.base_model import DEFAULT_BASE_MODEL, smollm2_cache, weights_hash
from point_in_space_sim.mapper import EMBEDDED_FOLDER, classifier_hash, embedded_hash
from point_in_space_sim.protocols import PROTOCOLS
from point_in_space_sim.results import DRAWS, MODEL, QUANTITY, answer_of, generation_table, read_table, summary_table
from point_in_space_sim.target import slug

# A probability is written with four decimals, so both ends of a distance move by up to half a unit in each dimension.
DISTANCE_ROUNDING = 1e-4 * np.sqrt(len(EMOTIONS)) + 1e-6
WRITTEN = 1.1e-6  # other numbers are written with six decimals


def verify(folder: Path, record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what differs, what could not be checked), a line each."""
    names = ("comments", "generations", "neighbourhoods", "summary")
    comments, generations, nearby, summary = (read_table(folder, name) for name in names)
    tables = dict(zip(names, (comments, generations, nearby, summary), strict=True))
    if differences := check_rows(tables, record):
        return differences, ["numbers: recomputed only where no row is missing"]
    differences = check_distances(comments, nearby)
    recomputed = generation_table(comments, generations[MODEL + DRAWS], nearby)
    differences += _compare("generations.csv", generations, recomputed, MODEL, "comments.csv")
    differences += check_kept(comments, generations, nearby, record["choose_by"])
    recomputed = summary_table(comments, generations, nearby)
    differences += _compare("summary.csv", summary, recomputed, ["emotion", *QUANTITY], "comments.csv")
    if record["answer"] != json.loads(json.dumps(answer_of(summary))):
        differences.append("run.json: its answer is not that of summary.csv")
    differences += check_adapters(folder, generations)
    more, unchecked = check_sources(record)
    if (folder / "training").exists():
        has_users = record["deal"] == "user" or record["contamination"] > 0
        differences += check_training(folder, generations, read_table(folder, "users") if has_users else nearby)
    else:
        unchecked.append("training: what variants were tuned on is not here")
    return differences + more, unchecked


def check_rows(tables: dict[str, pd.DataFrame], record: dict[str, Any]) -> list[str]:
    """Every target in every table, its neighbours, and as many comments a sample as the settings say."""
    differences = []
    for name, table in tables.items():
        held, wanted = list(dict.fromkeys(table["emotion"])), record["emotions"]
        if held != wanted:
            differences.append(f"{name}.csv: holds {', '.join(held)} where run.json says {', '.join(wanted)}")
    samples = tables["comments"].groupby(MODEL, sort=False).size()
    for key, count in samples[samples != record["samples"]].items():
        differences.append(f"comments.csv: {_named(MODEL, key)}: {count} comments where {record['samples']} were drawn")
    if set(samples.index) != set(tables["generations"][MODEL].itertuples(index=False, name=None)):
        differences.append("generations.csv: its samples are not those of comments.csv")
    for emotion, own in tables["neighbourhoods"].groupby("emotion", sort=False):
        if own["rank"].tolist() != list(range(record["neighbours"] + 1)):
            differences.append(f"neighbourhoods.csv: {emotion}: ranks are not 0 to {record['neighbours']}")
    return differences


def check_distances(comments: pd.DataFrame, nearby: pd.DataFrame) -> list[str]:
    """Distances from the 28 probabilities and the centroid."""
    members = nearby[nearby["rank"] > 0]
    centroids = members.groupby("emotion", sort=False)[list(EMOTIONS)].mean()
    differences = []
    for file, table, keys in (("comments.csv", comments, MODEL), ("neighbourhoods.csv", nearby, ["emotion", "rank"])):
        vectors = table[list(EMOTIONS)].to_numpy()
        if not ((vectors >= 0) & (vectors <= 1)).all():
            row = int((~((vectors >= 0) & (vectors <= 1))).any(axis=1).argmax())
            differences.append(f"{file}: row {row + 2}: holds what is no probability")
        distances = np.linalg.norm(vectors - centroids.loc[table["emotion"]].to_numpy(), axis=1)
        wrong = ~(np.abs(table["distance"].to_numpy() - distances) <= DISTANCE_ROUNDING)
        if wrong.any():
            row = int(wrong.argmax())
            differences.append(
                f"{file}: row {row + 2} ({_named(keys, table[keys].iloc[row])}): distance "
                f"{table['distance'][row]:g} is {distances[row]:.6g} by its probabilities{_more(wrong)}"
            )
    return differences


def check_kept(comments: pd.DataFrame, generations: pd.DataFrame, nearby: pd.DataFrame, choose_by: str) -> list[str]:
    """A competition keeps and reports the variant with the least mean distance in the sample that chooses.

    choose_by: whether that is the distance to the centroid or to the target's own vector.
    """
    differences = []
    names = ["emotion", "seed", "protocol", "generation"]
    aims = nearby[nearby["rank"] == 0].set_index("emotion")[list(EMOTIONS)]
    for key, own in generations[generations["role"] == "selection"].groupby(names, sort=False):
        distances, rounding = own["mean_distance"], WRITTEN
        if choose_by == "target":
            samples = own[MODEL].merge(comments, on=MODEL, how="left")
            samples["distance"] = np.linalg.norm(samples[list(EMOTIONS)] - aims.loc[key[0]], axis=1)
            distances = samples.groupby(MODEL, sort=False)["distance"].mean().set_axis(own.index)
            rounding = 2 * DISTANCE_ROUNDING
        if own["kept"].sum() != 1 or distances[own["kept"]].item() > distances.min() + rounding:
            differences.append(f"generations.csv: {_named(names, key)}: kept is not the least distant variant")
        reported = generations[(generations["role"] == "report") & (generations[names] == list(key)).all(axis=1)]
        if set(reported["variant"]) != set(own.loc[own["kept"], "variant"]):
            differences.append(f"generations.csv: {_named(names, key)}: reports another variant than it kept")
    return differences


def check_adapters(folder: Path, generations: pd.DataFrame) -> list[str]:
    """Every kept model is there, in safetensors, and holds finite numbers; unless all were left out of the folder."""
    differences: list[str] = []
    if not (folder / "adapters").exists():
        return differences
    keeping = [name for name, protocol in PROTOCOLS.items() if protocol.keeps]
    report = generations[(generations["role"] == "report") & generations["protocol"].isin(keeping)]
    report = report[report["training_comments"] > 0]  # the base model is kept by nobody
    for row in report.itertuples():
        path = folder / "adapters" / f"{slug(row.emotion)}-seed-{row.seed}-{row.protocol}-{row.generation}"
        files = sorted(path.glob("*.safetensors"))
        if not files:
            differences.append(f"adapters/{path.name}: holds no safetensors file")
        for file in files:
            try:
                with safe_open(file, framework="pt") as weights:
                    names = list(weights.keys())
                    finite = all(bool(torch.isfinite(weights.get_tensor(name)).all()) for name in names)
            except (SafetensorError, OSError) as error:
                differences.append(f"adapters/{path.name}/{file.name}: cannot be loaded ({error})")
                continue
            if not names or not finite:
                differences.append(f"adapters/{path.name}/{file.name}: holds no weights, or such as are not finite")
    return differences


def check_training(folder: Path, generations: pd.DataFrame, pools: pd.DataFrame) -> list[str]:
    """What a variant was tuned on: as many comments as generations.csv says, all of the target's pool.

    pools: users.csv, or neighbourhoods.csv where there are no users.
    """
    differences = []
    pools = pools[pools["rank"] > 0] if "rank" in pools else pools
    members = {emotion: set(own["text"]) for emotion, own in pools.groupby("emotion")}
    tuned = generations[generations["training_comments"] > 0]
    for row in tuned.drop_duplicates(["emotion", "seed", "protocol", "generation", "variant"]).itertuples():
        # An average has no variant of its own: it counts the comments of all that were averaged.
        variant = "*" if row.protocol == "averaged" else row.variant
        pattern = f"{slug(row.emotion)}-seed-{row.seed}-{row.protocol}-{row.generation}-variant-{variant}.jsonl"
        texts = []
        try:
            for path in sorted((folder / "training").glob(pattern)):
                lines = path.read_text(encoding="utf-8").split("\n")[:-1]
                texts += [json.loads(line)["messages"][1]["content"] for line in lines]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            differences.append(f"training/{path.name}: cannot be read ({type(error).__name__})")
            continue
        if len(texts) != row.training_comments or not members[row.emotion].issuperset(texts):
            differences.append(f"training/{pattern}: not {row.training_comments} comments of the pool")
    return differences


def check_sources(record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The corpus and the models against their hashes, where they are still within reach; nothing is fetched."""
    differences, unchecked = [], []
    sources = record["sources"]
    corpus = sources["corpus"]
    try:
        if corpus != "shipped" and not (ROOT / corpus).is_file():
            unchecked.append(f"corpus: no file {corpus}")
        elif load_corpus(corpus if corpus == "shipped" else ROOT / corpus).sha256 != record["corpus_sha256"]:
            differences.append(f"corpus: {corpus} is not the corpus of this run (SHA-256 differs)")
    except InputError as error:
        differences.append(f"corpus: {error}")
    for name, hash_of_model in (("base_model", base_model_hash), ("mapper", mapper_hash)):
        found = hash_of_model(sources[name])
        if found is None:
            unchecked.append(f"{name}: {sources[name]} is not a folder of this machine")
        elif found != record[f"{name}_sha256"]:
            differences.append(f"{name}: {sources[name]} is not that of this run (SHA-256 differs)")
    return differences, unchecked


def base_model_hash(source: str) -> str | None:
    """The hash of a base model that is at hand; None where it is not."""
    folder = smollm2_cache() if source == DEFAULT_BASE_MODEL else ROOT / source
    return weights_hash(folder) if any(folder.glob("*.safetensors")) else None


def mapper_hash(source: str) -> str | None:
    """The hash of a mapper that is at hand; None where it is not."""
    folder = EMBEDDED_FOLDER if source == "embedded" else ROOT / source
    encoder = wheel_cache(MINILM_WHEEL)
    if not any(folder.glob("*.safetensors")):
        return None
    if not (folder / "adapter_config.json").is_file():
        return classifier_hash(folder)
    return embedded_hash(folder, encoder) if (encoder / "model.safetensors").is_file() else None


def _compare(file: str, written: pd.DataFrame, recomputed: pd.DataFrame, keys: list[str], source: str) -> list[str]:
    """A line for each column that is not what it was recomputed to be: its first such number, and how many more."""
    if list(written.columns) != list(recomputed.columns) or len(written) != len(recomputed):
        return [f"{file}: its rows or columns are not those that {source} gives"]
    differences = []
    for column in written.columns:
        if column in keys or written[column].dtype == object:
            wrong = (written[column].astype(str) != recomputed[column].astype(str)).to_numpy()
        else:
            ours, theirs = written[column].to_numpy(dtype=float), recomputed[column].to_numpy(dtype=float)
            wrong = ~((np.abs(ours - theirs) <= WRITTEN) | (np.isnan(ours) & np.isnan(theirs)))
        if wrong.any():
            row = int(wrong.argmax())
            differences.append(
                f"{file}: {_named(keys, written[keys].iloc[row])}: {column} {written[column][row]} is "
                f"{recomputed[column][row]} by {source}{_more(wrong)}"
            )
    return differences


def _named(names: list[str], values: Any) -> str:
    return ", ".join(
        str(value) if name in ("emotion", "protocol", "role") else f"{name} {value}"
        for name, value in zip(names, values, strict=True)
    )


def _more(wrong: np.ndarray) -> str:
    return f" (and {wrong.sum() - 1} more)" if wrong.sum() > 1 else ""
