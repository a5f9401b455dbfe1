"""Groupings: partitions of the study's sizes, in the order their descriptions promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from user_grouping_evaluation_sim.grouping import GROUPINGS, epsilon_greedy, interleaved


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
