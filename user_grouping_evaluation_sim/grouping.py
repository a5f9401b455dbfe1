"""Who works together in a round: grouping(points, num_groups, progress, rng) -> labels.

points: (runs, users), what each user has earned so far. progress: the share of the rounds that is over, in [0, 1).
labels: (runs, users), each user's group in 0 .. num_groups - 1; every group has at least one member in every run.
A grouping sees no more than this: not the users' vectors, not the expert.

To add one, write a function of the same form and name it in GROUPINGS, or pass it as `module:function`.
"""

from collections.abc import Callable

import numpy as np

Grouping = Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]


def random(points: np.ndarray, num_groups: int, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Shuffle, split evenly."""
    runs, users = points.shape
    return rng.permuted(np.broadcast_to(_even_split(users, num_groups), (runs, users)), axis=1)


def epsilon_greedy(points: np.ndarray, num_groups: int, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Random with probability max(0.4, 1 - progress); otherwise sort by points, split evenly: high earners together."""
    explore = rng.random(len(points)) < max(0.4, 1 - progress)
    labels = random(points, num_groups, progress, rng)
    if not explore.all():
        order = _by_points(points[~explore])
        labels[~explore] = _scatter(order, np.broadcast_to(_even_split(points.shape[1], num_groups), order.shape))
    return labels


def interleaved(points: np.ndarray, num_groups: int, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Sort by points, halve, shuffle each half, deal round-robin: every group gets high and low earners."""
    order = _by_points(points)
    half = points.shape[1] // 2
    dealt = np.concatenate([rng.permuted(order[:, :half], axis=1), rng.permuted(order[:, half:], axis=1)], axis=1)
    return _scatter(dealt, np.broadcast_to(np.arange(points.shape[1], dtype=np.int32) % num_groups, order.shape))


def _even_split(users: int, num_groups: int) -> np.ndarray:
    """Labels of consecutive groups whose sizes differ by at most one, (users,)."""
    return (np.arange(users) * num_groups // users).astype(np.int32)


def _by_points(points: np.ndarray) -> np.ndarray:
    """Users from most to fewest points; ties in the users' order. (runs, users)"""
    return np.argsort(-points, axis=1, kind="stable")


def _scatter(order: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Gives labels[r, k] to user order[r, k]."""
    by_user = np.empty(order.shape, dtype=np.int32)
    np.put_along_axis(by_user, order, labels, axis=1)
    return by_user


GROUPINGS: dict[str, Grouping] = {"random": random, "epsilon_greedy": epsilon_greedy, "interleaved": interleaved}
