"""What users get who do not play along: strategies of a few users, and their pay against their honest twins'.

A strategy is a function of a Scene: it says what everybody contributes in a round, who takes part, and which accounts
the strategists hold. To add one, write a function of the same form and name it in STRATEGIES.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from user_grouping_evaluation_sim.vector_world import Conduct, always

ACCOUNTS = 5  # of a sybil
JOINS = TURNS = 0.4  # of the rounds, before a late user joins, and a turncoat turns
ABSENT = 0.3  # probability of a round


@dataclass(frozen=True)
class Scene:
    """users: (R, n, d). chosen: (R, k), the strategists. best: (R,), the user of the greatest Shapley value. rng: for
    what a strategy leaves to chance."""

    users: np.ndarray
    chosen: np.ndarray
    best: np.ndarray
    num_rounds: int
    rng: np.random.Generator


@dataclass(frozen=True)
class Play:
    """accounts: (R, j), the strategists' among the users whose conduct this is. stays: whether everybody contributes
    the same in all rounds, so that the crowd has Shapley values."""

    conduct: Conduct
    accounts: np.ndarray
    stays: bool = True


Strategy = Callable[[Scene], Play]


def honest(scene: Scene) -> Play:
    return _contribute(scene, _own(scene))


def zero_vector(scene: Scene) -> Play:
    """Nothing, which draws the model towards zero."""
    return _contribute(scene, np.zeros_like(_own(scene)))


def copy_random(scene: Scene) -> Play:
    """Another user's vector, one at random."""
    runs, n, _ = scene.users.shape
    others = (scene.chosen + scene.rng.integers(1, max(n, 2), scene.chosen.shape)) % n
    return _contribute(scene, scene.users[np.arange(runs)[:, None], others])


def copy_best(scene: Scene) -> Play:
    """The vector of the user of the greatest Shapley value."""
    runs = np.arange(len(scene.users))
    return _contribute(scene, np.broadcast_to(scene.users[runs, scene.best][:, None], _own(scene).shape))


def exaggerate(scene: Scene) -> Play:
    """Twice as far from the middle of the scale."""
    middle = sum(_scale(scene)) / 2
    return _contribute(scene, middle + 2 * (_own(scene) - middle))


def mirror(scene: Scene) -> Play:
    """The opposite on the scale."""
    return _contribute(scene, sum(_scale(scene)) - _own(scene))


def farthest_corner(scene: Scene) -> Play:
    """In every dimension the end of the scale that is further from one's own."""
    low, high = _scale(scene)
    return _contribute(scene, np.where(_own(scene) > (low + high) / 2, low, high))


def times_100(scene: Scene) -> Play:
    return _contribute(scene, 100 * _own(scene))


def sybil(scene: Scene) -> Play:
    """ACCOUNTS accounts that all contribute one's own vector."""
    copies = np.repeat(_own(scene), ACCOUNTS - 1, axis=1)
    n, new = scene.users.shape[1], copies.shape[1]
    users = np.concatenate([scene.users, copies], axis=1)
    accounts = np.concatenate([scene.chosen, np.broadcast_to(n + np.arange(new), (len(users), new))], axis=1)
    return Play(always(users), accounts)


def collude(scene: Scene) -> Play:
    """All strategists contribute their mean."""
    own = _own(scene)
    return _contribute(scene, np.broadcast_to(own.mean(axis=1, keepdims=True), own.shape))


def leave(scene: Scene) -> Play:
    """Gone after the first round."""
    return _attend(scene, lambda t: np.full(scene.chosen.shape, t < 1))


def join_late(scene: Scene) -> Play:
    """There from 40 % of the rounds on."""
    return _attend(scene, lambda t: np.full(scene.chosen.shape, t >= JOINS * scene.num_rounds))


def absent(scene: Scene) -> Play:
    """Away in 30 % of the rounds."""
    here = scene.rng.random((scene.num_rounds, *scene.chosen.shape)) >= ABSENT
    return _attend(scene, lambda t: here[t])


def turncoat(scene: Scene) -> Play:
    """Honest in the first 40 % of the rounds, then the opposite on the scale."""
    turned = mirror(scene).conduct.vectors(0)
    later = TURNS * scene.num_rounds
    return Play(Conduct(lambda t: scene.users if t < later else turned), scene.chosen, stays=False)


STRATEGIES: dict[str, tuple[Strategy, str]] = {
    "honest": (honest, "random 1"),
    "zero vector": (zero_vector, "random 1"),
    "zero vector, best": (zero_vector, "best 1"),
    "copy of a random user": (copy_random, "random 1"),
    "copy of the best": (copy_best, "random 1"),
    "exaggerate": (exaggerate, "random 1"),
    "mirror": (mirror, "random 1"),
    "farthest corner": (farthest_corner, "random 1"),
    "farthest corner, best": (farthest_corner, "best 1"),
    "x 100": (times_100, "random 1"),
    "sybil": (sybil, "random 1"),
    "collude": (collude, "random 5"),
    "leave after round 1": (leave, "worst 5"),
    "join late": (join_late, "best 5"),
    "absent": (absent, "random 1"),
    "turncoat": (turncoat, "random 1"),
}
"""By the name that tables give it: a strategy and whose it is, by Shapley value."""


def chosen_users(whose: str, shapley: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(R, k): "random", "best" or "worst" k by Shapley value (R, n)."""
    which, count = whose.split()
    k = min(int(count), shapley.shape[1])
    order = np.argsort(shapley, axis=1, kind="stable")
    if which == "random":
        order = rng.permuted(order, axis=1)
    return order[:, -k:] if which == "best" else order[:, :k]


def ratio_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Ratio of the means of paired numbers (R,), with a 95 % interval by the delta method; NaN for a mean of 0."""
    mean = theirs.mean()
    if mean == 0:
        return np.nan, np.nan, np.nan
    ratio = float(ours.mean() / mean)
    if len(ours) < 2:
        return ratio, np.nan, np.nan
    error = (ours - ratio * theirs).std(ddof=1) / np.sqrt(len(ours)) / abs(mean)
    half = float(stdtrit(len(ours) - 1.0, 0.975) * error)
    return ratio, ratio - half, ratio + half


# ---------------------------------------------------------------- parts of strategies


def _own(scene: Scene) -> np.ndarray:
    """(R, k, d), the strategists'."""
    own: np.ndarray = scene.users[np.arange(len(scene.users))[:, None], scene.chosen]
    return own


def _scale(scene: Scene) -> tuple[float, float]:
    return float(scene.users.min()), float(scene.users.max())


def _contribute(scene: Scene, vectors: np.ndarray) -> Play:
    users = scene.users.copy()
    users[np.arange(len(users))[:, None], scene.chosen] = vectors
    return Play(always(users), scene.chosen)


def _attend(scene: Scene, attend: Callable[[int], np.ndarray]) -> Play:
    def here(t: int) -> np.ndarray:
        everybody = np.ones(scene.users.shape[:2], dtype=bool)
        everybody[np.arange(len(everybody))[:, None], scene.chosen] = attend(t)
        return everybody

    return Play(Conduct(lambda _: scene.users, here), scene.chosen, stays=False)


# ---------------------------------------------------------------- what can be done about copies


def quotient(vectors: np.ndarray, tolerance: float) -> np.ndarray:
    """Who is taken for whom, (n,): the first user whose contribution (n, d) is within `tolerance` of one's own, by
    chains. Only where the coordinator sees contributions."""
    squares = (vectors**2).sum(axis=1)
    # Rounding leaves equal vectors a little apart, or together less than nothing.
    apart = np.maximum(squares[:, None] + squares - 2 * vectors @ vectors.T, 0)
    return linked(apart <= tolerance**2 + 1e-9 * squares.max(initial=0))


def linked(near: np.ndarray) -> np.ndarray:
    """The first user whom one reaches by chains of who is near whom (n, n), (n,): single linkage."""
    n = len(near)
    near = near | near.T | np.eye(n, dtype=bool)
    first = np.arange(n)
    for _ in range(n):
        reached = np.where(near, first, n).min(axis=1)
        if (reached == first).all():
            break
        first = reached
    return first


def split_by(first: np.ndarray, by_person: np.ndarray) -> np.ndarray:
    """Pay of accounts (n,): each person's, at the place of their first account, shared by all of them evenly."""
    return by_person[first] / np.bincount(first, minlength=len(first))[first]
