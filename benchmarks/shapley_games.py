"""Coalition games as files, so that two environments value the same ones. NumPy alone: both import it.

A game is a dictionary of arrays with its `kind`; value_of gives the function of coalitions, bool (m, n) -> (m,).
"""

import math
from collections.abc import Callable

import numpy as np

Arrays = dict[str, np.ndarray]


def value_of(game: Arrays) -> Callable[[np.ndarray], np.ndarray]:
    return KINDS[str(game["kind"])](game)


def _mean(game: Arrays) -> Callable[[np.ndarray], np.ndarray]:
    """Less the distance (norm 1 or 2) from the mean of the members' vectors to the expert's."""

    def value(coalitions: np.ndarray) -> np.ndarray:
        means = coalitions.astype(float) @ game["users"] / np.maximum(coalitions.sum(axis=1, keepdims=True), 1)
        return -np.linalg.norm(means - game["expert"], ord=int(game["norm"]), axis=1)

    return value


def _airport(game: Arrays) -> Callable[[np.ndarray], np.ndarray]:
    """The largest of the members' costs."""
    return lambda coalitions: (coalitions * game["costs"]).max(axis=1)


def _majority(game: Arrays) -> Callable[[np.ndarray], np.ndarray]:
    """1 where the members' weights reach the quota."""
    return lambda coalitions: (coalitions @ game["weights"] >= game["quota"]) * 1.0


def _trees(game: Arrays) -> Callable[[np.ndarray], np.ndarray]:
    """Leaves: the sum of `worth` of those all of whose `inside` and none of whose `outside` are members."""
    inside, outside = game["inside"].T.astype(float), game["outside"].T.astype(float)

    def value(coalitions: np.ndarray) -> np.ndarray:
        members = coalitions.astype(float)
        return ((members @ inside == inside.sum(axis=0)) & (members @ outside == 0)) @ game["worth"]

    return value


KINDS = {"mean": _mean, "airport": _airport, "majority": _majority, "trees": _trees}


def airport(n: int, rng: np.random.Generator) -> Arrays:
    costs = rng.exponential(size=n)
    order = np.argsort(costs)
    truth = np.empty(n)  # who needs a piece of the runway shares it
    truth[order] = np.cumsum(np.diff(costs[order], prepend=0) / (n - np.arange(n)))
    return {"kind": np.array("airport"), "costs": costs, "truth": truth}


def majority(n: int, rng: np.random.Generator) -> Arrays:
    """Weights 1 to 9, more than half of all needed. Exact by counting coalitions by size and weight."""
    weights = rng.integers(1, 10, n)
    quota = weights.sum() // 2 + 1
    truth = np.zeros(n)
    for player, weight in enumerate(weights):
        count = np.zeros((n, weights.sum() + 1))
        count[0, 0] = 1
        for other in np.delete(weights, player):
            count[1:, other:] += count[:-1, :-other].copy()
        pivotal = count[:, max(quota - weight, 0) : quota].sum(axis=1)
        truth[player] = sum(pivotal[size] / math.comb(n - 1, size) for size in range(n)) / n
    return {"kind": np.array("majority"), "weights": weights, "quota": quota, "truth": truth}


def trees(n: int, rng: np.random.Generator, count: int = 20, depth: int = 5) -> Arrays:
    """Random full decision trees, each asking whether a player is a member. Exact leaf by leaf."""
    inside, outside = np.zeros((2, count * 2**depth, n), dtype=bool)
    worth = rng.normal(size=count * 2**depth)
    for tree in range(count):
        rows = [np.arange(tree * 2**depth, (tree + 1) * 2**depth)]
        for _ in range(depth):
            halves = []
            for row in rows:
                free = np.flatnonzero(~(inside[row[0]] | outside[row[0]]))
                player, middle = rng.choice(free), len(row) // 2
                inside[row[:middle], player] = outside[row[middle:], player] = True
                halves += [row[:middle], row[middle:]]
            rows = halves
    p, q = inside.sum(axis=1), outside.sum(axis=1)
    whole = np.array([math.factorial(a) * math.factorial(b) / math.factorial(a + b) for a, b in zip(p, q, strict=True)])
    truth = (worth * whole / np.maximum(p, 1)) @ inside - (worth * whole / np.maximum(q, 1)) @ outside
    return {"kind": np.array("trees"), "inside": inside, "outside": outside, "worth": worth, "truth": truth}
