"""The protocols: one model alone, variants in competition, and the controls. engine/variants.py makes their models.

A model is named by its recipe. A protocol's moves are a generator: it yields what it needs (models, and samples of
them), is sent the samples, and decides. So each reads from top to bottom, all games' protocols play side by side, and
what two protocols both need (their first generations coincide) is made once. PROTOCOLS, at the end, is the registry:
tables, figures, report and planned cost follow it.

Randomness. Every seed derives from (the run's seed, the target, a purpose, a generation) and from nothing else:
- The protocols are paired: they deal the same parts as long as their pools are equal, and all their reported samples
  have one seed (common random numbers), so that differences between protocols are freed of noise that both share.
- A generation's variants share the seed that initialises their adapters and the seed of the sample that chooses among
  them: they differ by their comments only, and their adapters can be averaged (as in federated averaging).
- The sample that chooses and the sample that is reported never have the same seed.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.recipes import (
    Averaged,
    Drawn,
    Finished,
    Model,
    Order,
    Request,
    Sampled,
    Texts,
    Tuned,
    name_of,
)
from point_in_space_sim.pool import Pool, Units
from point_in_space_sim.target import distances_to, single_sizes, slug


@dataclass(frozen=True)
class Draw:
    """What a sample was drawn for. generation 0 is the base model; variant 0 is no variant of its own: an average, or
    the incumbent that variants compete with."""

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
    keeps: whether the adapters of its reported models are kept; else they are another's, or a control's.
    """

    moves: "Callable[[Game], Moves]"
    title: str
    short: str
    against: tuple[str, ...] = ()
    keeps: bool = True


@dataclass(frozen=True, eq=False)
class Game:
    """What all protocols of one target and seed share."""

    target: str
    pool: Pool
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
        return Tuned(texts, start, self.seed_of("tune", generation), self.pool.texts)

    def asks(self, model: Model, protocol: str, generation: int) -> Request:
        """The request for a model that is reported, and kept where the protocol keeps its models."""
        kept = model is not None and PROTOCOLS[protocol].keeps
        return Request(model, (self.report,), (f"{self.name}-{protocol}-{generation}",) if kept else ())

    def deal(self, units: Units, generation: int) -> list[Units]:
        return deal(units, self.variants, np.random.default_rng(self.seed_of("deal", generation)))

    def random_variant(self, generation: int, chain: int = 0) -> int:
        return int(np.random.default_rng([self.seed_of("pick", generation), chain]).integers(self.variants))

    def nearest(self, samples: Sequence[Sampled]) -> int:
        """Which sample has the least mean distance to the aim; of equals, the first."""
        return int(np.argmin([distances_to(self.aim, sample.vectors).mean() for sample in samples]))


def derived_seed(seed: int, *key: str | int) -> int:
    """A seed (32 bits) for one purpose, named by the key; it depends on nothing else."""
    words = np.frombuffer(hashlib.sha256(json.dumps(key).encode()).digest(), dtype="<u4")
    return int(np.random.SeedSequence([seed, *map(int, words)]).generate_state(1)[0])


def deal(units: Units, variants: int, generator: np.random.Generator) -> list[Units]:
    """Shuffles the units and deals them into equal disjoint parts; the rest, fewer than `variants`, stays out."""
    shuffled = [units[i] for i in generator.permutation(len(units))]
    size = len(units) // variants
    return [tuple(shuffled[i * size : (i + 1) * size]) for i in range(variants)]


def without(units: Units, part: Units) -> Units:
    gone = set(part)
    return tuple(unit for unit in units if unit not in gone)


def texts_of(units: Units) -> Texts:
    return tuple(text for unit in units for text in unit)


def base(game: Game) -> Moves:
    """The base model as it is."""
    yield [Request(None, (game.report,))]
    return [Draw("base", 0, 0, "report", None, game.report)]


def single(game: Game) -> Moves:
    """Three independent models, tuned from the base on the nearest third, two thirds and all of the pool."""
    models = thirds(game)
    yield [game.asks(model, "single", i) for i, model in enumerate(models, start=1)]
    return [Draw("single", i, 1, "report", model, game.report) for i, model in enumerate(models, start=1)]


def thirds(game: Game) -> list[Tuned]:
    texts = game.pool.texts
    return [game.tuned(texts[:size], None, 1) for size in single_sizes(len(texts))]


def chosen(game: Game) -> Moves:
    """Of the three single models the one with the least mean distance in a sample that chooses, as variants have."""
    models, selection = thirds(game), game.seed_of("selection", 1)
    drawn = yield [Request(model, (selection,)) for model in models]
    winner = game.nearest([drawn[model.name, selection] for model in models])
    yield [game.asks(models[winner], "chosen", 1)]
    draws = [Draw("chosen", 1, i + 1, "selection", model, selection, i == winner) for i, model in enumerate(models)]
    return [*draws, Draw("chosen", 1, winner + 1, "report", models[winner], game.report)]


def filtered(game: Game) -> Moves:
    """A single model on the third of the pool that lies nearest to the target."""
    model = thirds(game)[0]
    yield [game.asks(model, "filter", 1)]
    return [Draw("filter", 1, 1, "report", model, game.report)]


def oracle(game: Game) -> Moves:
    """A single model on the texts of those users who write on target, which nobody could know."""
    model = game.tuned(game.pool.on_target, None, 1)
    yield [game.asks(model, "oracle", 1)]
    return [Draw("oracle", 1, 1, "report", model, game.report)]


def multi(game: Game) -> Moves:
    """Competition by comma selection, the study's: the variant with the least mean distance becomes the next base, even
    where the incumbent was nearer; its part leaves the pool."""
    return competition(game, "multi", plus=False)


def multi_plus(game: Game) -> Moves:
    """Competition by plus selection: the incumbent stays, and the pool with it, unless a variant's choosing sample is
    nearer than its own. That is drawn afresh every generation: a lucky one does not sit on the throne."""
    return competition(game, "multi_plus", plus=True)


def competition(game: Game, protocol: str, *, plus: bool) -> Moves:
    units, incumbent = game.pool.units, None
    draws: list[Draw] = []
    report: list[Request] = []
    for generation in range(1, game.generations + 1):
        parts = game.deal(units, generation)
        models: list[Model] = [game.tuned(texts_of(part), incumbent, generation) for part in parts]
        numbers = list(range(1, len(models) + 1))
        if plus:  # variant 0; of equals it stays
            models, numbers = [incumbent, *models], [0, *numbers]
        selection = game.seed_of("selection", generation)
        drawn = yield [*report, *(Request(model, (selection,)) for model in models)]
        winner = game.nearest([drawn[name_of(model), selection] for model in models])
        draws += [
            Draw(protocol, generation, number, "selection", model, selection, i == winner)
            for i, (number, model) in enumerate(zip(numbers, models, strict=True))
        ]
        incumbent = models[winner]
        if numbers[winner]:
            units = without(units, parts[numbers[winner] - 1])
        draws.append(Draw(protocol, generation, numbers[winner], "report", incumbent, game.report))
        report = [game.asks(incumbent, protocol, generation)]
    yield report
    return draws


def random_pick(game: Game) -> Moves:
    """Control without competition: what a random pick comes to, as the mean over as many chains as there are variants.

    Chain j goes on from variant j of the first generation, each time with one random part, which then leaves its pool.
    """
    chains = range(1, game.variants + 1)
    units = dict.fromkeys(chains, game.pool.units)
    models: dict[int, Model] = dict.fromkeys(chains)
    draws: list[Draw] = []
    for generation in range(1, game.generations + 1):
        for chain in chains:
            pick = chain - 1 if generation == 1 else game.random_variant(generation, chain)
            part = game.deal(units[chain], generation)[pick]
            models[chain] = game.tuned(texts_of(part), models[chain], generation)
            units[chain] = without(units[chain], part)
            draws.append(Draw("random_pick", generation, chain, "report", models[chain], game.report))
        yield [game.asks(model, "random_pick", generation) for model in models.values()]
    return draws


def averaged(game: Game) -> Moves:
    """Control that uses all variants: their average becomes the next base.

    A random part leaves the pool: all went into the average alike, and with one gone the pool and so the comments a
    variant are as many as in competition.
    """
    units, best = game.pool.units, None
    draws: list[Draw] = []
    report: list[Request] = []
    for generation in range(1, game.generations + 1):
        parts = game.deal(units, generation)
        models = [game.tuned(texts_of(part), best, generation) for part in parts]
        yield [*report, *map(Request, models)]
        best, units = Averaged(tuple(models)), without(units, parts[game.random_variant(generation)])
        draws.append(Draw("averaged", generation, 0, "report", best, game.report))
        report = [game.asks(best, "averaged", generation)]
    yield report
    return draws


COMPARATORS = ("single", "chosen", "filter", "oracle", "random_pick", "averaged")
PROTOCOLS: dict[str, Protocol] = {
    "base": Protocol(base, "base model, untuned", "base"),
    "single": Protocol(single, "single model", "single"),
    "chosen": Protocol(chosen, "single model, chosen among thirds", "chosen", keeps=False),
    "filter": Protocol(filtered, "single model on the nearest third", "filter", keeps=False),
    "oracle": Protocol(oracle, "single model on users on target", "oracle"),
    "multi": Protocol(multi, "multi: comma selection", "multi", against=COMPARATORS),
    "multi_plus": Protocol(multi_plus, "multi: plus selection", "plus", against=(*COMPARATORS, "multi")),
    "random_pick": Protocol(random_pick, "random pick, no competition", "random", keeps=False),
    "averaged": Protocol(averaged, "adapters averaged", "average"),
}
ALWAYS = ("base", "single", "multi")
"""Without these the question has no answer; all others may be left out."""


def play(
    games: Sequence[Game],
    fulfil: Callable[[Sequence[Order]], Sequence[Finished]],
    protocols: Sequence[str] | None = None,
) -> Iterator[tuple[Game, list[tuple[Draw, Sampled]]]]:
    """Plays the protocols, by default all, of all games side by side; gives each finished game with all its samples.

    fulfil: takes new orders, perhaps none, and gives some that are finished, at least one of all that are open; an
    order's samples are the request's own.
    """
    protocols = tuple(PROTOCOLS) if protocols is None else protocols
    playing = {(game.name, name): PROTOCOLS[name].moves(game) for game in games for name in protocols}
    drawn: dict[str, dict[tuple[str, int], Sampled]] = {game.name: {} for game in games}
    draws: dict[tuple[str, str], list[Draw]] = {}
    lacking: dict[tuple[str, str], list[Request]] = {}
    new: list[Order] = []
    left = list(games)

    def ask(key: tuple[str, str], requests: list[Request]) -> None:
        lacking[key] = list(requests)
        new.extend((key[0], request) for request in requests)

    for key, moves in playing.items():
        ask(key, next(moves))
    while left:
        orders, new = new, []
        for (owner, request), samples in fulfil(orders):
            drawn[owner] |= samples
            key = next(key for key, open_ in lacking.items() if key[0] == owner and any(r is request for r in open_))
            lacking[key] = [other for other in lacking[key] if other is not request]
            if not lacking[key]:
                try:
                    ask(key, playing[key].send(drawn[owner]))
                except StopIteration as end:
                    draws[key] = end.value
                    del lacking[key]
        for game in [game for game in left if all((game.name, name) in draws for name in protocols)]:
            left.remove(game)
            mine = drawn.pop(game.name)
            played = [draw for name in protocols for draw in draws[game.name, name]]
            yield game, [(draw, mine[name_of(draw.model), draw.sample]) for draw in played]


@dataclass(frozen=True)
class Work:
    """What a game takes: comments tuned on in one epoch, samples, all comments in them, and models that can be made at
    once."""

    tuned: int
    draws: int
    sampled: int
    at_once: int


def work_of(protocols: Sequence[str], pool: Pool, generations: int, variants: int, samples: int) -> Work:
    """The work of a game, found by playing it on models that are counted, not made.

    Which variant wins is made up, so it may differ by the models that protocols happen to share.
    """
    made: dict[str, int] = {}
    drawn: set[tuple[str, int]] = set()
    at_once = 0
    blank = Sampled((), np.zeros((1, len(EMOTIONS))), 0.0)

    def count(orders: Sequence[Order]) -> list[Finished]:
        nonlocal at_once
        tuned = {
            request.model.name: len(request.model.texts) for _, request in orders if isinstance(request.model, Tuned)
        }
        at_once = max(at_once, len(tuned.keys() - made.keys()))
        made.update(tuned)
        found: list[Finished] = [
            (order, {(name_of(order[1].model), sample): blank for sample in order[1].samples}) for order in orders
        ]
        drawn.update(key for _, samples in found for key in samples)
        return found

    list(play([Game("", pool, np.zeros(len(EMOTIONS)), 0, generations, variants)], count, protocols))
    return Work(sum(made.values()), len(drawn), samples * len(drawn), at_once)
