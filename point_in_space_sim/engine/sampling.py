"""Sampling of comments from a tuned model: one shared prompt, rows that leave the batch when they end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from transformers import GenerationConfig

from experiment.errors import InputError
from point_in_space_sim.engine.base_model import MAX_TOKENS, BaseModel
from point_in_space_sim.engine.decoding import Decoder, decode, head, lay_out
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
    with merged(base, adapter) as replaced, torch.inference_mode():
        if plain:
            laid_out = partial(lay_out, base.model, replaced, base.laid_out) if base.can_be_laid_out else None
            drawn = sample_tokens(base, count, [seed], settings, base.end_tokens, laid_out)
        else:
            drawn = _generate_tokens(base, count, [seed], settings, base.end_tokens)
    return as_samples(base, drawn)


def as_samples(base: BaseModel, drawn: Sequence[Sequence[int]]) -> Samples:
    """Comments from their tokens, the end token among them where it was drawn."""
    texts, broken = [], 0
    for tokens in drawn:
        ended = bool(tokens) and tokens[-1] in base.end_tokens
        text = " ".join(base.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True).split())
        texts.append(text)
        broken += not (ended and text)
    return Samples(texts, broken / len(drawn))


def sample_tokens(
    base: BaseModel,
    count: int,
    seeds: Sequence[int],
    settings: SamplingSettings,
    ends: set[int],
    laid_out: Callable[[], Decoder] | None = None,
) -> list[list[int]]:
    """`count` comments after the prompt for every seed: lists of tokens, up to and with the first of `ends`.

    laid_out: lays out the model's decoder (decoding.py), once the prompt has gone through the model.
    With several seeds, row i of run_layers is the i-th part of all rows: a model of its own may be attached to each
    (stacked.py), so ended rows stay in their places. With one, they leave the batch.
    """
    model, device, prompt_length = base.model, base.device, len(base.prompt)
    streams = UniformStreams(seeds, count, settings.max_new_tokens * (ATTEMPTS + 1), device)
    ending = torch.tensor(sorted(ends), device=device)
    tokens = ending[0].repeat(len(seeds) * count, settings.max_new_tokens)
    batch = torch.arange(len(tokens), device=device)  # which comment each row of the batch is
    going_on = torch.ones_like(batch, dtype=torch.bool)
    cache = KeyValueCache()
    # Once for all comments of a seed.
    ids = torch.tensor([base.prompt], device=device).expand(len(seeds), -1)
    hidden = run_layers(model, model.model.embed_tokens(ids), torch.arange(prompt_length)[None], cache=cache)
    cache.length = prompt_length
    cache.repeat(count)
    decoder = None if laid_out is None else laid_out()
    hidden = hidden[:, -1].repeat_interleave(count, 0)
    for step in range(settings.max_new_tokens):
        hidden = model.model.norm(hidden)
        logits = model.lm_head(hidden) if decoder is None else head(decoder, hidden)
        drawn = draw_tokens(logits, settings, streams, batch)
        tokens[batch, step] = drawn
        going_on &= ~torch.isin(drawn, ending)
        left = int(going_on.sum())
        if not left or step + 1 == settings.max_new_tokens:
            break
        if len(seeds) == 1 and left < len(batch):
            rows = filled_from_the_end(going_on.nonzero()[:, 0].tolist())
            batch, drawn, going_on = batch[rows], drawn[rows], going_on[rows]
            cache.move(rows)
        hidden = model.model.embed_tokens(drawn)
        if decoder is None:
            positions = torch.full((1, 1), cache.length, device=device)
            hidden = run_layers(model, hidden[:, None], positions, cache=cache)[:, 0]
        else:
            hidden = decode(decoder, model, hidden, cache)
        cache.length += 1
    return [_up_to_the_end(row, ends) for row in tokens[:, : step + 1].tolist()]


ATTEMPTS = 16
"""Uniform numbers tried for a token, before the nucleus is sorted out."""


class UniformStreams:
    """A random stream for every comment, spawned from its model's seed, with so many uniform numbers drawn ahead."""

    def __init__(self, seeds: Sequence[int], count: int, ahead: int, device: torch.device | str = "cpu") -> None:
        children = [child for seed in seeds for child in np.random.SeedSequence(seed).spawn(count)]
        self.numbers = torch.tensor(
            np.stack([np.random.default_rng(child).random(ahead) for child in children]), device=device
        )
        self.used = torch.zeros(len(children), dtype=torch.long, device=device)

    def draw(self, comments: torch.Tensor) -> torch.Tensor:
        """The next number of each of these comments' streams, (comments,) float64."""
        numbers = self.numbers[comments, self.used[comments]]
        self.used[comments] += 1
        return numbers


def draw_tokens(
    logits: torch.Tensor, settings: SamplingSettings, streams: UniformStreams, comments: torch.Tensor
) -> torch.Tensor:
    """One token a row from softmax(logits / temperature), restricted to the nucleus (Holtzman et al., 2020).

    By inverting the cumulative distribution: one uniform number a row instead of one a token. A token outside the
    nucleus (the tokens that are likelier than it already hold top_p) is drawn again, which is the restricted
    distribution without a sort of the vocabulary; only after ATTEMPTS tries is it sorted. comments: (rows,), whose
    streams are drawn from.
    """
    probabilities = torch.softmax(logits.float() / settings.temperature, dim=1)
    cumulative = probabilities.cumsum(dim=1)
    tokens = _invert(cumulative, streams.draw(comments))
    if settings.top_p == 1:
        return tokens
    open_rows = torch.arange(len(tokens), device=logits.device)
    for attempt in range(ATTEMPTS):
        if attempt:
            tokens[open_rows] = _invert(cumulative[open_rows], streams.draw(comments[open_rows]))
        rows = probabilities[open_rows] if attempt else probabilities
        likelier = rows.where(rows > rows.gather(1, tokens[open_rows, None]), 0).sum(dim=1)
        open_rows = open_rows[likelier >= settings.top_p]
        if not len(open_rows):
            return tokens
    likeliest, order = probabilities[open_rows].sort(dim=1, descending=True)
    inside = likeliest.where(likeliest.cumsum(dim=1) - likeliest < settings.top_p, 0).cumsum(dim=1)
    places = _invert(inside, streams.draw(comments[open_rows]))
    tokens[open_rows] = order.gather(1, places[:, None])[:, 0]
    return tokens


def _invert(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Where each row's cumulative weights first exceed its share `uniform` of their sum."""
    total = cumulative[:, -1:]
    # A uniform number rounded up to the very end would point past the last token that has any probability.
    level = (uniform.to(total.dtype)[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, level, right=True)[:, 0]


def _up_to_the_end(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _generate_tokens(
    base: BaseModel, count: int, seeds: Sequence[int], settings: SamplingSettings, ends: set[int]
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
        torch.manual_seed(*seeds)
        rows = base.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=drawing)
        rows = rows[:, len(base.prompt) :].tolist()
    return [_up_to_the_end(row, ends) for row in rows]


def distinct_2(texts: Sequence[str]) -> float:
    """Share of distinct word pairs among all word pairs of the texts (Li et al., 2016); 0 where there is none."""
    words = [text.lower().split() for text in texts]
    pairs = [pair for w in words for pair in pairwise(w)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
