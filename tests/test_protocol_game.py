"""The protocol game against competitions played one by one, its Shapley values against their definition."""

import itertools
import math

import numpy as np
import pytest

from experiment.errors import InputError
from user_grouping_evaluation_sim.competition import Rules
from user_grouping_evaluation_sim.grouping import GROUPINGS
from user_grouping_evaluation_sim.metrics import METRICS
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.protocol_game import (
    ProtocolGame,
    Streams,
    play_variances,
    protocol_shapley_values,
    variance_of_plays,
)
from user_grouping_evaluation_sim.scoring import SCORINGS
from user_grouping_evaluation_sim.vector_world import simulate


def a_game(users=4, grouping="random", metric="l2", scoring="marginal", rounds=7, groups=2, seed=3, **more):
    rng = np.random.default_rng(seed)
    points, expert, start = rng.uniform(0, 5, (users, 3)), rng.uniform(0, 5, 3), rng.uniform(0, 5, 3)
    functions = GROUPINGS[grouping], METRICS[metric], SCORINGS[scoring]
    rules = Rules(groups, rounds, error_probability=0.3)
    return ProtocolGame(points, expert, start, *functions, rules, np.random.SeedSequence(seed), **more)


def every_coalition(users):
    return np.array(list(itertools.product([False, True], repeat=users)))


def literal_value(game, coalition, repeat=0):
    """One coalition's competition by the library's own simulate, with the two generators that its name gives."""
    if not coalition.any():
        return float(game.metric(game.start, game.expert))
    members = np.flatnonzero(coalition)
    crowd = Crowd(members[None], game.users[members][None], game.expert[None], game.start[None])
    rounds, errors = (
        np.random.default_rng(
            np.random.SeedSequence(
                game.stream.entropy,
                spawn_key=(*game.stream.spawn_key, purpose, repeat, *np.packbits(coalition).tolist()),
            )
        )
        for purpose in range(2)
    )
    rules = Rules(min(game.rules.num_groups, len(members)), game.rules.num_rounds, game.rules.error_probability)
    found = simulate(
        crowd, game.grouping, game.metric, game.scoring, rules, rounds, game.delta, noise=game.noise, errors=errors
    )
    return float(game.metric(found.trace.models[-1], game.expert))


@pytest.mark.parametrize("grouping", list(GROUPINGS))
@pytest.mark.parametrize("scoring", ["marginal", "ranked", "attributed", "attributed_squared"])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_value_is_what_its_members_reach_alone(grouping, scoring, noise):
    game = a_game(grouping=grouping, scoring=scoring, noise=noise, groups=3)
    coalitions = every_coalition(4)
    np.testing.assert_allclose(game(coalitions), [literal_value(game, s) for s in coalitions], rtol=1e-9)


@pytest.mark.parametrize("metric", ["l1", "dot"])
def test_repeats_are_plays_of_their_own(metric):
    game = a_game(metric=metric, noise=0.3, repeats=3)
    coalitions = every_coalition(4)[[3, 7, 15, 0]]
    by_hand = [np.mean([literal_value(game, s, repeat) for repeat in range(3)]) for s in coalitions]
    np.testing.assert_allclose(game(coalitions), by_hand, rtol=1e-9)
    plays = [game.play(coalitions[:3], np.full(3, repeat)) for repeat in range(3)]
    assert len({play.tobytes() for play in plays}) == 3


@pytest.mark.parametrize("scoring", ["marginal", "attributed"])
def test_a_coalition_is_worth_the_same_in_any_company(scoring, monkeypatch):
    game = a_game(users=6, scoring=scoring, noise=0.1)
    coalitions = every_coalition(6)
    values = game(coalitions)
    order = np.random.default_rng(0).permutation(len(coalitions))
    np.testing.assert_array_equal(game(coalitions[order]), values[order])
    np.testing.assert_array_equal(game(coalitions[37:38]), values[37:38])
    monkeypatch.setattr("user_grouping_evaluation_sim.protocol_game.NUMBERS_A_BATCH", 500)
    np.testing.assert_array_equal(game(coalitions), values)
    assert len(np.unique(game(coalitions[-1:].repeat(3, axis=0)))) == 1
    other = a_game(users=6, scoring=scoring, noise=0.1, seed=4)
    assert (other(coalitions) != values).all()


def test_values_are_the_mean_of_what_users_add_in_every_order():
    game = a_game()
    worth = {tuple(s.tolist()): literal_value(game, s) for s in every_coalition(4)}
    added = np.zeros(4)
    for order in itertools.permutations(range(4)):
        there = [False] * 4
        for user in order:
            before = worth[tuple(there)]
            there[user] = True
            added[user] += worth[tuple(there)] - before
    found = protocol_shapley_values(game)
    assert (found.method, found.evaluations) == ("exact", 16)
    np.testing.assert_allclose(found.values, added / math.factorial(4), rtol=1e-9)


def test_a_sample_agrees_with_enumeration_within_its_errors():
    game = a_game(users=9, rounds=10, noise=0.1)
    exact = protocol_shapley_values(game)
    away = []
    for seed in range(4):
        sampled = protocol_shapley_values(game, method="stratified", max_evaluations=200, seed=seed)
        assert sampled.evaluations <= 200
        away.append((sampled.values - exact.values) / sampled.standard_errors)
    assert 0.2 < np.sqrt(np.mean(np.square(away))) < 1.3


def test_standard_errors_of_played_coalitions():
    """Exact values of the same crowd, its plays drawn anew, vary by what the errors say."""
    games = [a_game(users=4, noise=0.5, seed=3) for _ in range(60)]
    games = [ProtocolGame(**{**vars(game), "stream": np.random.SeedSequence(100 + i)}) for i, game in enumerate(games)]
    found = [protocol_shapley_values(game) for game in games]
    spread = np.var([one.values for one in found], axis=0, ddof=1).mean()
    said = np.mean([one.standard_errors**2 for one in found])
    assert said == pytest.approx(spread, rel=0.3)
    assert said > 0


def test_variance_of_plays_is_that_of_the_weights():
    """Against the sum over coalitions of squared Shapley weights, by enumeration."""
    n, rng = 5, np.random.default_rng(1)
    variances = np.concatenate([[0], rng.uniform(0.1, 1, n)])
    by_hand = 0.0
    for coalition in every_coalition(n):
        size = int(coalition.sum())
        i_in, before = bool(coalition[0]), size - bool(coalition[0])
        weight = math.factorial(before) * math.factorial(n - before - 1) / math.factorial(n)
        by_hand += (weight if i_in else -weight) ** 2 * variances[size]
    assert variance_of_plays(variances) == pytest.approx(by_hand)


def test_plays_without_chance_do_not_vary():
    """One user alone makes one candidate; three are grouped at random."""
    variances = play_variances(a_game(users=3), np.array([1, 3]))
    assert variances[1] == 0
    assert variances[3] > 0
    assert np.isnan(variances[[0, 2]]).all()


def test_a_draw_has_a_row_a_run():
    streams = Streams([np.random.default_rng(seed) for seed in (1, 2, 3)])
    alone = [np.random.default_rng(seed) for seed in (1, 2, 3)]
    for got, wanted in (
        (streams.random(3), [rng.random() for rng in alone]),
        (streams.integers(1, 9, 3), [rng.integers(1, 9) for rng in alone]),
        (streams.standard_normal((3, 2)), [rng.standard_normal(2) for rng in alone]),
        (streams.uniform(2, 3, (3, 1)), [rng.uniform(2, 3, 1) for rng in alone]),
        (streams.normal(2, 3, 3), [rng.normal(2, 3) for rng in alone]),
    ):
        np.testing.assert_array_equal(got, wanted)
    with pytest.raises(InputError, match="a draw of 4 rows, where each of 3 runs has one"):
        streams.random(4)
    with pytest.raises(InputError, match="method permutation draws no row a run; take random, standard_normal"):
        streams.permutation(3)
