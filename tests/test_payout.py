"""Pay from points: shares, whole units, measures, against closed forms and literal computations."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from experiment.errors import InputError
from user_grouping_evaluation_sim import payout
from user_grouping_evaluation_sim.metrics import METRICS
from user_grouping_evaluation_sim.scoring import Standing
from user_grouping_evaluation_sim.shapley import shapley_values


@pytest.mark.parametrize("step", [0.1, None])
@pytest.mark.parametrize("users", [2, 5, 12])
def test_levelled_is_exact_in_a_linear_game_of_means(users, step):
    """v(S) = mean of S's x'e: a reward is the step times its group's mean of x'e, and Shapley values are enumerated.
    A step that is not known follows from how much users differ."""
    rng = np.random.default_rng(users)
    points, expert = rng.uniform(0, 5, (users, 4)), rng.uniform(0, 5, 4)
    exact = shapley_values(points, expert, "dot", method="exact").values
    worth = points @ expert
    brings = 0.1 * worth + 3.0  # a constant that all share is not seen in rewards
    found = payout.levelled(brings[None], worth[None], np.array([worth.mean()]), step)[0]
    np.testing.assert_allclose(found, exact, rtol=1e-9)


def test_who_brings_the_same_where_no_step_is_known():
    alone = np.array([[1.0, 2.0, 6.0]])
    found = payout.levelled(np.full((1, 3), 0.25), alone, np.array([4.0]), None)
    np.testing.assert_allclose(found, [[1 / 3 + 1 / 3, 2 / 3 + 1 / 3, 2 + 1 / 3]])


@pytest.mark.parametrize("metric", ["l2", "l1"])
def test_levelled_sums_to_what_everybody_is_worth(metric):
    rng = np.random.default_rng(1)
    points, expert, nobody = rng.uniform(0, 5, (9, 3)), rng.uniform(0, 5, 3), np.zeros(3)
    value = METRICS[metric]
    everybody = np.array([value(points.mean(axis=0), expert) - value(nobody, expert)])
    alone = (value(points, expert) - value(nobody, expert))[None]
    found = payout.levelled(rng.normal(size=(1, 9)), alone, everybody, 0.1)
    assert found.sum() == pytest.approx(everybody[0])


def test_credit_of_who_leaves_joins_and_stays_away():
    attended, stayed = np.array([1.0, 0.01, 0.6, 0.7]), np.array([1.0, 0.0, 1.0, 0.7])
    np.testing.assert_allclose(payout.credits(attended, stayed, 0.5), [1, 0.005, 0.6, 0.7 * 0.85])


def test_shares_pay_nobody_less_than_nothing_or_without_taking_part():
    estimates, credit = np.array([[3.0, 1.0, -2.0, 4.0]]), np.array([[1.0, 0.5, 1.0, 0.0]])
    np.testing.assert_allclose(payout.shares(estimates, credit), [[6 / 7, 1 / 7, 0, 0]])
    nothing = payout.shares(-np.ones((1, 4)), credit)
    np.testing.assert_allclose(nothing, [[1 / 3, 1 / 3, 1 / 3, 0]])


@given(arrays(float, st.integers(1, 9), elements=st.floats(0, 1)), st.integers(0, 10**9))
def test_allotted_is_the_largest_remainder(weights, budget):
    if weights.sum() < 1e-6:
        return
    found = payout.allotted(np.array(budget), weights)
    assert found.sum() == budget and (found >= 0).all()
    exact = [Fraction(w) * budget / sum(map(Fraction, weights)) for w in weights]
    assert all(abs(int(count) - share) < 1 + 1e-5 for count, share in zip(found, exact, strict=True))


def test_allotted_by_hand():
    np.testing.assert_array_equal(
        payout.allotted(np.array([10, 7]), np.array([[1, 1, 1], [0, 2, 1]])), [[4, 3, 3], [0, 5, 2]]
    )


def test_pay_sums_to_the_budget_and_says_how_sure_it_is():
    rng = np.random.default_rng(2)
    runs, users = 4, 6
    brings, errors = rng.normal(0, 0.01, (runs, users)), np.full((runs, users), 0.002)
    alone, everybody, gained = rng.uniform(2, 4, (runs, users)), np.full(runs, 3.0), np.array([2.5, 1e-6, 0.0, -1.0])
    credit = np.ones((runs, users))
    standing = Standing(1 + brings, brings=brings, errors=errors)
    pay, pay_errors = payout.pay(standing, alone, everybody, gained, credit, 0.1)
    np.testing.assert_array_equal(pay.sum(axis=1), [2_500_000, 1, 0, 0])
    # A user whose `brings` is moved by one standard error is paid so much more, but for what the total moves.
    moved = brings.copy()
    moved[0, 0] += errors[0, 0]
    more = payout.pay(Standing(1 + moved, brings=moved), alone, everybody, gained, credit, 0.1)[0]
    assert more[0, 0] - pay[0, 0] == pytest.approx(pay_errors[0, 0], rel=0.35)
    by_points, unknown = payout.pay(
        Standing(np.array([[1.0, 3.0]])), alone[:1, :2], everybody[:1], np.ones(1), credit[:1, :2], 0.1
    )
    np.testing.assert_array_equal(by_points, [[250_000, 750_000]])
    assert np.isnan(unknown).all()


def test_a_metric_without_a_value_of_nobody_is_no_even_pay():
    ones, nothing = np.ones((1, 3)), np.full((1, 3), np.nan)
    with pytest.raises(InputError, match="zero vector"):
        payout.pay(Standing(ones, brings=ones), nothing, np.ones(1), np.ones(1), ones, 0.1)
    by_points, _ = payout.pay(Standing(ones), nothing, np.ones(1), np.ones(1), ones, 0.1)
    assert by_points.sum() == 10**6  # points need no audit


def test_measures_by_hand():
    pay, shapley = np.array([[50, 50, 0, 0]]), np.array([[1.0, 0.0, -3.0, 1.0]])
    assert payout.misallocation(pay, shapley)[0] == pytest.approx(
        0.5
    )  # 0.5 too much for the second, too little for the last
    assert payout.unpaid(pay, shapley)[0] == pytest.approx(0.5)
    assert payout.gini(np.array([[1, 1, 1, 1], [0, 0, 0, 1]])) == pytest.approx([0, 0.75])
    assert payout.misallocation(np.array([[1, 0, 0, 1]]), shapley)[0] == 0
    assert np.isnan(payout.misallocation(np.zeros((1, 4)), shapley)).all()  # of no budget nothing is with anybody
    assert np.isnan(payout.unpaid(pay, shapley * np.nan)).all() and np.isnan(payout.unpaid(pay, shapley - 2)).all()


def test_a_budget_is_never_below_nothing_however_large():
    gained = np.array([-1.0, 0.0, 2.4e-6, 1e13, 1e60])
    np.testing.assert_array_equal(payout.budget_units(gained), [0, 0, 2, 10**12, 10**12])
    assert payout.allotted(payout.budget_units(gained), np.ones((5, 3))).sum(axis=1).tolist()[3:] == [10**12] * 2
