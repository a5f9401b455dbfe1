"""Sampling of comments from a tuned model: one shared prompt, rows that leave the batch when they end."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from experiment.errors import InputError
from point_in_space_sim.engine.base_model import BaseModel, run_layers
from point_in_space_sim.engine.fine_tuning import Adapter, merged
from point_in_space_sim.engine.settings import SamplingSettings


@dataclass(frozen=True)
class Samples:
    """Comments drawn from a model, each one line, and the share of broken ones: empty, or cut off at the limit."""

    texts: list[str]
    broken: float


class KeyValueCache:
    """Keys and values of every layer, (rows, heads, capacity, width), filled up to `length` tokens.

    It stands in for transformers' own cache, which copies all keys at every token. `length` is advanced by the caller.
    It grows by GROWTH tokens at a time: by then many rows have left. On a CPU it holds float32: batches of small
    products, as attention needs, run twice as fast in it as in bfloat16.
    """

    GROWTH = 16

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key.shape[2]
        held = self.layers.get(layer)
        if held is None or held[0].shape[2] < end:
            self.layers[layer] = (self._wider(key, held and held[0], end), self._wider(value, held and held[1], end))
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            store[:, :, self.length : end] = new
        return self.layers[layer][0][:, :, :end], self.layers[layer][1][:, :, :end]

    def _wider(self, new: torch.Tensor, held: torch.Tensor | None, end: int) -> torch.Tensor:
        """A store like `new` for `end` tokens and some more, with what was held."""
        rows, heads, _, width = new.shape
        dtype = torch.float32 if new.device.type == "cpu" else new.dtype
        store = new.new_empty(rows, heads, end + self.GROWTH, width, dtype=dtype)
        if held is not None:
            store[:, :, : self.length] = held[:, :, : self.length]
        return store

    def repeat(self, rows: int) -> None:
        """Turns the only row into as many equal ones."""
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = (keys.expand(rows, -1, -1, -1).clone(), values.expand(rows, -1, -1, -1).clone())

    def move(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was; rows beyond them go. Only rows that move are copied."""
        to = [row for row, source in enumerate(sources) if row != source]
        for layer, stores in self.layers.items():
            for store in stores:
                if to:
                    store[to, :, : self.length] = store[[sources[row] for row in to], :, : self.length]
            self.layers[layer] = (stores[0][: len(sources)], stores[1][: len(sources)])


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
    ends = end_tokens(base)
    with merged(base, adapter), torch.inference_mode():
        draw = _sample_tokens if base.has_plain_layers else _generate_tokens
        drawn = draw(base, count, seed, settings, ends)
    texts, broken = [], 0
    for tokens in drawn:
        ended = bool(tokens) and tokens[-1] in ends
        text = " ".join(base.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True).split())
        texts.append(text)
        broken += not (ended and text)
    return Samples(texts, broken / count)


def end_tokens(base: BaseModel) -> set[int]:
    """Tokens that end a comment: the tokenizer's end token and those of the model's generation config."""
    more = base.model.generation_config.eos_token_id if base.model.generation_config else None
    return {base.tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])}


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
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            num_return_sequences=count,
            top_k=0,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=base.tokenizer.eos_token_id,
        )[:, len(base.prompt) :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def distinct_2(texts: Sequence[str]) -> float:
    """Share of distinct word pairs among all word pairs of the texts (Li et al., 2016); 0 where there is none."""
    words = [text.lower().split() for text in texts]
    pairs = [pair for w in words for pair in pairwise(w)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
