"""Sampling of comments from a tuned model: one shared prompt, rows that leave the batch when they end."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import GenerationConfig

from experiment.errors import InputError
from point_in_space_sim.engine.base_model import MAX_TOKENS, BaseModel
from point_in_space_sim.engine.fine_tuning import Adapter, merged, own_random_numbers
from point_in_space_sim.engine.layers import KeyValueCache, run_layers
from point_in_space_sim.engine.settings import SamplingSettings


@dataclass(frozen=True)
class Samples:
    """Comments drawn from a model, each one line, and the share of broken ones: empty, or cut off at the limit."""

    texts: list[str]
    broken: float


def filled_from_the_end(rows: Sequence[int]) -> list[int]:
    """Distinct row numbers, in an order that leaves those in place that can stay: gaps are filled with the last.

    [0, 2, 3, 5] -> [0, 5, 2, 3]
    """
    last = [row for row in rows if row >= len(rows)]
    staying = set(rows)
    return [row if row in staying else last.pop() for row in range(len(rows))]


def sample_comments(
    base: BaseModel, count: int, seed: int, settings: SamplingSettings | None = None, adapter: Adapter | None = None
) -> Samples:
    """Draws comments after the prompt from the base model with the adapter merged in.

    Every comment has a random stream of its own, spawned from the seed. Raises InputError for settings out of range.
    """
    settings = settings or SamplingSettings()
    if count < 1 or settings.max_new_tokens < 1 or settings.temperature <= 0 or not 0 < settings.top_p <= 1:
        raise InputError(f"sampling needs a count, a length and a temperature above 0 and top_p in (0, 1]: {settings}")
    plain = base.has_plain_layers
    if plain and settings.max_new_tokens > MAX_TOKENS:
        plain = base.is_plain_for(settings.max_new_tokens)
    ends = base.end_tokens
    with merged(base, adapter), torch.inference_mode():
        drawn = (_sample_tokens if plain else _generate_tokens)(base, count, seed, settings, ends)
    texts, broken = [], 0
    for tokens in drawn:
        ended = bool(tokens) and tokens[-1] in ends
        text = " ".join(base.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True).split())
        texts.append(text)
        broken += not (ended and text)
    return Samples(texts, broken / count)


def _sample_tokens(
    base: BaseModel, count: int, seed: int, settings: SamplingSettings, ends: set[int]
) -> list[list[int]]:
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(count)]
    comments: list[list[int]] = [[] for _ in range(count)]
    batch = list(range(count))  # which comment each row of the batch is
    model, prompt_length = base.model, len(base.prompt)
    cache = KeyValueCache()
    ids = torch.tensor([base.prompt], device=base.device)
    # Once for all rows.
    hidden = run_layers(model, model.model.embed_tokens(ids), torch.arange(prompt_length)[None], cache=cache)
    cache.length = prompt_length
    cache.repeat(count)
    hidden = hidden[:, -1:].expand(count, 1, -1)
    for step in range(settings.max_new_tokens):
        logits = model.lm_head(model.model.norm(hidden[:, -1]))
        drawn = draw_tokens(logits, settings, [streams[comment] for comment in batch])
        for comment, token in zip(batch, drawn, strict=True):
            comments[comment].append(token)
        going_on = [row for row, comment in enumerate(batch) if comments[comment][-1] not in ends]
        if not going_on or step + 1 == settings.max_new_tokens:
            break
        if len(going_on) < len(batch):
            rows = filled_from_the_end(going_on)
            batch, drawn = [batch[row] for row in rows], [drawn[row] for row in rows]
            cache.move(rows)
        hidden = model.model.embed_tokens(torch.tensor(drawn, device=base.device))[:, None]
        hidden = run_layers(model, hidden, torch.tensor([[cache.length]]), cache=cache)
        cache.length += 1
    return comments


def draw_tokens(logits: torch.Tensor, settings: SamplingSettings, streams: Sequence[np.random.Generator]) -> list[int]:
    """One token a row from softmax(logits / temperature), restricted to the nucleus (Holtzman et al., 2020).

    By inverting the cumulative distribution: one uniform number a row instead of one a token. A token outside the
    nucleus (the tokens that are likelier than it already hold top_p) is drawn again, which is the restricted
    distribution without a sort of the vocabulary.
    """
    probabilities = torch.softmax(logits.float() / settings.temperature, dim=1)
    cumulative = probabilities.cumsum(dim=1)
    tokens = torch.zeros(len(streams), dtype=torch.long, device=logits.device)
    open_rows = torch.arange(len(streams), device=logits.device)
    while len(open_rows):
        uniform = torch.tensor([streams[row].random() for row in open_rows.tolist()], device=logits.device)
        rows = cumulative[open_rows]
        # A uniform number rounded up to the very end would point past the last token that has any probability.
        level = (uniform.to(rows.dtype)[:, None] * rows[:, -1:]).minimum(rows[:, -1:].nextafter(torch.tensor(0.0)))
        tokens[open_rows] = torch.searchsorted(rows, level, right=True)[:, 0]
        if settings.top_p == 1:
            break
        chosen = probabilities[open_rows].gather(1, tokens[open_rows][:, None])
        likelier = probabilities[open_rows].where(probabilities[open_rows] > chosen, 0).sum(dim=1)
        open_rows = open_rows[likelier >= settings.top_p]
    return tokens.tolist()


def _generate_tokens(
    base: BaseModel, count: int, seed: int, settings: SamplingSettings, ends: set[int]
) -> list[list[int]]:
    """The same through the model's own `generate`, for architectures without plain layers."""
    ids = torch.tensor([base.prompt], device=base.device)
    drawing = GenerationConfig(
        do_sample=True,
        num_return_sequences=count,
        top_k=0,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=base.tokenizer.eos_token_id,
    )
    with own_random_numbers(base.device):
        torch.manual_seed(seed)
        rows = base.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=drawing)
        rows = rows[:, len(base.prompt) :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def distinct_2(texts: Sequence[str]) -> float:
    """Share of distinct word pairs among all word pairs of the texts (Li et al., 2016); 0 where there is none."""
    words = [text.lower().split() for text in texts]
    pairs = [pair for w in words for pair in pairwise(w)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
