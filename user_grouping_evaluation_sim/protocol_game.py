"""The protocol game: v(S) = metric(model that a competition among the users in S alone ends with, expert).

Which model that is depends on grouping and scoring, so each combination has a game of its own; v(empty) is the start's.
A play is random, so a coalition's value is one of named streams: of the seed and the coalition itself, whatever it is
played together with. A game so is as deterministic as any; the spread of its plays is part of the standard errors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, cast

import numpy as np

from experiment.errors import InputError
from user_grouping_evaluation_sim.competition import Rules, compete
from user_grouping_evaluation_sim.grouping import Grouping
from user_grouping_evaluation_sim.metrics import Metric
from user_grouping_evaluation_sim.scoring import Scoring
from user_grouping_evaluation_sim.shapley import ShapleyEstimate, game_shapley_values
from user_grouping_evaluation_sim.vector_world import DELTA, VectorWorld

EVALUATIONS = 4_000  # coalitions that are played for one crowd's values: all of up to 11 users, sampled above
NUMBERS_A_BATCH = 4_000_000  # that plays side by side hold
PAIRS = 8  # of plays of a size, which show how much a play's end varies
PURPOSES = 2  # of a play's streams: its rounds, its evaluations


@dataclass(frozen=True)
class Streams:
    """A generator a run, which draws that run's rows and no other: a run gets what it would get alone.

    Stands for the one generator of all runs where a grouping or a world draws by the methods below, runs first.
    """

    generators: Sequence[np.random.Generator]

    def random(self, size: int | tuple[int, ...]) -> np.ndarray:
        return self._by_run(size, lambda rng, own: rng.random(own))

    def standard_normal(self, size: int | tuple[int, ...]) -> np.ndarray:
        return self._by_run(size, lambda rng, own: rng.standard_normal(own))

    def normal(self, loc: float, scale: float, size: int | tuple[int, ...]) -> np.ndarray:
        return self._by_run(size, lambda rng, own: rng.normal(loc, scale, own))

    def uniform(self, low: float, high: float, size: int | tuple[int, ...]) -> np.ndarray:
        return self._by_run(size, lambda rng, own: rng.uniform(low, high, own))

    def integers(self, low: int, high: int, size: int | tuple[int, ...]) -> np.ndarray:
        return self._by_run(size, lambda rng, own: rng.integers(low, high, own))

    def permuted(self, x: np.ndarray, axis: int) -> np.ndarray:
        self._check(len(x))
        rows = [rng.permuted(x[i : i + 1], axis=axis) for i, rng in enumerate(self.generators)]
        return np.concatenate(rows)

    def _by_run(
        self, size: int | tuple[int, ...], draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    ) -> np.ndarray:
        runs, *rest = np.atleast_1d(size).tolist()
        self._check(runs)
        return np.concatenate([draw(rng, (1, *rest)) for rng in self.generators])

    def _check(self, runs: int) -> None:
        if runs != len(self.generators):
            raise InputError(
                f"the protocol game: a draw of {runs} rows, where each of {len(self.generators)} runs has one"
            )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        known = [method for method in vars(Streams) if not method.startswith("_")]
        raise InputError(f"the protocol game: a generator's method {name} draws no row a run; take {', '.join(known)}")


@dataclass(frozen=True)
class ProtocolGame:
    """A shapley.Game of one crowd. users: (n, d). expert, start: (d,). rules.num_groups: at most as many as a coalition
    has members. noise: as VectorWorld's, of the plays; a coalition's value has none. repeats: plays that a value is the
    mean of. stream: of which every play's is a child."""

    users: np.ndarray
    expert: np.ndarray
    start: np.ndarray
    grouping: Grouping
    metric: Metric
    scoring: Scoring
    rules: Rules
    stream: np.random.SeedSequence
    delta: float = DELTA
    noise: float = 0.0
    repeats: int = 1

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        plays = [self.play(coalitions, np.full(len(coalitions), repeat)) for repeat in range(self.repeats)]
        return np.mean(plays, axis=0)

    def play(self, coalitions: np.ndarray, repeats: np.ndarray) -> np.ndarray:
        """The value that each coalition, bool (m, n), reaches in its play of this number (m,): (m,)."""
        values = np.empty(len(coalitions))
        sizes = coalitions.sum(axis=1)
        for size in np.unique(sizes).tolist():
            of_size = np.flatnonzero(sizes == size)
            step = max(1, NUMBERS_A_BATCH // (max(size, 1) * (8 * size + 3 * self.rules.num_rounds)))
            for i in range(0, len(of_size), step):
                batch = of_size[i : i + step]
                models = self._final_models(coalitions[batch], size, repeats[batch])
                values[batch] = self.metric(models, self.expert)
        return values

    def _final_models(self, coalitions: np.ndarray, size: int, repeats: np.ndarray) -> np.ndarray:
        """(m, d), of m coalitions of one size."""
        m, d = len(coalitions), len(self.expert)
        model = np.broadcast_to(self.start, (m, d))
        if size == 0:
            return model
        users = self.users[np.nonzero(coalitions)[1]].reshape(m, size, d)
        experts = np.broadcast_to(self.expert, (m, d))
        rounds, errors = (self._streams(coalitions, repeats, purpose) for purpose in range(PURPOSES))
        world = VectorWorld(lambda _: users, experts, self.metric, self.delta, self.noise, errors)
        rules = replace(self.rules, num_groups=min(self.rules.num_groups, size))
        for step in compete(world, model, (m, size), self.grouping, self.scoring, rules, rounds):
            model = step.model
        return model

    def _streams(self, coalitions: np.ndarray, repeats: np.ndarray, purpose: int) -> np.random.Generator:
        names = zip(repeats.tolist(), np.packbits(coalitions, axis=1).tolist(), strict=True)
        generators = [np.random.default_rng(self._stream(purpose, repeat, *members)) for repeat, members in names]
        return cast(np.random.Generator, Streams(generators))

    def _stream(self, *name: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.stream.entropy, spawn_key=(*self.stream.spawn_key, *name))


def protocol_shapley_values(
    game: ProtocolGame,
    *,
    method: str = "auto",
    precision: float = 0.01,
    max_evaluations: int = EVALUATIONS,
    seed: int | np.random.SeedSequence = 0,
) -> ShapleyEstimate:
    """Shapley values of the users, with standard errors of drawing coalitions and of playing them.

    Where a size is drawn in part, the sampled estimator sees the plays' randomness as part of its remainder. Where it
    is drawn whole, it sees none: there it is measured by plays of the same coalition, and added.
    """
    n = len(game.users)
    asked = np.zeros(n + 1, dtype=int)

    def counted(coalitions: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked = asked + np.bincount(coalitions.sum(axis=1), minlength=n + 1)
        return game(coalitions)

    found = game_shapley_values(
        counted,
        n,
        features=game.users,
        method=method,
        precision=precision,
        max_evaluations=max_evaluations if method != "exact" else None,
        seed=seed,
    )
    whole = np.array([size > 0 and asked[size] >= math.comb(n, size) for size in range(n + 1)])
    spread = np.where(whole, play_variances(game, np.flatnonzero(whole)), 0.0)
    added = variance_of_plays(spread / game.repeats)
    return replace(found, standard_errors=np.sqrt(found.standard_errors**2 + added))


def play_variances(game: ProtocolGame, sizes: np.ndarray) -> np.ndarray:
    """(n + 1,): how much plays of one coalition vary, by size; NaN at other sizes. From plays that no value is of."""
    n = len(game.users)
    rng = np.random.default_rng(game._stream(PURPOSES))
    orders = rng.permuted(np.tile(np.arange(n), (len(sizes) * PAIRS, 1)), axis=1)
    coalitions = orders < np.repeat(sizes, PAIRS)[:, None]
    first = game.repeats + 2 * np.tile(np.arange(PAIRS), len(sizes))
    a, b = (game.play(coalitions, first + k) for k in range(2))
    variances = np.full(n + 1, np.nan)
    variances[sizes] = ((a - b) ** 2 / 2).reshape(len(sizes), PAIRS).mean(axis=1)
    return variances


def variance_of_plays(variances: np.ndarray) -> float:
    """Of each Shapley value where every coalition of size t is known up to an error of variances[t], (n + 1,).

    phi_i = (v(N) - v(empty)) / n + sum over sizes of (mean with i - mean without i) / n.
    """
    n = len(variances) - 1
    by_size = [1 / math.comb(n - 1, t - 1) + 1 / math.comb(n - 1, t) for t in range(1, n)]
    return float(variances[1:n] @ np.array(by_size, dtype=float) + variances[n]) / n**2
