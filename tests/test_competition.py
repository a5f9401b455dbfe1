"""Groupings; the vectorised competition and scorings against slow, literal transcriptions for one run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiment.errors import InputError
from tests import literal_attribution
from user_grouping_evaluation_sim import scoring as scorings
from user_grouping_evaluation_sim.competition import NONE, Rules, compete
from user_grouping_evaluation_sim.grouping import GROUPINGS, epsilon_greedy, interleaved
from user_grouping_evaluation_sim.metrics import METRICS
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.scoring import Round, Standing, attributed, marginal, ranked
from user_grouping_evaluation_sim.vector_world import VectorWorld, simulate

LITERAL_METRICS = {
    "l2": lambda a, b: -(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5),
    "l1": lambda a, b: -sum(abs(x - y) for x, y in zip(a, b, strict=True)),
    "dot": lambda a, b: sum(x * y for x, y in zip(a, b, strict=True)),
}


def a_crowd(runs=1, users=11, dimensions=4, seed=3):
    rng = np.random.default_rng(seed)
    return Crowd(
        np.tile(np.arange(users), (runs, 1)),
        rng.uniform(0, 5, (runs, users, dimensions)),
        rng.uniform(0, 5, (runs, dimensions)),
        rng.uniform(0, 5, (runs, dimensions)),
    )


# ------------------------------------------------------------------ the rules for one run, word by word


def literal_cut(ranking, num_groups):
    """The study's cut: consecutive members, the first (n mod G) groups have one more."""
    groups, start = [], 0
    for g in range(num_groups):
        size = len(ranking) // num_groups + (1 if g < len(ranking) % num_groups else 0)
        groups.append(ranking[start : start + size])
        start += size
    return groups


def literal_grouping(name, points, num_groups, progress, rng):
    """Each user's group. Shuffles are asked of the generator as the vectorised grouping does."""
    n = len(points)
    blocks = [g for g, members in enumerate(literal_cut(list(range(n)), num_groups)) for _ in members]
    ranking = sorted(range(n), key=lambda user: (points[user], user))  # fewest points first
    if name == "random":
        return list(rng.permuted(np.array([blocks], dtype=np.int32), axis=1)[0])
    labels = [None] * n
    if name == "epsilon_greedy":
        explore = rng.random(1)[0] < max(0.4, 1 - progress)
        shuffled = list(rng.permuted(np.array([blocks], dtype=np.int32), axis=1)[0])
        if explore:
            return shuffled
        for g, members in enumerate(literal_cut(ranking, num_groups)):
            for user in members:
                labels[user] = g
        return labels
    lower = rng.permuted(np.array([ranking[: n // 2]]), axis=1)[0]
    upper = rng.permuted(np.array([ranking[n // 2 :]]), axis=1)[0]
    for place, user in enumerate(lower):
        labels[user] = place % num_groups
    start = 0 if num_groups <= len(upper) else len(lower)  # else a group would stay empty
    for place, user in enumerate(upper):
        labels[user] = (start + place) % num_groups
    return labels


def literal_ranked(points, labels, gains, best, other, mistaken, num_groups):
    """The study's points in a round that improves: best group G points, the next G - 1, ...; in an error round the best
    candidate first changes places with the other."""
    ranking = sorted(range(len(gains)), key=lambda g: -gains[g])
    if mistaken:
        a, b = ranking.index(best), ranking.index(other)
        ranking[a], ranking[b] = ranking[b], ranking[a]
    earned = {}
    for candidate in ranking:
        if candidate < num_groups:
            earned[candidate] = num_groups - len(earned)
    return [p + earned[g] for p, g in zip(points, labels, strict=True)]


def literal_competition(crowd, grouping, metric, scoring, rules, delta, rng, standings):
    """standings: of the competition under test. Each must be what comes out here, but for rounding, and the next round
    goes on from it: sharp weights would make rounding errors grow from round to round."""
    users, expert, model = crowd.users[0].tolist(), crowd.experts[0].tolist(), crowd.models[0].tolist()
    value = LITERAL_METRICS[metric]
    n, d, num_groups = len(users), len(expert), rules.num_groups
    memory = {"points": [1.0] * n, "merged_weights": None, "group_weights": None}
    history = []
    distances = [-LITERAL_METRICS["l2"](model, expert)]
    all_taken = []
    for t in range(rules.num_rounds):
        points = memory["points"]
        labels = literal_grouping(grouping, points, num_groups, t / rules.num_rounds, rng)
        raw = memory["group_weights"] or [max(p, 0.0) ** 2 for p in points]
        weights = [0.0] * n
        mixtures = []
        for g in range(num_groups):
            members = [i for i in range(n) if labels[i] == g]
            total = sum(raw[i] for i in members)
            for i in members:
                weights[i] = raw[i] / total if total > 0 else 1 / len(members)
            mixtures.append([sum(weights[i] * users[i][k] for i in members) for k in range(d)])
        merged_weights = memory["merged_weights"]
        if merged_weights is not None:
            mixtures.append([sum(merged_weights[i] * users[i][k] for i in range(n)) for k in range(d)])
        candidates = [[m + delta * (c - m) for m, c in zip(model, mix, strict=True)] for mix in mixtures]
        gains = [value(candidate, expert) - value(model, expert) for candidate in candidates]
        best = max(range(len(gains)), key=lambda g: gains[g])
        other = (best + int(rng.integers(1, max(2, len(gains)), 1)[0])) % len(gains)
        mistaken = rng.random(1)[0] < rules.error_probability
        improved = gains[best] > 0
        taken = other if mistaken else best
        if improved:
            model = candidates[taken]
        all_taken.append(taken if improved else NONE)
        rewards = gains[:num_groups]
        merged = None if merged_weights is None else (merged_weights, gains[-1])
        history.append((labels, weights, rewards, merged))
        pay, _, steering = scoring.partition("_")
        if scoring not in ("marginal", "ranked"):  # which attribute nothing
            found = literal_attribution.attributed(memory, history, rules.num_rounds, num_groups)
            memory["state"] = found["state"]
        if steering == "merged" or scoring in ("attributed", "convex"):
            memory |= {name: found[name] for name in ("merged_weights", "group_weights")}
        if pay == "attributed":
            memory["points"] = found["points"]
        elif pay == "convex":
            spread = np.std(found["points"]) or 1.0
            memory["points"] = [float(np.exp((p - np.mean(found["points"])) / spread)) for p in found["points"]]
        elif improved and pay == "ranked":
            memory["points"] = literal_ranked(points, labels, gains, best, other, mistaken, num_groups)
        elif improved:
            memory["points"] = [p + rewards[g] for p, g in zip(points, labels, strict=True)]
        memory |= synchronised(memory, standings[t])
        distances.append(-LITERAL_METRICS["l2"](model, expert))
    return distances, memory["points"], all_taken


def synchronised(memory, standing):
    np.testing.assert_allclose(standing.points[0], memory["points"], rtol=1e-9, atol=1e-9)
    theirs = {"points": standing.points[0].tolist()}
    if standing.estimate is not None:
        theirs["state"] = literal_attribution.state_of(standing.estimate, run=0)
    if memory["merged_weights"] is None:
        assert standing.merged_weights is None
        return theirs
    np.testing.assert_allclose(standing.merged_weights[0], memory["merged_weights"], atol=1e-6)
    return theirs | {"merged_weights": standing.merged_weights[0].tolist()}


@pytest.mark.parametrize("scoring", list(scorings.SCORINGS))
@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("grouping", list(GROUPINGS))
def test_competition_follows_the_rules(grouping, metric, scoring):
    for num_groups, users in ((3, 11), (1, 5), (4, 4)):
        crowd = a_crowd(users=users)
        rules = Rules(num_groups, 40, 0.3)
        functions = GROUPINGS[grouping], METRICS[metric], scorings.SCORINGS[scoring]
        got = simulate(crowd, *functions, rules, np.random.default_rng(5), 0.13)
        world = VectorWorld(lambda _, users=crowd.users: users, crowd.experts, METRICS[metric], 0.13)
        competition = compete(
            world, crowd.models, (1, users), functions[0], functions[2], rules, np.random.default_rng(5)
        )
        standings = [played.standing for played in competition]
        rng = np.random.default_rng(5)
        distances, points, taken = literal_competition(crowd, grouping, metric, scoring, rules, 0.13, rng, standings)
        np.testing.assert_allclose(got.distances[0], distances, rtol=0, atol=1e-9)
        np.testing.assert_allclose(got.points[0], points, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(got.trace.taken, taken)


def turns(points, num_groups, progress, rng):
    """A grouping without randomness, which depends on points and round."""
    order = np.argsort(np.argsort(-points, axis=1, kind="stable"), axis=1)
    return (order + round(progress * 100)) % num_groups


@pytest.mark.parametrize("scoring", [marginal, ranked, attributed])
def test_runs_do_not_touch_each_other(scoring):
    crowd = a_crowd(runs=5)
    rules = Rules(3, 30, error_probability=0)
    together = simulate(crowd, turns, METRICS["l2"], scoring, rules, np.random.default_rng(0))
    for run in range(5):
        one = Crowd(*(field[run : run + 1] for field in vars(crowd).values()))
        alone = simulate(one, turns, METRICS["l2"], scoring, rules, np.random.default_rng(1))
        np.testing.assert_allclose(together.distances[run], alone.distances[0], atol=1e-9)
        np.testing.assert_allclose(together.points[run], alone.points[0], atol=1e-9)


def test_negative_points_do_not_weigh():
    def halved(standing, history, num_rounds):
        return Standing(np.broadcast_to(np.where(np.arange(11) % 2, 1.0, -2.0), (1, 11)).copy())

    # turns() puts the five users with points 1 and the six with -2 evenly into both groups
    trace = simulate(a_crowd(), turns, METRICS["l2"], halved, Rules(2, 2), np.random.default_rng(0)).trace
    assert (trace.weights[1][::2] == 0).all()
    np.testing.assert_allclose(trace.weights[1].sum(), 2)


def test_without_improvement_nothing_changes():
    crowd = a_crowd()
    at_expert = Crowd(crowd.user_ids, crowd.users, crowd.experts, crowd.experts.copy())
    got = simulate(at_expert, GROUPINGS["random"], METRICS["l2"], marginal, Rules(3, 10), np.random.default_rng(0))
    assert (got.distances == 0).all()
    assert (got.points == 1).all()
    assert (got.trace.taken == NONE).all()


def test_error_probability_is_the_share_of_wrong_choices():
    """With probability 1 the best is never taken; with 0.25 the model differs from the best in a quarter of rounds."""
    crowd = a_crowd(runs=400, users=6)
    taken = {}
    for probability in (0.0, 0.25, 1.0):
        rng = np.random.default_rng(2)
        got = simulate(crowd, turns, METRICS["l2"], marginal, Rules(3, 1, error_probability=probability), rng)
        taken[probability] = got.distances[:, 1]
    moved = taken[0.0] != np.linalg.norm(crowd.models - crowd.experts, axis=1)
    assert (taken[1.0] > taken[0.0])[moved].all()
    share = (taken[0.25] != taken[0.0])[moved].mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / moved.sum()) ** 0.5


# ------------------------------------------------------------------ pay by itself


def test_marginal_pays_only_rounds_that_improve():
    labels = np.array([[0, 1, 1], [1, 0, 0]])
    order = np.array([[0, 1], [0, 1]])
    past = Round(labels, np.ones((2, 3)), np.array([[0.5, -0.25], [-1.0, -2.0]]), np.array([True, False]), order)
    paid = marginal(Standing(np.ones((2, 3))), [past], 10)
    np.testing.assert_array_equal(paid.points, [[1.5, 0.75, 0.75], [1, 1, 1]])


def test_ranked_pays_by_the_order_that_was_paid():
    """Two runs of six users in three groups: one without an error, one in which the best and the last changed places;
    in a third run a merged candidate came first, which pays nobody and moves nobody's rank."""
    labels = np.tile([0, 0, 1, 1, 2, 2], (3, 1))
    rewards = np.array([[0.1, 0.3, -0.2]] * 3)
    order = np.array([[1, 0, 2, 3], [2, 0, 1, 3], [3, 1, 0, 2]])
    past = Round(labels, np.full((3, 6), 0.5), rewards, np.array([True, True, True]), order)
    paid = ranked(Standing(np.ones((3, 6))), [past], 10)
    np.testing.assert_array_equal(paid.points - 1, [[2, 2, 3, 3, 1, 1], [2, 2, 1, 1, 3, 3], [2, 2, 3, 3, 1, 1]])


def test_the_order_is_by_gain_but_for_errors():
    """Of fixed gains: without an error the order is theirs, with one the best has changed places with another."""

    class Fixed:
        def propose(self, model, shares, round_number):
            return np.arange(shares.num_groups)

        def gains(self, model, candidates):
            return np.tile([0.1, 0.4, -0.3, 0.2], (200, 1))

        def take(self, model, candidates, taken, improved):
            return model + candidates[taken]

    by_gain = [1, 3, 0, 2]
    for probability in (0.0, 0.5, 1.0):
        rules = Rules(4, 3, probability)
        played = list(
            compete(Fixed(), np.zeros(200), (200, 8), GROUPINGS["random"], ranked, rules, np.random.default_rng(0))
        )
        orders = np.concatenate([step.round.order for step in played])
        taken = np.concatenate([step.taken for step in played])
        np.testing.assert_array_equal(taken, orders[:, 0])
        np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (600, 1)))
        wrong = orders[:, 0] != 1
        assert abs(wrong.mean() - probability) < 4 * (probability * (1 - probability) / 600) ** 0.5 + 1e-12
        np.testing.assert_array_equal(orders[~wrong], np.tile(by_gain, ((~wrong).sum(), 1)))
        for order in orders[wrong]:
            expected = list(by_gain)
            there = expected.index(order[0])
            expected[0], expected[there] = expected[there], expected[0]
            np.testing.assert_array_equal(order, expected)
        np.testing.assert_allclose(played[-1].model, sum(step.taken for step in played))


# ------------------------------------------------------------------ a user's own functions that misbehave


def test_lists_of_labels_are_taken():
    def lists(points, num_groups, progress, rng):
        return [[i % num_groups for i in range(points.shape[1])] for _ in points]

    crowd = a_crowd(runs=2)
    got = simulate(crowd, lists, METRICS["l2"], marginal, Rules(3, 5), np.random.default_rng(0))
    assert np.isfinite(got.distances).all()


@pytest.mark.parametrize(
    "labels, told",
    [
        (np.zeros((1, 6), dtype=int), "empty"),
        (np.array([[0, 1, 2, 3, 0, 1]]), "label 0 to 3"),
        (np.array([[0, 1, 2, -1, 0, 1]]), "label -1 to 2"),
        (np.array([[0, 1, 2, 0, 1]]), "one group"),
        (np.array([[0.0, 1, 2, 0, 1, 2]]), "one group"),
        ([[[0, 1], [1, 2], [2, 3, 4, 5]]], "ragged"),  # members by group, user 1 and 2 in two of them
        (np.array([[[0, 1], [1, 2], [4, 5]]]), "one group"),
    ],
)
def test_bad_groups_are_refused(labels, told):
    crowd = a_crowd(users=6)
    with pytest.raises(InputError, match=told):
        simulate(crowd, lambda *_: labels, METRICS["l2"], marginal, Rules(3, 2), np.random.default_rng(0))


def test_numbers_that_are_not_finite_are_refused():
    crowd = a_crowd(users=6)
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="the metric"):
        simulate(crowd, turns, lambda a, b: (a - b).sum(axis=-1) * np.nan, marginal, Rules(3, 2), rng)
    with pytest.raises(InputError, match="the scoring"):
        nan_points = Standing(np.full((1, 6), np.nan))
        simulate(crowd, turns, METRICS["l2"], lambda *_: nan_points, Rules(3, 2), rng)
    with pytest.raises(InputError, match="merged weights"):
        heavy = Standing(np.ones((1, 6)), merged_weights=np.ones((1, 6)))
        simulate(crowd, turns, METRICS["l2"], lambda *_: heavy, Rules(3, 2), rng)
    for unknown in ({"brings": np.full((1, 6), np.nan)}, {"group_weights": np.full((1, 6), np.nan)}):
        with pytest.raises(InputError, match="the scoring"):
            standing = Standing(np.ones((1, 6)), **unknown)
            simulate(crowd, turns, METRICS["l2"], lambda *_, it=standing: it, Rules(3, 2), rng)
    with pytest.raises(InputError, match="group weights below 0"):
        heavy = Standing(np.ones((1, 6)), group_weights=np.array([[1, 1, 1, 1, 1, -1.0]]))
        simulate(crowd, turns, METRICS["l2"], lambda *_: heavy, Rules(3, 2), rng)


# ------------------------------------------------------------------ groupings


@st.composite
def crowds(draw):
    """(points (runs, users), num_groups, progress, seed), often with ties."""
    users = draw(st.integers(1, 30))
    runs = draw(st.integers(1, 4))
    number = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))
    points = draw(st.lists(number, min_size=runs * users, max_size=runs * users))
    groups = draw(st.integers(1, users))
    return np.reshape(points, (runs, users)), groups, draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 99))


@pytest.mark.parametrize("name", list(GROUPINGS))
@settings(max_examples=60, deadline=None)
@given(crowds())
def test_every_user_is_in_one_group_of_the_studys_sizes(name, crowd):
    points, num_groups, progress, seed = crowd
    before = points.copy()
    labels = GROUPINGS[name](points, num_groups, progress, np.random.default_rng(seed))
    assert labels.shape == points.shape
    assert labels.dtype.kind == "i"
    users = points.shape[1]
    expected = [len(range(g, users, num_groups)) for g in range(num_groups)]
    if name == "interleaved" and num_groups <= users - users // 2:  # each half dealt from group 0
        halves = users // 2, users - users // 2
        expected = [sum(len(range(g, half, num_groups)) for half in halves) for g in range(num_groups)]
    for row in labels:
        np.testing.assert_array_equal(np.bincount(row, minlength=num_groups), expected)
    np.testing.assert_array_equal(points, before)
    again = GROUPINGS[name](points, num_groups, progress, np.random.default_rng(seed))
    np.testing.assert_array_equal(labels, again)


class NeverExplores(np.random.Generator):
    """A generator whose uniform numbers are all 1, so that no epsilon is above them."""

    def random(self, size):
        return np.ones(size)


@settings(max_examples=60, deadline=None)
@given(crowds())
def test_epsilon_greedy_exploits_by_sorted_blocks(crowd):
    points, num_groups, progress, seed = crowd
    labels = epsilon_greedy(points, num_groups, progress, NeverExplores(np.random.PCG64(seed)))
    for row, groups in zip(points, labels, strict=True):
        for fewer in range(num_groups - 1):
            assert row[groups == fewer].max() <= row[groups == fewer + 1].min()


@pytest.mark.parametrize("progress, epsilon", [(0.0, 1.0), (0.3, 0.7), (0.55, 0.45), (0.6, 0.4), (0.99, 0.4)])
def test_epsilon_greedy_explores_at_the_rate_of_the_protocol(progress, epsilon):
    runs = 4000
    points = np.tile(np.arange(12.0), (runs, 1))
    labels = epsilon_greedy(points, 3, progress, np.random.default_rng(0))
    sorted_blocks = (labels == np.repeat([0, 1, 2], 4)).all(axis=1).mean()
    # a random split equals the sorted one once in 34,650
    assert abs((1 - sorted_blocks) - epsilon) <= 4 * (epsilon * (1 - epsilon) / runs) ** 0.5 + 1e-3


@settings(max_examples=60, deadline=None)
@given(crowds())
def test_interleaved_spreads_both_halves_over_the_groups(crowd):
    points, num_groups, progress, seed = crowd
    labels = interleaved(points, num_groups, progress, np.random.default_rng(seed))
    users = points.shape[1]
    for row, groups in zip(points, labels, strict=True):
        ranking = sorted(range(users), key=lambda user: (row[user], user))
        for half in (ranking[: users // 2], ranking[users // 2 :]):
            counts = np.bincount(groups[half], minlength=num_groups)
            assert counts.max() - counts.min() <= 1


def test_random_and_interleaved_reach_every_group_alike():
    """Each user lands in each of 4 groups in a quarter of the runs, where 4 divides both halves."""
    runs = 4000
    points = np.tile(np.arange(16.0), (runs, 1))
    for name in ("random", "interleaved"):
        labels = GROUPINGS[name](points, 4, 0.5, np.random.default_rng(1))
        shares = (labels[:, :, None] == np.arange(4)).mean(axis=0)
        assert np.abs(shares - 0.25).max() < 5 * (0.25 * 0.75 / runs) ** 0.5


def test_random_ignores_points():
    rng = np.random.default_rng
    one, other = np.zeros((3, 9)), np.arange(27.0).reshape(3, 9)
    same = GROUPINGS["random"](one, 4, 0.1, rng(2)), GROUPINGS["random"](other, 4, 0.9, rng(2))
    np.testing.assert_array_equal(*same)
