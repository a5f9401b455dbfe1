"""
Trains the embedded mapper: a LoRA adapter and a linear head on all-MiniLM-L6-v2, for the 28 GoEmotions labels.

    python point_in_space_sim/mapper/train.py --goemotions FOLDER

FOLDER holds GoEmotions' train.tsv, dev.tsv and test.tsv. An interrupted run goes on from its last finished epoch.
"""

import hashlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support
from torch.nn import functional
from tqdm import tqdm

from experiment.errors import InputError
from experiment.files import ROOT, replace_atomically, sha256_file
from point_in_space_sim.corpus import (
    EMOTIONS,
    SHIPPED_COMMENTS,
    Row,
    read_comments,
    read_goemotions,
)
from point_in_space_sim.engine.assets import MINILM_WHEEL, wheel_folder
from point_in_space_sim.mapper import (
    EMBEDDED_FOLDER,
    TokenIds,
    in_batches_of_like_length,
    load_encoder,
    load_mapper,
    pad,
    pool,
)


@dataclass(frozen=True)
class Settings:
    """How the embedded mapper is trained."""

    goemotions: Path
    """folder with GoEmotions' train.tsv, dev.tsv and test.tsv"""
    comments: Path = SHIPPED_COMMENTS
    """labelled comments, four fifths of which are trained on as well"""
    output_dir: Path = EMBEDDED_FOLDER
    """where adapter, head and model card go"""
    checkpoint: Path = ROOT / "results" / "mapper" / "checkpoint.safetensors"
    """state after the last finished epoch"""
    resume: bool = True
    """go on from the checkpoint if there is one"""
    epochs: int = 3
    """passes over the training texts that the learning rate's cycle spans"""
    stop_after: int | None = None
    """end after this many of them all the same"""
    batch_size: int = 64
    """texts a step"""
    learning_rate: float = 1e-3
    """peak of the one-cycle schedule"""
    weight_decay: float = 0.01
    """of AdamW"""
    rank: int = 32
    """of the LoRA adapter on query, key, value and dense"""
    dropout: float = 0.1
    """of the pooled vector"""
    seed: int = 0
    """of initial weights, order and dropout"""
    bfloat16: bool = True
    """matrix products in bfloat16 (twice as fast where the processor has it); weights stay in float32"""


def split_comments(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(four fifths for training, one fifth held out), stratified by emotion, chosen by the texts' hashes alone."""
    train: list[Row] = []
    held_out: list[Row] = []
    for emotion in EMOTIONS:
        group = [row for row in rows if row[1] == (emotion,)]
        group.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())
        held_out += group[: len(group) // 5]
        train += group[len(group) // 5 :]
    return train, held_out


def label_matrix(rows: list[Row]) -> np.ndarray:
    """Zeros and ones (rows, 28)."""
    labels = np.zeros((len(rows), len(EMOTIONS)), dtype=np.float32)
    for number, row in enumerate(rows):
        labels[number, [EMOTIONS.index(emotion) for emotion in row.emotions]] = 1
    return labels


def batches_of_like_length(lengths: np.ndarray, batch_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Index arrays that cover all texts once, in random order; each batch holds texts of nearly the same length."""
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 50 * batch_size):
        block = order[start : start + 50 * batch_size]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[first : first + batch_size] for first in range(0, len(block), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def one_cycle(progress: float, peak: float) -> float:
    """The learning rate at `progress` in [0, 1]: linear to the peak over the first tenth, then a cosine to zero."""
    return peak * min(progress / 0.1, (1 + cos(pi * max(progress - 0.1, 0) / 0.9)) / 2)


def build_model(settings: Settings) -> tuple[Any, torch.nn.Linear, Any]:
    """(encoder with a fresh LoRA adapter, linear head, function texts -> token ids)."""
    torch.manual_seed(settings.seed)
    # Random masks for all hidden states would take a third of a step; the pooled vector's dropout costs nothing.
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder, tokenize = load_encoder(wheel_folder(MINILM_WHEEL), **no_dropout)
    targets = ["query", "key", "value", "dense"]
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=targets, bias="none")
    head = torch.nn.Linear(encoder.config.hidden_size, len(EMOTIONS))
    torch.nn.init.zeros_(head.weight)
    return get_peft_model(encoder, lora), head, tokenize


def pooled(encoder: Any, token_ids: TokenIds, bfloat16: bool) -> torch.Tensor:
    """The pooled vectors (texts, width) of one batch, float32."""
    ids, mask = pad(token_ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return pool(hidden, mask)


def predict(encoder: Any, head: torch.nn.Linear, token_ids: TokenIds) -> np.ndarray:
    """Logits (texts, 28) of all texts, computed in float32."""
    encoder.eval()
    with torch.inference_mode():
        return in_batches_of_like_length(lambda batch: head(pooled(encoder, batch, bfloat16=False)), token_ids)


def scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Macro-F1 and micro-F1 at probability 0.5 and mean average precision of logits against 0/1 labels (texts, 28)."""
    return {
        "macro-F1": f1_score(labels, predicted > 0, average="macro", zero_division=0),
        "micro-F1": f1_score(labels, predicted > 0, average="micro", zero_division=0),
        "mean average precision": average_precision_score(labels, predicted, average="macro"),
    }


def train(
    settings: Settings,
    encoder: Any,
    head: torch.nn.Linear,
    token_ids: TokenIds,
    labels: np.ndarray,
    dev_token_ids: TokenIds,
    dev_labels: np.ndarray,
) -> float:
    """Trains adapter and head in place, with a checkpoint an epoch; returns the seconds of all its sessions."""
    # From each label's frequency the head need not learn it first.
    frequency = torch.from_numpy(labels.mean(axis=0)).clamp(1e-4, 1 - 1e-4)
    head.bias.data.copy_(frequency.logit())
    trained = {f"encoder.{name}": value for name, value in encoder.named_parameters() if value.requires_grad}
    trained |= {f"head.{name}": value for name, value in head.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    # What a checkpoint must agree on; the epochs count too, as they stretch the learning rate's cycle.
    ingredients = repr(
        (
            settings.epochs,
            settings.batch_size,
            settings.learning_rate,
            settings.weight_decay,
            settings.rank,
            settings.dropout,
            settings.seed,
            settings.bfloat16,
            token_ids,
        )
    )
    identity = hashlib.sha256(ingredients.encode() + labels.tobytes()).hexdigest()

    done, seconds = 0, 0.0
    if settings.resume and settings.checkpoint.exists():
        with safe_open(settings.checkpoint, "pt") as state:
            metadata = state.metadata()
            if metadata["identity"] != identity:
                raise InputError(f"{settings.checkpoint}: of another run (settings or texts differ); use --no-resume")
            done, seconds = int(metadata["epochs"]), float(metadata["seconds"])
            for name, parameter in trained.items():
                parameter.data.copy_(state.get_tensor(name))
                optimizer.state[parameter] = {
                    key: state.get_tensor(f"{key}:{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                }

    lengths = np.array([len(tokens) for tokens in token_ids])
    targets = torch.from_numpy(labels)
    for epoch in range(done, settings.stop_after or settings.epochs):
        started = time.monotonic()
        order_seed, dropout_seed = np.random.SeedSequence([settings.seed, epoch]).spawn(2)
        torch.manual_seed(int(dropout_seed.generate_state(1)[0]))
        batches = batches_of_like_length(lengths, settings.batch_size, np.random.default_rng(order_seed))
        encoder.train()
        total = 0.0
        progress = tqdm(batches, desc=f"epoch {epoch + 1} of {settings.epochs}", mininterval=5)
        for step, batch in enumerate(progress):
            for group in optimizer.param_groups:
                group["lr"] = one_cycle((epoch + (step + 1) / len(batches)) / settings.epochs, settings.learning_rate)
            vectors = pooled(encoder, [token_ids[index] for index in batch], settings.bfloat16)
            predicted = head(functional.dropout(vectors, settings.dropout))
            loss = functional.binary_cross_entropy_with_logits(predicted, targets[torch.from_numpy(batch)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
            progress.set_postfix(loss=f"{total / (step + 1):.4f}", refresh=False)
        seconds += time.monotonic() - started
        state = {name: parameter.data for name, parameter in trained.items()}
        for name, parameter in trained.items():
            state |= {f"{key}:{name}": value for key, value in optimizer.state[parameter].items()}
        with replace_atomically(settings.checkpoint) as temporary:
            save_file(state, temporary, {"identity": identity, "epochs": str(epoch + 1), "seconds": str(seconds)})
        measured = scores(predict(encoder, head, dev_token_ids), dev_labels)
        print(f"dev after epoch {epoch + 1}:", ", ".join(f"{name} {value:.4f}" for name, value in measured.items()))
    return seconds


def best_f1_shift(logits: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """
    For each label the number (28) to add to its logits so that the decision at probability 0.5 has the best F1.

    The best threshold of a rare label rests on a dozen texts: the median over 200 bootstrap samples is steadier.
    """
    shift = np.zeros(logits.shape[1], dtype=np.float32)
    for label in range(logits.shape[1]):
        order = np.argsort(-logits[:, label], kind="stable")
        ranked, truth = logits[order, label], labels[order, label]
        thresholds = []
        for _ in range(200):
            weights = np.bincount(generator.integers(len(ranked), size=len(ranked)), minlength=len(ranked))
            hits, chosen = np.cumsum(weights * truth), np.cumsum(weights)
            if hits[-1] == 0:
                continue
            f1 = 2 * hits[:-1] / (chosen[:-1] + hits[-1])
            best = int(np.argmax(f1))
            thresholds.append((ranked[best] + ranked[best + 1]) / 2)
        if thresholds:
            shift[label] = -np.median(thresholds)
    return shift


def save(settings: Settings, encoder: Any, head: torch.nn.Linear) -> None:
    """Writes the adapter in PEFT's own format (in half precision) and the head."""
    with tempfile.TemporaryDirectory() as folder:
        # Without the last argument peft would look the base model up on the hub.
        encoder.save_pretrained(folder, save_embedding_layers=False)
        adapter = load_file(Path(folder) / "adapter_model.safetensors")
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "sentence-transformers/all-MiniLM-L6-v2"
    config["target_modules"] = sorted(config["target_modules"])
    with replace_atomically(settings.output_dir / "adapter_model.safetensors") as temporary:
        save_file({name: value.to(torch.float16) for name, value in adapter.items()}, temporary, {"format": "pt"})
    with replace_atomically(settings.output_dir / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    with replace_atomically(settings.output_dir / "head.safetensors") as temporary:
        save_file(head.state_dict(), temporary, {"format": "pt", "labels": ",".join(EMOTIONS)})


def neighbourhood_radius(vectors: np.ndarray, label: int, neighbours: int = 100) -> float:
    """Mean L2 distance to their centroid of the texts nearest to the one that scores highest on the label."""
    target = int(np.argmax(vectors[:, label]))
    distances = np.linalg.norm(vectors - vectors[target], axis=1)
    distances[target] = np.inf
    nearest = vectors[np.argsort(distances, kind="stable")[:neighbours]]
    return float(np.linalg.norm(nearest - nearest.mean(axis=0), axis=1).mean())


def label_table(
    test: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    train_labels: np.ndarray,
    radii: dict[str, list[float]],
) -> str:
    """A Markdown table, one row a label; `test` and `held_out` are (probabilities, 0/1 labels), both (texts, 28)."""
    precision, recall, f1, count = precision_recall_fscore_support(test[1], test[0] > 0.5, zero_division=0)
    average_precision = average_precision_score(test[1], test[0], average=None)
    first = held_out[0].argmax(axis=1)
    lines = [
        "| label | train | test | precision | recall | F1 | average precision | held out, first | "
        + " | ".join(f"radius, {name}" for name in radii)
        + " |",
        "| --- |" + " ---: |" * (7 + len(radii)),
    ]
    for label, emotion in enumerate(EMOTIONS):
        own = held_out[1][:, label] == 1
        lines.append(
            f"| {emotion} | {int(train_labels[:, label].sum())} | {count[label]} | {precision[label]:.2f} | "
            f"{recall[label]:.2f} | {f1[label]:.2f} | {average_precision[label]:.2f} | "
            f"{np.mean(first[own] == label):.2f} | "
            + " | ".join(f"{values[label]:.2f}" for values in radii.values())
            + " |"
        )
    means = [
        precision.mean(),
        recall.mean(),
        f1.mean(),
        average_precision.mean(),
        np.mean(first == held_out[1].argmax(axis=1)),
        *(np.mean(values) for values in radii.values()),
    ]
    lines.append(
        f"| **mean** | {len(train_labels)} texts | {len(test[1])} texts | "
        + " | ".join(f"**{value:.3f}**" for value in means)
        + " |"
    )
    return "\n".join(lines)


def model_card(
    settings: Settings,
    seconds: float,
    shift: np.ndarray,
    splits: dict[str, list[Row]],
    comments: list[Row],
    held_out: list[Row],
) -> str:
    """The README of the mapper in `settings.output_dir`, with everything measured on the files as they were saved."""
    mapper = load_mapper(str(settings.output_dir))
    labels = {name: label_matrix(rows) for name, rows in splits.items()}
    own_labels = label_matrix(held_out)
    vectors = {name: mapper([row.text for row in splits[name]]) for name in ("dev", "test")}
    own_vectors = mapper([row.text for row in held_out])
    measured = {
        "GoEmotions dev (chosen on)": scores(vectors["dev"] - 0.5, labels["dev"]),
        "GoEmotions test": scores(vectors["test"] - 0.5, labels["test"]),
        "GoEmotions test, logits not shifted": scores(logit(vectors["test"]) - shift, labels["test"]),
        "held-out comments": scores(own_vectors - 0.5, own_labels),
    }
    ranked = np.argsort(-own_vectors, axis=1)
    agreement = [np.mean([own_labels[row, ranked[row, :best]].any() for row in range(len(ranked))]) for best in (1, 3)]

    shipped = mapper([row.text for row in comments + held_out])
    goemotions = np.vstack([vectors["dev"], vectors["test"]])
    generator = np.random.default_rng(np.random.SeedSequence(settings.seed))
    as_many = min(len(shipped), len(goemotions))
    parts = [goemotions[generator.choice(len(goemotions), as_many, replace=False)] for _ in range(20)]
    every = range(len(EMOTIONS))
    radii = {
        "shipped": [neighbourhood_radius(shipped, label) for label in every],
        "GoEmotions, as many texts": [
            float(np.mean([neighbourhood_radius(part, label) for part in parts])) for label in every
        ],
        "GoEmotions dev and test": [neighbourhood_radius(goemotions, label) for label in every],
    }

    shown = ["epochs", "batch_size", "learning_rate", "weight_decay", "rank", "dropout", "seed"]
    shown += ["stop_after"] if settings.stop_after else []
    options = " ".join(f"--{name.replace('_', '-')} {getattr(settings, name)}" for name in shown)
    files = [
        settings.output_dir / name for name in ("adapter_model.safetensors", "adapter_config.json", "head.safetensors")
    ]
    inputs = [*(settings.goemotions / f"{name}.tsv" for name in splits), settings.comments]
    hashes = "\n".join(f"| {path.name} | {path.stat().st_size:,} | `{sha256_file(path)}` |" for path in files + inputs)
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{value:.3f}" for value in values.values()) + " |"
        for name, values in measured.items()
    )
    return f"""# The embedded mapper

Maps a comment to 28 emotion probabilities (GoEmotions labels). all-MiniLM-L6-v2 (sentence-transformers, Apache 2.0,
fetched on first use) with this folder's LoRA adapter (rank {settings.rank} on query, key, value and dense), the mean of
its last hidden states, standardised, and a linear head. The adapter is in PEFT's own format, in half precision.
`point_in_space_sim.mapper.load_mapper("embedded")` reads it. Written by `point_in_space_sim/mapper/train.py`;
every figure below was measured on these files.

Trained on GoEmotions train ({len(splits["train"]):,} Reddit comments; Demszky et al., ACL 2020; Apache 2.0) and on four
fifths of the comments in `data/comments` ({len(comments):,}; CC0); the other fifth ({len(held_out)}) is held out.
Licence of adapter and head: Apache 2.0.

## How good it is
Threshold 0.5 for every label. The study's mapper, SamLowe/roberta-base-go_emotions, six times the size, publishes
macro-F1 0.450 and micro-F1 0.585 on GoEmotions test.

| | macro-F1 | micro-F1 | mean average precision |
| --- | ---: | ---: | ---: |
{rows}

Of the held-out comments, {agreement[0]:.1%} get the highest probability for the emotion that their writer meant, and
{agreement[1]:.1%} have it among the three highest (guessing: {1 / 28:.1%} and {3 / 28:.1%}).

**The probabilities are shifted.** Trained by cross-entropy, rare labels seldom reach 0.5. So a number was added to each
label's logit ({shift.min():.2f} to {shift.max():.2f}), chosen on GoEmotions dev so that the decision at 0.5 has the
best F1 (the median over 200 bootstrap samples). A rare emotion's probability is therefore higher than its frequency in
GoEmotions, as if it had been more common there; the ranking of texts by a label is unchanged.

## By label
train: texts with the label, shipped comments included. test: the same in GoEmotions test, on which precision, recall,
F1 and average precision are measured. held out, first: share of the emotion's held-out comments for which it is the
highest. radius: mean L2 distance to their centroid of the 100 comments nearest to the one that scores highest on the
emotion, in the shipped comments ({len(shipped):,}), in as many texts drawn from GoEmotions dev and test (mean of
{len(parts)} draws), and in all of GoEmotions dev and test ({len(goemotions):,} texts; the denser a corpus, the tighter
its neighbourhoods). Four fifths of the shipped comments were trained on, of GoEmotions dev and test none.

{
        label_table(
            (vectors["test"], labels["test"]),
            (own_vectors, own_labels),
            np.vstack([labels["train"], label_matrix(comments)]),
            radii,
        )
    }

## How it was made
```
python point_in_space_sim/mapper/train.py --goemotions FOLDER {options}
```
{seconds / 60:.0f} minutes on one core of a shared machine, with torch {version("torch")}, transformers
{version("transformers")} and peft {version("peft")}. AdamW, one-cycle learning rate, binary cross-entropy, matrix
products in {"bfloat16" if settings.bfloat16 else "float32"}, batches of texts of like length, dropout on the pooled
vector only, no early stopping.

| file | bytes | SHA-256 |
| --- | ---: | --- |
{hashes}

Limits: English, short informal texts. GoEmotions' labels are the impressions of three readers a comment, from one site;
its rarest labels (grief, pride, relief, nervousness) have 6 to 23 test texts, so their figures are rough.
"""


def logit(probabilities: np.ndarray) -> np.ndarray:
    """The inverse of the sigmoid, finite for single precision's 0 and 1 as well."""
    probabilities = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.log(probabilities) - np.log1p(-probabilities)


def main(settings: Settings) -> None:
    if min(settings.epochs, settings.batch_size, settings.rank) < 1 or not 0 <= settings.dropout < 1:
        raise InputError("epochs, batch_size and rank must be at least 1, dropout within [0, 1)")
    splits = {name: read_goemotions(settings.goemotions / f"{name}.tsv") for name in ("train", "dev", "test")}
    comments, held_out = split_comments(read_comments(settings.comments))
    encoder, head, tokenize = build_model(settings)
    rows = splits["train"] + comments
    dev_token_ids, dev_labels = tokenize([row.text for row in splits["dev"]]), label_matrix(splits["dev"])
    token_ids = tokenize([row.text for row in rows])
    seconds = train(settings, encoder, head, token_ids, label_matrix(rows), dev_token_ids, dev_labels)

    generator = np.random.default_rng(np.random.SeedSequence(settings.seed))
    shift = best_f1_shift(predict(encoder, head, dev_token_ids), dev_labels, generator)
    head.bias.data += torch.from_numpy(shift)
    save(settings, encoder, head)
    with replace_atomically(settings.output_dir / "README.md") as temporary:
        temporary.write_text(model_card(settings, seconds, shift, splits, comments, held_out), encoding="utf-8")
    print(f"wrote {settings.output_dir}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
