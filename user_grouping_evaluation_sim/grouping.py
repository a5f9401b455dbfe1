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
    """Shuffle, cut into groups."""
    runs, users = points.shape
    return rng.permuted(np.broadcast_to(_cut(users, num_groups), (runs, users)), axis=1)


def epsilon_greedy(points: np.ndarray, num_groups: int, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Random with probability max(0.4, 1 - progress); otherwise sort by points, cut: high earners together."""
    explore = rng.random(len(points)) < max(0.4, 1 - progress)
    labels = random(points, num_groups, progress, rng)
    if not explore.all():
        order = _by_points(points[~explore])
        labels[~explore] = _scatter(order, _cut(points.shape[1], num_groups))
    return labels


def interleaved(points: np.ndarray, num_groups: int, progress: float, rng: np.random.Generator) -> np.ndarray:
    """Sort by points, halve, shuffle each half, deal round-robin: every group gets high and low earners.

    Both halves are dealt from group 0 on, as in the study, so that sizes may differ by two. Where that would leave
    groups empty (more groups than users in a half), the upper half goes on where the lower one ended.
    """
    users = points.shape[1]
    order, half = _by_points(points), users // 2
    dealt = np.concatenate([rng.permuted(order[:, :half], axis=1), rng.permuted(order[:, half:], axis=1)], axis=1)
    place = np.arange(users)
    if num_groups <= users - half:
        place[half:] -= half
    return _scatter(dealt, place % num_groups)


def _cut(users: int, num_groups: int) -> np.ndarray:
    """Labels of consecutive groups, the first (users mod num_groups) of them with one member more. (users,)"""
    small, larger = divmod(users, num_groups)
    return np.repeat(np.arange(num_groups, dtype=np.int32), small + (np.arange(num_groups) < larger))


def _by_points(points: np.ndarray) -> np.ndarray:
    """Users from fewest to most points; ties in the users' order. (runs, users)"""
    return np.argsort(points, axis=1, kind="stable")


def _scatter(order: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Gives labels[k] to user order[r, k]. (runs, users)"""
    by_user = np.empty(order.shape, dtype=np.int32)
    np.put_along_axis(by_user, order, np.broadcast_to(labels, order.shape).astype(np.int32), axis=1)
    return by_user


def sums_by_group(numbers: np.ndarray, labels: np.ndarray, num_groups: int) -> np.ndarray:
    """(runs, users) summed by group: (runs, num_groups)."""
    runs = len(labels)
    place = labels + num_groups * np.arange(runs)[:, None]
    return np.bincount(place.ravel(), numbers.ravel(), runs * num_groups).reshape(runs, num_groups)


GROUPINGS: dict[str, Grouping] = {"random": random, "epsilon_greedy": epsilon_greedy, "interleaved": interleaved}
