"""The protocols: one model alone, variants in competition, and the controls. engine/variants.py makes their models.

A model is named by its recipe. A protocol's moves are a generator: it yields what it needs (models, and samples of
them), is sent the samples, and decides. So each reads from top to bottom, several play side by side, and what two
protocols both need (their first generations coincide) is made once. PROTOCOLS, at the end, is the registry: tables,
figures, report and planned cost follow it.

Randomness. Every seed derives from (the run's seed, the target, a purpose, a generation) and from nothing else:
- The protocols are paired: they deal the same parts as long as their pools are equal, and all their reported samples
  have one seed (common random numbers), so that differences between protocols are freed of noise that both share.
- A generation's variants share the seed that initialises their adapters and the seed of the sample that chooses among
  them: they differ by their comments only, and their adapters can be averaged (as in federated averaging).
- The sample that chooses and the sample that is reported never have the same seed.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.recipes import (
    Averaged,
    Drawn,
    Model,
    Request,
    Sampled,
    Texts,
    Tuned,
    merge_requests,
    name_of,
)
from point_in_space_sim.target import distances_to, single_sizes, slug


@dataclass(frozen=True)
class Draw:
    """What a sample was drawn for. generation 0 is the base model; variant 0 is no variant of its own (an average)."""

    protocol: str
    generation: int
    variant: int
    role: str  # "selection" chose the kept variant; "report" is a fresh sample of it
    model: Model
    sample: int
    kept: bool = True


Moves = Generator[list[Request], Drawn, list[Draw]]


@dataclass(frozen=True)
class Protocol:
    """A registered protocol. title: for legends and the report; short: for narrow places, such as ticks.

    against: the protocols that it is compared with, in pairs; of those that are not played, nothing is said.
    """

    moves: "Callable[[Game], Moves]"
    title: str
    short: str
    against: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Game:
    """What all protocols of one target and seed share."""

    target: str
    texts: Texts  # the neighbourhood, nearest to the target first
    aim: np.ndarray  # (28,), the point that a choice among variants is to come near
    seed: int
    generations: int
    variants: int

    @property
    def name(self) -> str:
        """As a file name."""
        return f"{slug(self.target)}-seed-{self.seed}"

    def seed_of(self, purpose: str, generation: int = 0) -> int:
        return derived_seed(self.seed, self.target, purpose, generation)

    @property
    def report(self) -> int:
        return self.seed_of("report")

    def tuned(self, texts: Texts, start: Model, generation: int) -> Tuned:
        return Tuned(texts, start, self.seed_of("tune", generation), self.texts)

    def asks(self, model: Model, protocol: str, generation: int) -> Request:
        """The request for a model that is reported and kept."""
        return Request(model, (self.report,), (f"{self.name}-{protocol}-{generation}",))

    def deal(self, pool: Texts, generation: int) -> list[Texts]:
        return deal(pool, self.variants, np.random.default_rng(self.seed_of("deal", generation)))

    def random_variant(self, generation: int) -> int:
        return int(np.random.default_rng(self.seed_of("pick", generation)).integers(self.variants))

    def nearest(self, samples: Sequence[Sampled]) -> int:
        """Which sample has the least mean distance to the aim."""
        return int(np.argmin([distances_to(self.aim, sample.vectors).mean() for sample in samples]))


def derived_seed(seed: int, *key: str | int) -> int:
    """A seed (32 bits) for one purpose, named by the key; it depends on nothing else."""
    words = np.frombuffer(hashlib.sha256(json.dumps(key).encode()).digest(), dtype="<u4")
    return int(np.random.SeedSequence([seed, *map(int, words)]).generate_state(1)[0])


def deal(pool: Texts, variants: int, generator: np.random.Generator) -> list[Texts]:
    """Shuffles the pool and deals it into equal disjoint parts; the remainder, fewer than `variants`, stays out."""
    shuffled = [pool[i] for i in generator.permutation(len(pool))]
    size = len(pool) // variants
    return [tuple(shuffled[i * size : (i + 1) * size]) for i in range(variants)]


def without(pool: Texts, part: Texts) -> Texts:
    gone = set(part)
    return tuple(text for text in pool if text not in gone)


def base(game: Game) -> Moves:
    """The base model as it is."""
    yield [Request(None, (game.report,))]
    return [Draw("base", 0, 0, "report", None, game.report)]


def single(game: Game) -> Moves:
    """Three independent models, tuned from the base on the nearest third, two thirds and all of the neighbourhood."""
    models = [game.tuned(game.texts[:size], None, 1) for size in single_sizes(len(game.texts))]
    yield [game.asks(model, "single", i) for i, model in enumerate(models, start=1)]
    return [Draw("single", i, 1, "report", model, game.report) for i, model in enumerate(models, start=1)]


def multi(game: Game) -> Moves:
    """Competition: the variant with the least mean distance becomes the next base, its part leaves the pool."""
    pool, best = game.texts, None
    draws: list[Draw] = []
    report: list[Request] = []
    for generation in range(1, game.generations + 1):
        parts = game.deal(pool, generation)
        models = [game.tuned(part, best, generation) for part in parts]
        selection = game.seed_of("selection", generation)
        drawn = yield [*report, *(Request(model, (selection,)) for model in models)]
        winner = game.nearest([drawn[model.name, selection] for model in models])
        draws += [
            Draw("multi", generation, i + 1, "selection", model, selection, i == winner)
            for i, model in enumerate(models)
        ]
        best, pool = models[winner], without(pool, parts[winner])
        draws.append(Draw("multi", generation, winner + 1, "report", best, game.report))
        report = [game.asks(best, "multi", generation)]
    yield report
    return draws


def sequential(game: Game) -> Moves:
    """Control without competition: one variant a generation on a random part, which is what a random pick comes to."""
    pool, model = game.texts, None
    draws: list[Draw] = []
    for generation in range(1, game.generations + 1):
        pick = game.random_variant(generation)
        part = game.deal(pool, generation)[pick]
        model = game.tuned(part, model, generation)
        yield [game.asks(model, "sequential", generation)]
        draws.append(Draw("sequential", generation, pick + 1, "report", model, game.report))
        pool = without(pool, part)
    return draws


def averaged(game: Game) -> Moves:
    """Control that uses all variants: their average becomes the next base.

    A random part leaves the pool: all three went into the average alike, and with one gone the pool and so the
    comments a variant are as many as in competition.
    """
    pool, best = game.texts, None
    draws: list[Draw] = []
    report: list[Request] = []
    for generation in range(1, game.generations + 1):
        parts = game.deal(pool, generation)
        models = [game.tuned(part, best, generation) for part in parts]
        yield [*report, *map(Request, models)]
        best, pool = Averaged(tuple(models)), without(pool, parts[game.random_variant(generation)])
        draws.append(Draw("averaged", generation, 0, "report", best, game.report))
        report = [game.asks(best, "averaged", generation)]
    yield report
    return draws


PROTOCOLS: dict[str, Protocol] = {
    "base": Protocol(base, "base model, untuned", "base"),
    "single": Protocol(single, "single model", "single"),
    "multi": Protocol(multi, "multi: best of the variants", "multi", against=("single", "sequential", "averaged")),
    "sequential": Protocol(sequential, "control: a random part, no competition", "random part"),
    "averaged": Protocol(averaged, "control: adapters averaged", "average"),
}
ALWAYS = ("base", "single", "multi")
"""Without these the question has no answer; all others may be left out."""


def play(
    game: Game, fulfil: Callable[[list[Request]], Drawn], protocols: Sequence[str] | None = None
) -> list[tuple[Draw, Sampled]]:
    """Plays the protocols, by default all, side by side, and gives every sample that they drew.

    fulfil: makes the models and draws the samples of one step's requests, each model once.
    """
    protocols = tuple(PROTOCOLS) if protocols is None else protocols
    playing = {name: PROTOCOLS[name].moves(game) for name in protocols}
    wanted = {name: next(moves) for name, moves in playing.items()}
    drawn: dict[tuple[str, int], Sampled] = {}
    draws: dict[str, list[Draw]] = {}
    while wanted:
        drawn |= fulfil(merge_requests([request for requests in wanted.values() for request in requests]))
        for name in list(wanted):
            try:
                wanted[name] = playing[name].send(drawn)
            except StopIteration as end:
                draws[name] = end.value
                del wanted[name]
    return [(draw, drawn[name_of(draw.model), draw.sample]) for name in protocols for draw in draws[name]]


@dataclass(frozen=True)
class Work:
    """What a game takes: comments tuned on in one epoch, comments sampled, and models that can be made at once."""

    tuned: int
    sampled: int
    at_once: int


def work_of(protocols: Sequence[str], neighbours: int, generations: int, variants: int, samples: int) -> Work:
    """The work of a game, found by playing it on models that are counted, not made.

    Which variant wins is made up, so it may differ by the models that protocols happen to share.
    """
    made: dict[str, int] = {}
    drawn: set[tuple[str, int]] = set()
    at_once = 0
    blank = Sampled((), np.zeros((1, len(EMOTIONS))), 0.0)

    def count(requests: list[Request]) -> Drawn:
        nonlocal at_once
        tuned = {
            request.model.name: len(request.model.texts) for request in requests if isinstance(request.model, Tuned)
        }
        at_once = max(at_once, len(tuned.keys() - made.keys()))
        made.update(tuned)
        samples = {(name_of(request.model), sample): blank for request in requests for sample in request.samples}
        drawn.update(samples)
        return samples

    texts = tuple(map(str, range(neighbours)))
    play(Game("", texts, np.zeros(len(EMOTIONS)), 0, generations, variants), count, protocols)
    return Work(sum(made.values()), samples * len(drawn), at_once)
