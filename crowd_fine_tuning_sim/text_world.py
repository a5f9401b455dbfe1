"""The competition with language models: a group's candidate is the model tuned further on its members' texts.

A competition.World of one crowd. It makes recipes, asks for samples of the models that they name, and values the mean
vector of a sample; who makes the models is the asker's affair (asking.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from crowd_fine_tuning_sim.asking import Ask
from point_in_space_sim.engine.recipes import Model, Request, Texts, Tuned, name_of
from point_in_space_sim.protocols import derived_seed
from user_grouping_evaluation_sim.competition import Shares
from user_grouping_evaluation_sim.metrics import Metric
from user_grouping_evaluation_sim.payout import allotted


@dataclass(frozen=True)
class Streams:
    """Seeds of one repetition of one crowd: each follows from the run's seed, the crowd and a purpose alone."""

    seed: int
    crowd: str

    def __call__(self, purpose: str, number: int = 0) -> int:
        return derived_seed(self.seed, self.crowd, purpose, number)


@dataclass(frozen=True)
class Candidates:
    """Of one round: models as recipes, the groups' in their order, then the merged one."""

    models: tuple[Model, ...]
    round_number: int


@dataclass(frozen=True)
class TextWorld:
    """texts: each person's, in the round of a number. pool: all of them, which go through the frozen layers together.
    centroid: (28,).

    budget: texts that a candidate is tuned on. judged: filled round by round with the mean vector (28,) of a fresh
    sample of the model that the round begins with, by which it was not chosen.
    """

    texts: Callable[[int], Sequence[Texts]]
    pool: Texts
    centroid: np.ndarray
    metric: Metric
    budget: int
    streams: Callable[..., int]
    ask: Ask
    judged: list[np.ndarray] = field(default_factory=list)

    def propose(self, model: list[Model], shares: Shares, round_number: int) -> Candidates:
        weights = [np.where(shares.labels[0] == group, shares.weights[0], 0.0) for group in range(shares.num_groups)]
        if shares.merged_weights is not None:
            weights.append(shares.merged_weights[0])
        rng = np.random.default_rng(self.streams("texts", round_number))
        texts = self.texts(round_number)
        turn = np.random.default_rng(self.streams("remainders", round_number)).permutation(len(texts))
        drawn = [draw_texts(texts, own, self.budget, turn, rng) for own in weights]
        seed = self.streams("tuning", round_number)
        models = tuple(Tuned(own, model[0], seed, self.pool) for own in drawn)
        return Candidates(models, round_number)

    def gains(self, model: list[Model], candidates: Candidates) -> np.ndarray:
        # One seed for all: what they draw differs by their weights alone.
        sample = self.streams("selection", candidates.round_number)
        everyone = [model[0], *candidates.models]
        drawn = self.ask([Request(each, (sample,)) for each in everyone])
        means = np.array([drawn[name_of(each), sample].vectors.mean(axis=0) for each in everyone], dtype=np.float64)
        self.judged.append(means[0])
        values = np.asarray(self.metric(means, self.centroid))
        return (values[1:] - values[0])[None]

    def take(self, model: list[Model], candidates: Candidates, taken: np.ndarray, improved: np.ndarray) -> list[Model]:
        return [candidates.models[int(taken[0])]] if improved[0] else model


def draw_texts(
    texts: Sequence[Texts], weights: np.ndarray, budget: int, turn: np.ndarray, rng: np.random.Generator
) -> Texts:
    """`budget` texts, of each person as many as their weight allots, at random; a person's are all used before one
    comes again. weights: (n,), at least 0. turn: a permutation of the people; of those with equal remainders the first
    in turn give one text more."""
    drawn: list[str] = []
    counts = np.empty(len(texts), dtype=np.int64)
    counts[turn] = allotted(np.asarray(budget), weights[turn])
    for own, count in zip(texts, counts, strict=True):
        order = rng.permutation(len(own))  # of everybody, so that nobody's draw depends on another's weight
        drawn += [own[order[i % len(own)]] for i in range(count)]
    return tuple(drawn)
