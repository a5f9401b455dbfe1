"""The mixed linear model behind attributed points: against a literal transcription, a dense solution, linear worlds."""

from functools import partial

import numpy as np
import pytest

from tests import literal_attribution
from user_grouping_evaluation_sim import attribution
from user_grouping_evaluation_sim.attribution import attribute, standard_errors
from user_grouping_evaluation_sim.scoring import SCORINGS, Round, Standing, attributed


def random_history(rng, runs, users, num_groups, rounds, beta=None, error=0.0):
    """Rounds of random groups and weights. With beta (R, n) rewards are linear, with a common shift and errors."""
    history = []
    for t in range(rounds):
        labels = rng.permuted(np.tile(np.arange(users) % num_groups, (runs, 1)), axis=1)
        weights = rng.uniform(0.2, 1, (runs, users))
        one_hot = labels[:, None] == np.arange(num_groups)[:, None]
        weights /= np.take_along_axis(np.einsum("rgn,rn->rg", one_hot, weights), labels, axis=1)
        rewards = rng.normal(size=(runs, num_groups))
        if beta is not None:
            rewards = np.einsum("rgn,rn->rg", one_hot, weights * beta) + rng.normal(size=(runs, 1))
            rewards += error * rng.normal(size=(runs, num_groups))
        merged = (None, None)
        if beta is None and 2 * t > rounds and t % 3 == 2:
            merged = rng.dirichlet(np.ones(users), runs), rng.normal(size=runs)
        order = np.argsort(-rewards, axis=1)
        history.append(Round(labels, weights, rewards, np.ones(runs, dtype=bool), order, *merged))
    return history


def of_run(history, run):
    return [
        (
            past.labels[run].tolist(),
            past.weights[run].tolist(),
            past.rewards[run].tolist(),
            None if past.merged_weights is None else (past.merged_weights[run].tolist(), past.merged_reward[run]),
        )
        for past in history
    ]


def attributed_history(history, measured):
    found = None
    for t in range(len(history)):
        found = attribute(found, history[: t + 1], measured)
    return found


@pytest.mark.parametrize("users, num_groups, num_rounds", [(7, 2, 25), (12, 4, 30), (5, 5, 9), (3, 1, 12)])
def test_attributed_is_its_transcription(users, num_groups, num_rounds):
    runs = 2
    history = random_history(np.random.default_rng(1), runs, users, num_groups, num_rounds)
    standing = Standing(np.ones((runs, users)))
    memory = [{}] * runs
    for t in range(num_rounds):
        standing = attributed(standing, history[: t + 1], num_rounds)
        for run in range(runs):
            memory[run] = literal_attribution.attributed(
                memory[run], of_run(history[: t + 1], run), num_rounds, num_groups
            )
            np.testing.assert_allclose(standing.points[run], memory[run]["points"], atol=1e-9)
            if memory[run]["merged_weights"] is None:
                assert standing.merged_weights is None
            else:
                np.testing.assert_allclose(standing.merged_weights[run], memory[run]["merged_weights"], atol=1e-7)


def test_replayed_rounds_give_what_matrices_give(monkeypatch):
    history = random_history(np.random.default_rng(2), 2, 15, 3, 20)
    monkeypatch.setattr(attribution, "PROBES", 1)
    dense = attributed_history(history, 12)
    monkeypatch.setattr(attribution, "MOST_DENSE", 0)
    replayed = attributed_history(history, 12)
    assert replayed.strata[0, 0].gram is None and dense.strata[0, 0].gram is not None
    for name in ("errors", "spread", "drift", "solved"):
        np.testing.assert_allclose(getattr(replayed, name), getattr(dense, name), rtol=1e-8, atol=1e-10)


def test_runs_beside_a_run_do_not_change_it():
    """As a ledger replays one run of many: with more users than MOST_DENSE, and with as many."""
    for users in (30, attribution.MOST_DENSE + 3):
        history = random_history(np.random.default_rng(4), 60, users, 3, 4)
        (first,) = attributed_history([past_of(past, 0) for past in history], 3).shares
        np.testing.assert_allclose(attributed_history(history, 3).shares[0], first, rtol=1e-9, atol=1e-12)


def past_of(past, run):
    return Round(*(None if part is None else part[run : run + 1] for part in vars(past).values()))


def test_where_most_rewards_are_equal_the_others_say_all():
    rewards = np.array([[[0, 0, 0, 1.0]], [[0, 0, 2.0, 0]]])
    np.testing.assert_array_equal(attribution.without_outliers(rewards), rewards[-1])
    far = np.array([[[0.0, 1, 2, 3]], [[0, 1, 2, 1e6]]])
    np.testing.assert_allclose(attribution.without_outliers(far), [[0, 1, 2, 11.5]])  # 1.5 + 10 medians of 1


def test_coefficients_and_variances_settle_where_a_dense_solution_is(monkeypatch):
    """With exact traces expectation maximisation would stand still there; with these signs nearly."""
    rng = np.random.default_rng(3)
    users, rounds = 20, 60
    history = random_history(rng, 1, users, 4, rounds, rng.normal(size=(1, users)), error=0.5)
    monkeypatch.setattr(attribution, "ITERATIONS", 100)
    found = attributed_history(history, 40)
    normal = partial(attribution._normal, found.strata, history, 40)
    for _ in range(200):  # the same rounds again and again: only the variances move
        found = attribution._solve(attribution._with_variances(found), normal)
    for key, product in normal(found.solved).items():  # kept from step to step, and still what it is to be
        np.testing.assert_allclose(found.products[key], product, rtol=1e-8, atol=1e-8)
    rows = literal_attribution.equations(of_run(history, 0), 4, 40)
    state = {"errors": found.errors[:, 0], "spread": found.spread[0], "drift": found.drift[0]}
    matrix, right = literal_attribution.system(rows, state, users)
    beta, *drifts = np.linalg.solve(matrix, right).reshape(3, users)
    np.testing.assert_allclose(found.shares[0], beta + drifts[0], atol=1e-8)
    # 0.5 / sqrt(G) of it is the groups' mean's; what is drawn twice as spread as that says so.
    assert found.errors[0, 0] == pytest.approx(0.25, rel=0.25)
    assert found.spread[0] == pytest.approx(1.0, rel=0.6)
    assert found.drift[0] < 0.3 * found.spread[0]


@pytest.mark.parametrize("users, num_groups", [(8, 3), (12, 2), (20, 5)])
def test_a_linear_world_is_recovered(users, num_groups):
    rng = np.random.default_rng(4)
    beta = rng.normal(size=(2, users))
    history = random_history(rng, 2, users, num_groups, 400, beta)
    standing = Standing(np.ones((2, users)))
    for t in range(400):
        standing = SCORINGS["attributed_squared"](standing, history[: t + 1], 400)
    found = standing.points - standing.points.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found, beta - beta.mean(axis=1, keepdims=True), atol=0.02)


def test_errors_shrink_and_silence_is_known():
    """More noise, smaller estimates (the ridge's shrinkage) and larger standard errors; who never took part has 0."""
    rng = np.random.default_rng(5)
    beta = rng.normal(size=(4, 30))
    sizes, errors = [], []
    for error in (0.05, 0.5, 2.0):
        found = attributed_history(random_history(np.random.default_rng(6), 4, 30, 3, 60, beta, error), 60)
        sizes.append(found.shares.std())
        errors.append(standard_errors(found).mean() / found.shares.std())
    assert sizes[0] > sizes[1] > sizes[2] and errors[0] < errors[1] < errors[2]
    history = random_history(rng, 1, 6, 2, 30, beta[:1, :6], 0.1)
    silent = [
        Round(p.labels, np.where(np.arange(6) == 5, 0.0, p.weights), p.rewards, p.improved, p.order) for p in history
    ]
    assert attributed_history(silent, 30).shares[0, 5] == 0


def test_users_who_are_all_alike_bring_the_same():
    """No reward differs from another: there is nothing to learn, and no number overflows."""
    rng = np.random.default_rng(9)
    history = [
        Round(p.labels, p.weights, np.full_like(p.rewards, 0.3), p.improved, p.order)
        for p in random_history(rng, 2, 6, 2, 400)
    ]
    standing = Standing(np.ones((2, 6)))
    for t in range(400):
        standing = attributed(standing, history[: t + 1], 400)
    np.testing.assert_array_equal(standing.points, 1)
    assert np.isfinite(standing.errors).all() and standing.merged_weights == pytest.approx(np.full((2, 6), 1 / 6))


@pytest.mark.parametrize("error, rounds", [(0.2, 80), (1.0, 80)])
def test_standard_errors_cover_repeats(error, rounds):
    """95 % intervals round a run's shares hold the mean of other runs with the same users in 90 to 98 %."""
    rng = np.random.default_rng(7)
    repeats, users = 60, 24
    beta = np.tile(rng.normal(size=users), (repeats, 1))
    found = attributed_history(random_history(rng, repeats, users, 4, rounds, beta, error), rounds)
    others = (found.shares.sum(axis=0) - found.shares) / (repeats - 1)
    errors = standard_errors(found)
    assert 0.9 <= (np.abs(found.shares - others) < 1.96 * errors * (1 + 1 / repeats) ** 0.5).mean() <= 0.98


def test_standard_errors_of_replayed_rounds_are_an_upper_bound(monkeypatch):
    rng = np.random.default_rng(8)
    history = random_history(rng, 3, 40, 4, 60, rng.normal(size=(3, 40)), 0.5)
    exact = standard_errors(attributed_history(history, 60))
    monkeypatch.setattr(attribution, "MOST_DENSE", 0)
    bound = standard_errors(attributed_history(history, 60))
    assert exact.mean() <= bound.mean() <= 4 * exact.mean()
