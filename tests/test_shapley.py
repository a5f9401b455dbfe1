"""Shapley values against enumeration by the definition, shap's exact explainer, and the axioms."""

import itertools
import math

import numpy as np
import pytest

from experiment.errors import InputError
from user_grouping_evaluation_sim.metrics import METRICS, dot, l1, l2
from user_grouping_evaluation_sim.shapley import METHODS, game_shapley_values, shapley_values
from user_grouping_evaluation_sim.shapley_models import trees
from user_grouping_evaluation_sim.shapley_sampling import of_many_sizes


def saturating(a, b):
    """A user's own metric: neither a distance nor smooth everywhere."""
    return np.tanh((a * b).mean(axis=-1)) - 0.3 * np.abs(a - b).max(axis=-1) ** 1.5


ALL_METRICS = {**METRICS, "own": saturating}


def a_game(users, dimensions=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 5, (users, dimensions)), rng.uniform(0, 5, dimensions)


def by_definition(points, expert, metric):
    """phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)), with a dictionary of coalitions."""
    n = len(points)
    worth = {}
    for size in range(n + 1):
        for members in itertools.combinations(range(n), size):
            mean = sum((points[i] for i in members), np.zeros(points.shape[1])) / max(size, 1)
            worth[frozenset(members)] = float(metric(mean, expert))
    values = np.zeros(n)
    for members, value in worth.items():
        for i in range(n):
            if i not in members:
                s = len(members)
                weight = math.factorial(s) * math.factorial(n - s - 1) / math.factorial(n)
                values[i] += weight * (worth[members | {i}] - value)
    return values


@pytest.fixture(scope="module")
def ten():
    points, expert = a_game(10)
    return points, expert, {name: by_definition(points, expert, metric) for name, metric in ALL_METRICS.items()}


@pytest.mark.parametrize("name", list(ALL_METRICS))
def test_exact_is_the_definition(ten, name):
    points, expert, values = ten
    got = shapley_values(points, expert, ALL_METRICS[name], method="exact")
    np.testing.assert_allclose(got.values, values[name], atol=1e-9)
    assert (got.standard_errors == 0).all()
    assert (got.evaluations, got.method) == (2**10, "exact")


def test_closed_form_is_the_definition(ten):
    points, expert, values = ten
    np.testing.assert_allclose(shapley_values(points, expert, dot, method="closed_form").values, values["dot"])


def test_kernel_is_the_definition_where_it_can_see_all_coalitions(ten):
    points, expert, values = ten
    for name, metric in ALL_METRICS.items():
        got = shapley_values(points, expert, metric, method="kernel")
        np.testing.assert_allclose(got.values, values[name], atol=1e-6)
        assert np.isnan(got.standard_errors).all()


@pytest.mark.parametrize("method", ["stratified", "permutation"])
@pytest.mark.parametrize("name", list(ALL_METRICS))
def test_sampling_is_within_its_standard_errors(ten, name, method):
    points, expert, values = ten
    for seed in range(8):
        budget = {"precision": 0.02} if method == "stratified" else {"max_evaluations": 5000}
        got = shapley_values(points, expert, ALL_METRICS[name], method=method, seed=seed, **budget)
        # 10 users x 8 seeds: beyond 5 standard errors once in 20,000 times; the first term is for rounding
        assert (np.abs(got.values - values[name]) < 1e-9 + 5 * got.standard_errors).all()
        assert got.standard_errors.max() < (0.03 if method == "stratified" else 0.4) * values[name].std()


@pytest.mark.parametrize("method, name", [("stratified", "l2"), ("stratified", "l1"), ("permutation", "own")])
def test_standard_errors_are_honest(method, name):
    """Squared errors, in units of the standard error squared, are 1 on average; unbiased: their mean is 0."""
    points, expert = a_game(14, seed=5)
    metric = ALL_METRICS[name]
    truth = shapley_values(points, expert, metric, method="exact").values
    repeats = [
        shapley_values(points, expert, metric, method=method, seed=seed, precision=0.01, max_evaluations=2000)
        for seed in range(60)
    ]
    z = np.array([(one.values - truth) / one.standard_errors for one in repeats])
    assert 0.75 < (z**2).mean() < 1.3
    assert np.abs(z.mean(axis=0)).max() < 4.5 / 60**0.5
    assert 0.92 < (np.abs(z) < 1.96).mean() < 0.98


@pytest.mark.parametrize("users", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("method", ["exact", "stratified", "permutation", "kernel", "auto"])
@pytest.mark.parametrize("name", list(ALL_METRICS))
def test_small_crowds(users, method, name):
    points, expert = a_game(users, seed=users)
    metric = ALL_METRICS[name]
    got = shapley_values(points, expert, metric, method=method, max_evaluations=4000, seed=1)
    truth = by_definition(points, expert, metric)
    allowed = 1e-7 + 5 * np.nan_to_num(got.standard_errors)
    assert (np.abs(got.values - truth) <= allowed).all()
    if users == 1:
        assert got.values[0] == pytest.approx(metric(points[0], expert) - metric(np.zeros(4), expert))


def test_closed_form_of_few():
    for users in range(1, 5):
        points, expert = a_game(users)
        np.testing.assert_allclose(
            shapley_values(points, expert, dot).values, by_definition(points, expert, dot), atol=1e-12
        )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "closed_form"])
@pytest.mark.parametrize("name", list(ALL_METRICS))
def test_efficiency(method, name):
    """The values sum to v(N) - v(empty), for the sampling methods as well: no coalition's error is left over."""
    points, expert = a_game(12, seed=2)
    metric = ALL_METRICS[name]
    got = shapley_values(points, expert, metric, method=method, max_evaluations=3000)
    total = metric(points.mean(axis=0), expert) - metric(np.zeros(4), expert)
    assert got.values.sum() == pytest.approx(total, abs=1e-8)


def test_equal_users_earn_the_same():
    points, expert = a_game(12, seed=3)
    points[7] = points[2]
    for name, metric in ALL_METRICS.items():
        exact = shapley_values(points, expert, metric, method="exact").values
        assert exact[7] == pytest.approx(exact[2], abs=1e-12), name
        sampled = shapley_values(points, expert, metric, method="stratified", seed=1)
        assert abs(sampled.values[7] - sampled.values[2]) <= 5 * 2 * sampled.standard_errors[[2, 7]].max() + 1e-9


def test_order_of_users_does_not_matter():
    points, expert = a_game(11, seed=8)
    order = np.random.default_rng(0).permutation(11)
    for metric in ALL_METRICS.values():
        straight = shapley_values(points, expert, metric, method="exact").values
        np.testing.assert_allclose(
            shapley_values(points[order], expert, metric, method="exact").values, straight[order], atol=1e-12
        )


@pytest.mark.parametrize("method", ["exact", "stratified", "permutation", "kernel"])
def test_a_game_without_a_difference_pays_nobody(method):
    """All users are dummies where the metric is constant; where it only sees the empty coalition, all earn 1 / n."""
    points, expert = a_game(9)
    nothing = shapley_values(points, expert, lambda a, b: np.full(a.shape[:-1], 2.5), method=method)
    np.testing.assert_allclose(nothing.values, 0, atol=1e-8)
    anyone = shapley_values(points, expert, lambda a, b: (a != 0).any(axis=-1) * 1.0, method=method)
    allowed = 5 * anyone.standard_errors if method == "permutation" else 1e-7
    assert (np.abs(anyone.values - 1 / 9) <= allowed).all()
    assert anyone.values.sum() == pytest.approx(1)


def test_a_user_at_the_origin_of_a_sum_game_is_a_dummy():
    """v(S) = 1 where the mean has a first coordinate, which only user 0 brings: the others are dummies."""
    points = np.zeros((8, 2))
    points[0, 0] = 1
    points[:, 1] = np.arange(8)

    def has_first(a, b):
        return (a[..., 0] > 0) * 1.0

    for method in ("exact", "kernel", "permutation"):
        got = shapley_values(points, np.zeros(2), has_first, method=method)
        np.testing.assert_allclose(got.values, np.eye(8)[0], atol=1e-8)
    got = shapley_values(points, np.zeros(2), has_first, method="stratified", precision=0.05)
    assert (np.abs(got.values - np.eye(8)[0]) <= 5 * got.standard_errors + 1e-9).all()


def test_linearity_and_dimensions_nobody_has():
    points, expert = a_game(10, seed=4)
    both = shapley_values(points, expert, lambda a, b: 2 * l2(a, b) - l1(a, b), method="exact").values
    one, other = (shapley_values(points, expert, metric, method="exact").values for metric in (l2, l1))
    np.testing.assert_allclose(both, 2 * one - other, atol=1e-12)
    padded = np.hstack([points, np.zeros((10, 3))])
    same = shapley_values(padded, np.r_[expert, 0, 0, 0], l2, method="exact").values
    np.testing.assert_allclose(same, one, atol=1e-12)


@pytest.mark.parametrize("name", ["l2", "l1", "own"])
def test_shaps_exact_explainer_agrees(name, monkeypatch):
    import shap
    from shap.explainers import _exact
    from shap.maskers import _tabular
    from shap.utils import _masked_model

    for module in (_exact, _tabular, _masked_model):  # interpreted: compiling shap's helpers takes seconds
        for attribute, helper in list(vars(module).items()):
            if hasattr(helper, "py_func"):
                monkeypatch.setattr(module, attribute, helper.py_func)
    points, expert = a_game(7, seed=6)
    metric = ALL_METRICS[name]

    def coalition_values(masks):
        return metric(masks @ points / np.maximum(masks.sum(axis=1, keepdims=True), 1), expert)

    explained = shap.ExactExplainer(coalition_values, np.zeros((1, 7)))(np.ones((1, 7))).values[0]
    np.testing.assert_allclose(shapley_values(points, expert, metric).values, explained, atol=1e-9)


@pytest.mark.parametrize("method", ["stratified", "permutation", "kernel"])
def test_seeds_reproduce(method):
    points, expert = a_game(18, seed=1)
    state = np.random.get_state()[1].copy()
    options = {"method": method, "max_evaluations": 900}
    first, again, other = (shapley_values(points, expert, l2, seed=seed, **options).values for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    sequence = shapley_values(points, expert, l2, seed=np.random.SeedSequence(3), **options).values
    np.testing.assert_array_equal(first, sequence)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # NumPy's global generator is left as it was


@pytest.mark.parametrize("name", ["l2", "l1", "own"])
@pytest.mark.parametrize("precision", [0.05, 0.01])
def test_precision_is_met(name, precision):
    points, expert = a_game(40, dimensions=8, seed=7)
    got = shapley_values(points, expert, ALL_METRICS[name], precision=precision)
    assert got.method == "stratified"
    assert got.standard_errors.max() <= precision * got.values.std()


def test_a_crowd_of_equals_stops_at_once():
    points = np.tile(a_game(1)[0], (30, 1))
    got = shapley_values(points, a_game(1)[1], l2)
    assert got.evaluations < 5000
    np.testing.assert_allclose(got.values, got.values.mean(), atol=1e-7)


@pytest.mark.parametrize("method", ["exact", "stratified", "permutation", "kernel"])
def test_evaluations_are_counted_and_bounded(method):
    points, expert = a_game(12, seed=9)
    computed = 0

    def counting(a, b):
        nonlocal computed
        computed += len(a)
        return l1(a, b)

    budget = 2500
    got = shapley_values(points, expert, counting, method=method, precision=1e-6, max_evaluations=budget)
    assert got.evaluations == computed
    if method != "exact":
        assert 0.8 * budget < computed <= budget


@pytest.mark.parametrize("method", ["stratified", "permutation"])
def test_more_evaluations_give_smaller_errors(method):
    points, expert = a_game(30, seed=9)
    errors = [
        shapley_values(points, expert, l2, method=method, precision=1e-9, max_evaluations=budget).standard_errors.mean()
        for budget in (2000, 32_000)
    ]
    assert 2.5 < errors[0] / errors[1] < 9  # 4, or more where the control variate profits


def test_auto_chooses():
    small, expert = a_game(16)
    large = np.vstack([small, small[:1]])
    assert shapley_values(small, expert, l2).method == "exact"
    assert shapley_values(large, expert, l2, precision=0.5).method == "stratified"
    assert shapley_values(large, expert, dot).method == "closed_form"


@pytest.mark.parametrize(
    "change, told",
    [
        ({"method": "guess"}, "unknown method 'guess'"),
        ({"method": "closed_form"}, "closed_form is for the metric dot"),
        ({"user_points": np.ones((23, 4)), "method": "exact"}, "too many for 23 users"),
        ({"user_points": np.array([[1.0, 2, 3, np.nan]])}, "NaN or infinity"),
        ({"expert_point": np.array([1.0, 2, 3, np.inf])}, "NaN or infinity"),
        ({"expert_point": np.ones(3)}, "must be"),
        ({"user_points": np.ones(4)}, "must be"),
        ({"user_points": np.ones((0, 4))}, "must be"),
        ({"metric": lambda a, b: (a @ b) / np.sqrt((a * a).sum(axis=-1)) - np.inf * (a == 0).all(-1)}, "zero vector"),
        ({"metric": lambda a, b: a * b}, "one finite number a vector"),
        ({"metric": "l3"}, "unknown metric 'l3'"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_errors(change, told):
    points, expert = a_game(6)
    arguments = {"user_points": points, "expert_point": expert, "metric": l2, **change}
    with pytest.raises(InputError, match=told):
        shapley_values(**arguments)


# ---------------------------------------------------------------- coalition games of known values

N = 20
COSTS = np.random.default_rng(1).exponential(size=N)
RATED = np.random.default_rng(2).random((N, 12)) < 0.15
WEIGHTS = np.random.default_rng(3).integers(1, 10, N)


def airport_values():
    """Who needs a piece of the runway shares it (Littlechild and Owen, 1973)."""
    order = np.argsort(COSTS)
    values = np.empty(N)
    values[order] = np.cumsum(np.diff(COSTS[order], prepend=0) / (N - np.arange(N)))
    return values


def glove_values(left=7):
    """Of a pair of gloves is worth 1: a joiner gains where the others lack the own side."""

    def chance(own, other):
        """That of the own + other who may come first, a random number, fewer have the own side than the other."""
        total = 0.0
        for size in range(own + other + 1):
            for mine in range(max(0, size - other), min(own, size) + 1):
                if mine < size - mine:
                    total += math.comb(own, mine) * math.comb(other, size - mine) / math.comb(own + other, size)
        return total / (own + other + 1)

    return np.where(np.arange(N) < left, chance(left - 1, N - left), chance(N - left - 1, left))


def majority_values():
    """By counting the coalitions of the others by size and weight."""
    quota = WEIGHTS.sum() // 2 + 1
    values = np.zeros(N)
    for player, weight in enumerate(WEIGHTS):
        count = np.zeros((N, WEIGHTS.sum() + 1))
        count[0, 0] = 1
        for other in np.delete(WEIGHTS, player):
            count[1:, other:] += count[:-1, :-other].copy()
        pivotal = count[:, max(quota - weight, 0) : quota].sum(axis=1)
        values[player] = sum(pivotal[size] / math.comb(N - 1, size) for size in range(N)) / N
    return values


def veto_values():
    """Player 0 and at least two more: player 0 is decisive unless first or second."""
    return np.r_[(N - 2) / N, np.full(N - 1, 2 / N / (N - 1))]


KNOWN = {
    "airport": (lambda s: (s * COSTS).max(axis=1), airport_values()),
    "glove": (lambda s: np.minimum(s[:, :7].sum(axis=1), s[:, 7:].sum(axis=1)) * 1.0, glove_values()),
    "unanimity": (lambda s: s[:, :4].all(axis=1) * 1.0, np.where(np.arange(N) < 4, 1 / 4, 0)),
    "majority": (lambda s: (s @ WEIGHTS > WEIGHTS.sum() // 2) * 1.0, majority_values()),
    "veto": (lambda s: (s[:, 0] & (s.sum(axis=1) > 2)) * 1.0, veto_values()),
    "genres": (
        lambda s: ((s @ RATED.astype(float)) > 0).mean(axis=1),
        (RATED / np.maximum(RATED.sum(axis=0), 1)).sum(axis=1) / 12,
    ),
}


@pytest.mark.parametrize("name", list(KNOWN))
@pytest.mark.parametrize("with_features", [False, True])
def test_games_of_known_values(name, with_features):
    """95 % intervals cover; the values sum to v(N) - v(empty); no more is asked than allowed, and nothing twice."""
    game, truth = KNOWN[name]
    covered = []
    for seed in range(30):
        asked = []

        def recording(coalitions, asked=asked):
            asked += [row.tobytes() for row in coalitions]
            return game(coalitions)

        got = game_shapley_values(
            recording,
            N,
            features=RATED if with_features else None,
            method="stratified",
            precision=0,
            max_evaluations=300,
            seed=seed,
        )
        assert got.evaluations == len(asked) == len(set(asked)) <= 300
        assert got.values.sum() == pytest.approx(truth.sum(), abs=1e-9)
        assert (got.standard_errors > 0).all()
        covered.append(np.abs(got.values - truth) <= 1.96 * got.standard_errors)
    assert np.mean(covered) >= 0.92


def test_long_samples_draw_small_sizes_whole():
    """Beyond FITTED_COALITIONS: every pair of 110 players is asked once, intervals cover, and the errors stay small."""
    costs = np.random.default_rng(4).exponential(size=110)
    order = np.argsort(costs)
    truth = np.empty(110)
    truth[order] = np.cumsum(np.diff(costs[order], prepend=0) / (110 - np.arange(110)))
    pairs = []

    def game(coalitions):
        pairs.extend(row.tobytes() for row in coalitions[coalitions.sum(axis=1) == 2])
        return (coalitions * costs).max(axis=1)

    covered = []
    for seed in range(3):
        pairs.clear()
        got = game_shapley_values(
            game, 110, features=np.log(costs)[:, None], precision=0, max_evaluations=200_000, seed=seed
        )
        assert got.evaluations == 200_000
        assert len(pairs) == len(set(pairs)) == math.comb(110, 2)
        assert got.standard_errors.max() < 0.05 * truth.std()
        covered.append(np.abs(got.values - truth) <= 1.96 * got.standard_errors)
    assert np.mean(covered) >= 0.92


def test_coalitions_of_many_sizes_are_uniform():
    counts = np.array([0, 3, 0, 5, 9, 40, 7, 0])
    drawn = np.concatenate([of_many_sizes(counts, np.random.default_rng(seed)) for seed in range(400)])
    assert (np.bincount(drawn.sum(axis=1), minlength=8) == 400 * counts).all()
    for size in np.flatnonzero(counts):
        held = drawn[drawn.sum(axis=1) == size].mean(axis=0)
        error = (size / 7 * (1 - size / 7) / (400 * counts[size])) ** 0.5
        assert (np.abs(held - size / 7) < 4 * error).all()


@pytest.mark.parametrize("name", ["airport", "majority"])
def test_trees_are_an_unbiased_control(name):
    game, truth = KNOWN[name]
    got = [
        game_shapley_values(game, N, method="stratified", precision=0, max_evaluations=800, seed=seed)
        for seed in range(3)
    ]
    assert np.mean([np.abs(one.values - truth) <= 1.96 * one.standard_errors for one in got]) >= 0.85
    plain = game_shapley_values(game, N, method="permutation", max_evaluations=800)
    assert 1.5 * np.mean([one.standard_errors.mean() for one in got]) < plain.standard_errors.mean()


def test_contrasts_of_trees_are_those_of_enumeration():
    members = np.array(list(itertools.product([False, True], repeat=7)))[1:-1]
    sizes = members.sum(axis=1)
    values = np.random.default_rng(0).normal(size=len(members)) + 2 * (members[:, 0] & (sizes > 3))
    model = trees(np.repeat(members, 9, axis=0), np.repeat(sizes, 9), np.repeat(values, 9), np.ones(9 * len(sizes)), 0)
    predicted = model.predict(members, sizes)
    assert np.corrcoef(predicted, values)[0, 1] > 0.8
    for size in range(1, 7):
        rows = members[sizes == size]
        for player in range(7):
            inside = rows[:, player]
            worth = predicted[sizes == size]
            assert model.contrasts[size, player] == pytest.approx(worth[inside].mean() - worth[~inside].mean())


@pytest.mark.parametrize("budget", [2, 3, 20, 64, 200])
@pytest.mark.parametrize("players", [8, 30])
def test_expensive_games_keep_their_budget(players, budget):
    costs = np.random.default_rng(players).exponential(size=players)
    for features in (None, np.random.default_rng(0).normal(size=(players, 28))):
        got = game_shapley_values(
            lambda s: (s * costs).max(axis=1), players, features=features, max_evaluations=budget, precision=0
        )
        assert got.evaluations <= budget
        assert got.values.sum() == pytest.approx(costs.max())
        assert np.isfinite(got.values).all()


@pytest.mark.parametrize("spike", ["all", "one size"])
def test_a_spike_that_no_sample_met_is_not_certified(spike):
    secret = np.random.default_rng(5).random(30) < 0.5

    def game(coalitions):
        met = coalitions.all(axis=1) if spike == "all" else (coalitions == secret).all(axis=1)
        return met * 1.0

    got = game_shapley_values(game, 30, max_evaluations=500)
    assert not (got.standard_errors == 0).any()  # NaN where no value differed at all


def test_shifts_and_units_change_nothing():
    points, expert = a_game(30, seed=4)
    straight = shapley_values(points, expert, "l2")
    for shift in (1e7, 1e12):
        shifted = shapley_values(points, expert, lambda a, b, shift=shift: l2(a, b) + shift)
        np.testing.assert_allclose(shifted.values, straight.values, atol=1e-16 * 10 * shift + 1e-12)
        assert shifted.standard_errors.max() <= 0.01 * shifted.values.std()
    for unit in (1e4, 1e-4):
        scaled = shapley_values(points * unit, expert * unit, l2)
        np.testing.assert_allclose(scaled.values / unit, straight.values, rtol=1e-9)
    units = np.array([1e4, 1, 1e-4, 3])
    mixed = shapley_values(points * units, expert, lambda a, b: l2(a / units, b))
    np.testing.assert_allclose(mixed.values, straight.values, rtol=1e-9)


def test_a_metric_sees_exact_zeros():
    """Share of genres that some member rated: an error of rounding in a mean would count as rated."""
    stars = RATED * np.random.default_rng(6).uniform(0.5, 5, RATED.shape)
    got = shapley_values(stars, np.zeros(12), lambda a, b: (a != 0).mean(axis=-1), max_evaluations=1000, precision=0)
    truth = KNOWN["genres"][1]
    assert (np.abs(got.values - truth) <= 5 * got.standard_errors).all()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"method": "closed_form"}, "unknown method"),
        ({"num_players": 0}, "game of 0 players"),
        ({"features": np.ones((3, 2))}, "must be"),
        ({"max_evaluations": 1}, "at least 2"),
        ({"method": "permutation", "max_evaluations": 9}, "at least 13"),
        ({"game": lambda s: np.full(len(s), np.nan)}, "one finite number"),
        ({"game": lambda s: s * 1.0}, "one finite number"),
    ],
)
def test_errors_of_games(change, told):
    with pytest.raises(InputError, match=told):
        game_shapley_values(**{"game": lambda s: s.sum(axis=1), "num_players": 6, **change})
