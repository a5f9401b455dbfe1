"""The protocols: one model alone, variants in competition, and the two controls. workshop.py makes their models.

A model is named by its recipe (which texts, from which model, which seed). A protocol is a generator: it yields what it
needs (models, and samples of them), is sent the samples, and decides. So each reads from top to bottom, several play
side by side, and what two protocols both need (their first generations coincide) is made once.

Randomness. Every seed derives from (the run's seed, the target, a purpose, a generation) and from nothing else:
- The protocols are paired: they deal the same parts as long as their pools are equal, and all their reported samples
  have one seed (common random numbers), so that differences between protocols are freed of noise that both share.
- A generation's variants share the seed that initialises their adapters and the seed of the sample that chooses among
  them: they differ by their comments only, and their adapters can be averaged (as in federated averaging).
- The sample that chooses and the sample that is reported never have the same seed.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiment.run_folder import hash_of
from point_in_space_sim.target import single_sizes

Texts = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Tuned:
    """The model that results from tuning `start` on the texts."""

    texts: Texts
    start: "Model"
    seed: int

    @cached_property
    def name(self) -> str:
        return hash_of(["tuned", self.texts, name_of(self.start), self.seed])


@dataclass(frozen=True, eq=False)
class Averaged:
    """The model whose adapter is the mean of the models' adapters."""

    models: tuple[Tuned, ...]

    @cached_property
    def name(self) -> str:
        return hash_of(["averaged", [model.name for model in self.models]])


Model = Tuned | Averaged | None
"""A model by its recipe; None is the base model."""


def name_of(model: Model) -> str:
    """Equal for equal recipes."""
    return "base" if model is None else model.name


@dataclass(frozen=True)
class Request:
    """A model that is to be made, the seeds of the samples to draw from it, and under which names to keep it."""

    model: Model
    samples: tuple[int, ...] = ()
    keep_as: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Comments sampled from a model: texts, vectors (n, 28), distances to the centroid (n,), share of broken ones."""

    texts: Texts
    vectors: np.ndarray
    distances: np.ndarray
    broken: float


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


Drawn = Mapping[tuple[str, int], Batch]
"""Samples by their model's name and their seed."""
Protocol = Generator[list[Request], Drawn, list[Draw]]


@dataclass(frozen=True)
class Game:
    """What all protocols of one target and seed share."""

    target: str
    texts: Texts  # the neighbourhood, nearest to the target first
    centroid: np.ndarray  # (28,)
    seed: int
    generations: int
    variants: int

    def seed_of(self, purpose: str, generation: int = 0) -> int:
        return derived_seed(self.seed, self.target, purpose, generation)

    @property
    def report(self) -> int:
        return self.seed_of("report")

    def deal(self, pool: Texts, generation: int) -> list[Texts]:
        return deal(pool, self.variants, np.random.default_rng(self.seed_of("deal", generation)))

    def random_variant(self, generation: int) -> int:
        return int(np.random.default_rng(self.seed_of("pick", generation)).integers(self.variants))


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


def base(game: Game) -> Protocol:
    """The base model as it is."""
    yield [Request(None, (game.report,))]
    return [Draw("base", 0, 0, "report", None, game.report)]


def single(game: Game) -> Protocol:
    """Three independent models, tuned from the base on the nearest third, two thirds and all of the neighbourhood."""
    models = [Tuned(game.texts[:size], None, game.seed_of("tune", 1)) for size in single_sizes(len(game.texts))]
    yield [Request(model, (game.report,), (f"single-{i}",)) for i, model in enumerate(models, start=1)]
    return [Draw("single", i, 1, "report", model, game.report) for i, model in enumerate(models, start=1)]


def multi(game: Game) -> Protocol:
    """Competition: the variant with the least mean distance becomes the next base, its part leaves the pool."""
    pool, best = game.texts, None
    draws: list[Draw] = []
    report: list[Request] = []
    for generation in range(1, game.generations + 1):
        parts = game.deal(pool, generation)
        models = [Tuned(part, best, game.seed_of("tune", generation)) for part in parts]
        selection = game.seed_of("selection", generation)
        drawn = yield [*report, *(Request(model, (selection,)) for model in models)]
        winner = int(np.argmin([drawn[model.name, selection].distances.mean() for model in models]))
        draws += [
            Draw("multi", generation, i + 1, "selection", model, selection, i == winner)
            for i, model in enumerate(models)
        ]
        best, pool = models[winner], without(pool, parts[winner])
        draws.append(Draw("multi", generation, winner + 1, "report", best, game.report))
        report = [Request(best, (game.report,), (f"multi-{generation}",))]
    yield report
    return draws


def sequential(game: Game) -> Protocol:
    """Control without competition: one variant a generation on a random part, which is what a random pick comes to."""
    pool, model = game.texts, None
    draws: list[Draw] = []
    for generation in range(1, game.generations + 1):
        pick = game.random_variant(generation)
        part = game.deal(pool, generation)[pick]
        model = Tuned(part, model, game.seed_of("tune", generation))
        yield [Request(model, (game.report,), (f"sequential-{generation}",))]
        draws.append(Draw("sequential", generation, pick + 1, "report", model, game.report))
        pool = without(pool, part)
    return draws


def averaged(game: Game) -> Protocol:
    """Control that uses all variants: their average becomes the next base.

    A random part leaves the pool: all three went into the average alike, and with one gone the pool and so the
    comments a variant are as many as in competition.
    """
    pool, best = game.texts, None
    draws: list[Draw] = []
    report: list[Request] = []
    for generation in range(1, game.generations + 1):
        parts = game.deal(pool, generation)
        models = [Tuned(part, best, game.seed_of("tune", generation)) for part in parts]
        yield [*report, *map(Request, models)]
        best, pool = Averaged(tuple(models)), without(pool, parts[game.random_variant(generation)])
        draws.append(Draw("averaged", generation, 0, "report", best, game.report))
        report = [Request(best, (game.report,), (f"averaged-{generation}",))]
    yield report
    return draws


PROTOCOLS: dict[str, Callable[[Game], Protocol]] = {
    "base": base,
    "single": single,
    "multi": multi,
    "sequential": sequential,
    "averaged": averaged,
}


def play(
    game: Game, fulfil: Callable[[list[Request]], Drawn], protocols: Sequence[str] = tuple(PROTOCOLS)
) -> list[tuple[Draw, Batch]]:
    """Plays the protocols side by side, and gives every sample that they drew.

    fulfil: makes the models and draws the samples of one step's requests, each model once.
    """
    playing = {name: PROTOCOLS[name](game) for name in protocols}
    wanted = {name: next(protocol) for name, protocol in playing.items()}
    drawn: dict[tuple[str, int], Batch] = {}
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


def merge_requests(requests: Sequence[Request]) -> list[Request]:
    """One request a model, in order of first mention."""
    merged: dict[str, Request] = {}
    for request in requests:
        known = merged.get(name_of(request.model), Request(request.model))
        merged[name_of(request.model)] = Request(
            request.model,
            tuple(dict.fromkeys(known.samples + request.samples)),
            tuple(dict.fromkeys(known.keep_as + request.keep_as)),
        )
    return list(merged.values())
