"""Strategies of users who do not play along, and the audit: known answers."""

import numpy as np
import pytest

from user_grouping_evaluation_sim import incentives, payout
from user_grouping_evaluation_sim.competition import Rules, compete
from user_grouping_evaluation_sim.grouping import random
from user_grouping_evaluation_sim.incentives import ACCOUNTS, STRATEGIES, Scene, chosen_users, quotient, ratio_interval
from user_grouping_evaluation_sim.metrics import l2
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.scoring import SCORINGS
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.vector_world import VectorWorld, simulate


def a_crowd(runs=3, users=8, dimensions=4, seed=1):
    rng = np.random.default_rng(seed)
    ids = np.tile(np.arange(users), (runs, 1))
    return Crowd(ids, rng.uniform(0, 5, (runs, users, dimensions)), *rng.uniform(0, 5, (2, runs, dimensions)))


def a_scene(crowd, count=1, rounds=20):
    runs, users, _ = crowd.users.shape
    rng = np.random.default_rng(2)
    chosen = rng.permuted(np.tile(np.arange(users), (runs, 1)), axis=1)[:, :count]
    return Scene(crowd.users, chosen, np.zeros(runs, dtype=int), rounds, rng)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_strategy_leaves_all_others_alone(name):
    crowd = a_crowd()
    scene = a_scene(crowd, count=2)
    play = STRATEGIES[name][0](scene)
    for t in (0, 7, 8, 19):
        vectors = play.conduct.vectors(t)
        runs, users, _ = vectors.shape
        theirs = np.zeros((runs, users), dtype=bool)
        np.put_along_axis(theirs, play.accounts, True, axis=1)
        n = crowd.users.shape[1]
        np.testing.assert_array_equal(vectors[:, :n][~theirs[:, :n]], crowd.users[~theirs[:, :n]])
        assert theirs[:, n:].all()
        if play.conduct.here is not None:
            assert play.conduct.here(t)[~theirs].all()
    if play.stays:
        np.testing.assert_array_equal(play.conduct.vectors(0), play.conduct.vectors(19))


def test_moves_by_hand():
    users = np.array([[[0.0, 5.0], [1.0, 4.0], [2.0, 2.0]]])
    scene = Scene(users, np.array([[1]]), np.array([0]), 10, np.random.default_rng(0))

    def own(strategy, t=0):
        play = strategy(scene)
        return play.conduct.vectors(t)[0, play.accounts[0]].tolist()

    assert own(incentives.honest) == [[1, 4]]
    assert own(incentives.zero_vector) == [[0, 0]]
    assert own(incentives.mirror) == [[4, 1]]
    assert own(incentives.farthest_corner) == [[5, 0]]
    assert own(incentives.exaggerate) == [[-0.5, 5.5]]
    assert own(incentives.times_100) == [[100, 400]]
    assert own(incentives.copy_best) == [[0, 5]]
    assert own(incentives.copy_random)[0] in ([0, 5], [2, 2])
    assert own(incentives.sybil) == [[1, 4]] * ACCOUNTS
    assert own(incentives.turncoat, 3) == [[1, 4]] and own(incentives.turncoat, 4) == [[4, 1]]
    assert [bool(incentives.leave(scene).conduct.here(t)[0, 1]) for t in (0, 1, 9)] == [True, False, False]
    assert [bool(incentives.join_late(scene).conduct.here(t)[0, 1]) for t in (0, 3, 4)] == [False, False, True]


def test_who_is_away_weighs_nothing():
    crowd = a_crowd(users=7)
    gone = np.zeros((3, 7), dtype=bool)
    gone[:, :2] = True
    world = VectorWorld(lambda _: crowd.users, crowd.experts, l2)
    for scoring in SCORINGS.values():
        rng = np.random.default_rng(0)
        for step in compete(world, crowd.models, (3, 7), random, scoring, Rules(2, 30), rng, lambda _: ~gone):
            weights = step.round.weights
            sums = [np.bincount(own, w, 2) for own, w in zip(step.round.labels, weights, strict=True)]
            np.testing.assert_allclose(sums, 1)
            assert (weights[:, :2] == 0).all()
            if step.round.merged_weights is not None:
                assert (step.round.merged_weights[:, :2] == 0).all()
                np.testing.assert_allclose(step.round.merged_weights.sum(axis=1), 1)


@pytest.mark.parametrize("name", list(SCORINGS))
def test_who_leaves_after_a_round_is_paid_next_to_nothing(name):
    crowd = a_crowd(users=12)
    play = incentives.leave(a_scene(crowd, rounds=30))
    options = random, l2, SCORINGS[name], Rules(2, 30)
    pay = simulate(crowd, *options, np.random.default_rng(0), conduct=play.conduct).pay
    left = np.take_along_axis(pay, play.accounts, axis=1)[:, 0]
    assert (left <= 0.05 * pay.mean(axis=1)).all() and (pay.sum(axis=1) > 0).all()


def test_equal_pay_gains_a_sybil_exactly_what_accounts_say():
    """kn / (n + k - 1), with a budget ratio of 1."""
    budget = np.array([10**12])
    for n in (3, 10, 75):
        for k in (2, ACCOUNTS):
            pay = payout.allotted(budget, np.ones((1, n + k - 1)))[0]
            honest = payout.allotted(budget, np.ones((1, n)))[0]
            assert pay.sum() == honest.sum() == budget[0]
            assert pay[:k].sum() / honest[0] == pytest.approx(k * n / (n + k - 1), rel=1e-9)


def test_a_quotient_takes_a_sybils_gain_away():
    crowd = a_crowd(runs=1, users=10)
    scene = a_scene(crowd)
    play = incentives.sybil(scene)
    first = quotient(play.conduct.vectors(0)[0], 0.0)
    me = scene.chosen[0, 0]
    assert set(first[play.accounts[0]]) == {me} and (first[:10] == np.arange(10)).all()

    def paid(users):
        one = Crowd(np.arange(len(users))[None], users[None], crowd.experts, crowd.models)
        return simulate(one, random, l2, SCORINGS["attributed"], Rules(2, 30), np.random.default_rng(3)).pay[0]

    honest, pay = paid(crowd.users[0]), np.zeros(14)
    pay[np.unique(first)] = paid(play.conduct.vectors(0)[0, np.unique(first)])
    split = incentives.split_by(first, pay)
    assert split.sum() == pytest.approx(honest.sum())
    assert split[play.accounts[0]].sum() == pytest.approx(honest[me])
    np.testing.assert_allclose(split[play.accounts[0]], split[me])


def test_quotient_merges_chains():
    line = np.array([[0.0, 0], [9, 0], [1, 0], [2, 0], [9, 0.5]])
    np.testing.assert_array_equal(quotient(line, 1.0), [0, 1, 0, 0, 1])
    np.testing.assert_array_equal(quotient(line, 0.4), np.arange(5))


def test_a_copys_shapley_values_are_equal_by_enumeration():
    crowd = a_crowd(runs=1, users=7)
    users = incentives.sybil(a_scene(crowd)).conduct.vectors(0)[0]
    values = shapley_values(users, crowd.experts[0], "l2", method="exact").values
    me = a_scene(crowd).chosen[0, 0]
    np.testing.assert_allclose(values[7:], values[me])


def test_chosen_by_shapley_value():
    values = np.array([[3.0, 1.0, 2.0, 0.0]])
    rng = np.random.default_rng(0)
    assert sorted(chosen_users("best 2", values, rng)[0]) == [0, 2]
    assert sorted(chosen_users("worst 3", values, rng)[0]) == [1, 2, 3]
    drawn = {int(chosen_users("random 1", values, np.random.default_rng(s))[0, 0]) for s in range(40)}
    assert drawn == {0, 1, 2, 3}


def test_ratio_intervals_cover():
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(2000):
        theirs = rng.gamma(4, 1, 30)
        ours = 0.5 * theirs + rng.normal(0, 1, 30)
        _, low, high = ratio_interval(ours, theirs)
        covered.append(low <= 0.5 <= high)
    assert 0.92 <= np.mean(covered) <= 0.97
    assert np.isnan(ratio_interval(np.ones(3), np.zeros(3))).all()
