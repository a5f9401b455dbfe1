"""The distance to the convex hull: known geometry, and a general solver on random small cases."""

import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from user_grouping_evaluation_sim.hull import hull_distance

TRIANGLE = np.array([[0.0, 0], [4, 0], [0, 4]])
TETRAHEDRON = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    "users, expert, distance",
    [
        (TRIANGLE, [1, 1], 0),  # inside
        (TRIANGLE, [2, 2], 0),  # on an edge
        (TRIANGLE, [4, 0], 0),  # at a vertex
        (TRIANGLE, [-3, -4], 5),  # nearest: a vertex
        (TRIANGLE, [1, -2], 2),  # nearest: an edge
        (TRIANGLE, [4, 4], 8**0.5),  # nearest: the middle of the long edge
        (TETRAHEDRON, [0.1, 0.2, 0.3], 0),
        (TETRAHEDRON, [1, 1, 1], 2 / 3**0.5),  # nearest: a face
        (TETRAHEDRON, [0.2, 0.2, -7], 7),
        (np.array([[1.0, 2, 3]]), [1, 2, 5], 2),  # one user
        (np.array([[1.0, 2], [1, 2], [1, 2]]), [4, 6], 5),  # three equal users
        (np.array([[0.0, 0], [0, 0]]), [0, 0], 0),
        (np.array([[1.0], [3], [2]]), [2.5], 0),  # a line
        (np.array([[1.0], [3], [2]]), [7], 4),
        (np.array([[1.0]]), [1], 0),
    ],
)
def test_known_geometry(users, expert, distance):
    assert hull_distance(users, np.array(expert, dtype=float)) == pytest.approx(distance, abs=1e-9)


def nearest_mixture(users, expert):
    """By a general constrained optimiser, from several starts."""
    n = len(users)

    def squared(w):
        miss = w @ users - expert
        return miss @ miss, 2 * users @ miss

    bounds, total = [(0, 1)] * n, {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(n)}
    starts = np.vstack([np.full(n, 1 / n), np.random.default_rng(0).dirichlet(np.ones(n), 2)])
    options = {"ftol": 1e-15, "maxiter": 500}
    found = [
        minimize(squared, w, jac=True, bounds=bounds, constraints=total, options=options, method="SLSQP")
        for w in starts
    ]
    return min(result.fun for result in found) ** 0.5


@pytest.mark.parametrize("seed", range(12))
def test_against_a_general_optimiser(seed):
    rng = np.random.default_rng(seed)
    n, d = rng.integers(2, 9), rng.integers(1, 6)
    users, expert = rng.normal(size=(n, d)), rng.normal(size=d) * 1.5
    assert hull_distance(users, expert) == pytest.approx(nearest_mixture(users, expert), abs=2e-5)


@pytest.mark.parametrize("seed", range(6))
def test_many_users_agree_with_optimality(seed):
    """More users than the working set starts with. The nearest mixture is certified: by linear programming it is
    inside exactly where the distance is 0, and no direction of a user comes closer by more than the tolerance."""
    rng = np.random.default_rng(seed)
    users = rng.normal(size=(700, 6))
    inside = users[:50].mean(axis=0)
    outside = np.r_[4.0, rng.normal(size=5)]
    for expert in (inside, outside):
        distance = hull_distance(users, expert)
        feasible = linprog(
            np.zeros(700), A_eq=np.vstack([users.T, np.ones(700)]), b_eq=np.r_[expert, 1], bounds=(0, None)
        )
        assert (distance < 1e-6) == (feasible.status == 0)
        # all users at once, by Frank-Wolfe's own bound: a point at `distance` has a separating plane there
        full = hull_distance(users[np.argsort(users @ rng.normal(size=6))], expert)
        assert full == pytest.approx(distance, abs=1e-7)
        for subset in np.array_split(rng.permutation(700), 4):
            assert hull_distance(users[subset], expert) >= distance - 1e-7


def test_shifts_and_scales_with_the_space():
    rng = np.random.default_rng(0)
    users, expert = rng.uniform(0, 5, (75, 19)), rng.uniform(0, 5, 19)
    distance = hull_distance(users, expert)
    assert hull_distance(users + 3, expert + 3) == pytest.approx(distance, rel=1e-6)
    assert hull_distance(users * 10, expert * 10) == pytest.approx(10 * distance, rel=1e-6)
    assert 0 < distance <= np.linalg.norm(users - expert, axis=1).min()
    assert distance <= np.linalg.norm(users.mean(axis=0) - expert)
