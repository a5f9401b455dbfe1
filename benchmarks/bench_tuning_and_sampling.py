"""Tuning and sampling of one variant: this repository against the straightforward way, both run here and now.

The straightforward way at its best: transformers' Trainer in our precision with a PEFT adapter on our layers, batches
of comments of like length, then one `generate` of all rows with the adapter merged. Same comments, epochs, rank,
comments a step and sampling settings; the learning rate is each side's own, and several are tried for the
straightforward way. Both sides' comments are mapped and compared by their distance to the centroid.

    python benchmarks/bench_tuning_and_sampling.py                one thread, as run.py gives each of its models
    python benchmarks/bench_tuning_and_sampling.py --threads 2
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from experiment.errors import InputError
from experiment.statistics import mean_interval
from point_in_space_sim.corpus import load_corpus
from point_in_space_sim.engine.assets import cache_folder
from point_in_space_sim.engine.base_model import BaseModel, load_base_model
from point_in_space_sim.engine.fine_tuning import (
    encode_comment,
    first_tuned_layer,
    frozen_activations,
    lora_config,
    tune,
)
from point_in_space_sim.engine.sampling import distinct_2, sample_comments
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.mapper import load_mapper, map_texts
from point_in_space_sim.target import distances_to, emotion_target, find_neighbourhood


@dataclass(frozen=True)
class Settings:
    emotion: str = "joy"
    """Whose nearest comments are tuned on."""
    comments: int = 33
    """How many."""
    samples: int = 50
    """Comments sampled from the tuned model."""
    mapper: str = "embedded"
    """As for run.py."""
    threads: int = 1
    """Threads of either side."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Of the straightforward way."""
    seed: int = 0
    """Of tuning and sampling."""


def ours(base: BaseModel, texts: list[str], settings: Settings) -> dict[str, Any]:
    """Seconds and samples. It also times the frozen layers' activations, which an experiment computes once."""
    tuning, sampling = TuningSettings(), SamplingSettings()
    begin = time.perf_counter()
    activations = frozen_activations(base, texts, tuning) if base.has_plain_layers else None
    adapter = tune(base, texts, tuning, settings.seed, activations=activations)
    tuned = time.perf_counter()
    samples = sample_comments(base, settings.samples, settings.seed, sampling, adapter)
    return {
        "tuning": tuned - begin,
        "sampling": time.perf_counter() - tuned,
        "texts": samples.texts,
        "broken": samples.broken,
        "work": useful_work(base, texts, samples.texts),
    }


def straightforward(base: BaseModel, texts: list[str], settings: Settings, learning_rate: float) -> dict[str, Any]:
    """The same with Trainer and generate. `base` gives prompt, tokenizer and weights; the model is loaded anew."""
    tuning, sampling = TuningSettings(), SamplingSettings()
    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=base.dtype, use_safetensors=True)
    model = get_peft_model(model, lora_config(base, tuning))
    rows = [
        {
            "input_ids": base.prompt + (target := encode_comment(base, text)),
            "labels": [-100] * len(base.prompt) + target,
        }
        for text in texts
    ]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=DataCollatorForSeq2Seq(base.tokenizer),
            args=TrainingArguments(
                folder,
                num_train_epochs=tuning.epochs,
                per_device_train_batch_size=tuning.batch_size,
                learning_rate=learning_rate,
                seed=settings.seed,
                train_sampling_strategy="group_by_length",
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=base.device.type == "cpu",
            ),
        ).train()
    tuned = time.perf_counter()
    prompt = torch.tensor([base.prompt], device=base.device)
    model = model.merge_and_unload().eval()
    with torch.no_grad():
        drawn = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            num_return_sequences=settings.samples,
            top_k=0,
            top_p=sampling.top_p,
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
        )
    sampled = time.perf_counter()
    drawn = drawn[:, len(base.prompt) :].tolist()
    texts = [" ".join(base.tokenizer.decode(row, skip_special_tokens=True).split()) for row in drawn]
    ended = [base.tokenizer.eos_token_id in row and bool(text) for row, text in zip(drawn, texts, strict=True)]
    return {"tuning": tuned - begin, "sampling": sampled - tuned, "texts": texts, "broken": 1 - np.mean(ended)}


def useful_work(base: BaseModel, texts: list[str], sampled: list[str]) -> tuple[float, float]:
    """Floating-point operations of the matrix products that tuning and sampling cannot do without.

    Two a weight and token forward; two more backward, in the tuned layers and the head only; none for padding, for the
    frozen layers after the first time, or for rows that have ended. The attention and the adapters are left out.
    """
    tuning = TuningSettings()
    layers = base.model.model.layers
    layer = sum(p.numel() for p in layers[0].parameters() if p.ndim == 2)
    head = base.model.lm_head.weight.numel()
    prompt, first = len(base.prompt), first_tuned_layer(base, tuning)
    targets = sum(len(encode_comment(base, text)) for text in texts)
    steps = tuning.epochs * -(-len(texts) // tuning.batch_size)
    tokens = tuning.epochs * (targets - len(texts)) + steps * prompt  # the prompt once a step
    tuned = (
        2 * first * layer * (prompt + targets - len(texts))
        + 4 * (len(layers) - first) * layer * tokens
        + 4 * head * (tokens - steps * (prompt - 1))
    )
    drawn = sum(len(encode_comment(base, text)) for text in sampled)
    return tuned, 2 * (len(layers) * layer + head) * drawn


def peak(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of the fastest of ten products of square matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    corpus, mapper = load_corpus(), load_mapper(settings.mapper)
    vectors = map_texts(mapper, corpus.texts, cache_folder() / "vectors")
    neighbourhood = find_neighbourhood(emotion_target(settings.emotion, vectors), vectors, 100)
    texts = [corpus.texts[i] for i in neighbourhood.members[: settings.comments]]
    bases = {str(base.dtype).removeprefix("torch."): base for base in (load_base_model(dtype=torch.float32),)}
    native = load_base_model()
    bases[str(native.dtype).removeprefix("torch.")] = native
    torch.mm(torch.randn(2048, 2048), torch.randn(2048, 2048))  # starts the threads
    rows = []
    for precision, base in bases.items():
        peers = [
            (f"Trainer, generate, {precision}, {rate:g}", base, straightforward(base, texts, settings, rate))
            for rate in settings.learning_rates
        ]
        # The quickest of the straightforward ones.
        total = min(row["tuning"] + row["sampling"] for *_, row in peers)
        own = (f"this repository, {precision}", base, ours(base, texts, settings))
        rows += [(*row, total) for row in (own, *peers)]

    print(
        f"{len(texts)} comments nearest to {settings.emotion}, {TuningSettings().epochs} epochs, {settings.samples} "
        f"samples, {settings.threads} threads, mapper {mapper.name}"
    )
    print(
        f"{'':32}{'tuning s':>9}{'sampling s':>11}{'total s':>9}{'ratio':>7}{'distance (95 %)':>24}"
        f"{'broken':>8}{'distinct-2':>11}"
    )
    for name, _, row, total in rows:
        mean, low, high = mean_interval(distances_to(neighbourhood.centroid, mapper(row["texts"])))
        seconds = row["tuning"] + row["sampling"]
        print(
            f"{name:32}{row['tuning']:9.1f}{row['sampling']:11.1f}{seconds:9.1f}{total / seconds:7.1f}"
            f"{mean:10.3f} [{low:.3f}, {high:.3f}]{row['broken']:8.2f}{distinct_2(row['texts']):11.2f}"
        )
    for name, base, row, _ in rows:
        if "work" not in row:
            continue
        best = peak(base.dtype)
        tuned, sampled = (
            work / seconds for work, seconds in zip(row["work"], (row["tuning"], row["sampling"]), strict=True)
        )
        print(
            f"{name}: tuning {tuned / 1e9:.0f} and sampling {sampled / 1e9:.0f} useful GFLOP/s; a product of square "
            f"matrices reaches {best / 1e9:.0f}: {tuned / best:.0%} and {sampled / best:.0%}"
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
