"""Users, experts and models as vectors: a group pulls the model towards its weighted centroid. All runs at once."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from user_grouping_evaluation_sim.competition import Rules, Shares, compete
from user_grouping_evaluation_sim.grouping import Grouping
from user_grouping_evaluation_sim.metrics import Metric
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.scoring import Scoring, Standing

DELTA = 0.1


@dataclass(frozen=True)
class VectorWorld:
    """A competition.World whose models are (R, d) and candidates (R, C, d).

    users: (R, n, d). experts: (R, d). delta: the step of a candidate towards its group's centroid. noise: standard
    deviation of every evaluation's own normal error, in the metric's unit. errors: where they are drawn from.
    """

    users: np.ndarray
    experts: np.ndarray
    metric: Metric
    delta: float = DELTA
    noise: float = 0.0
    errors: np.random.Generator | None = None

    def propose(self, model: np.ndarray, shares: Shares, round_number: int) -> np.ndarray:
        centroids = weighted_centroids(self.users, shares.labels, shares.weights, shares.num_groups)
        if shares.merged_weights is not None:
            merged_centroid = np.einsum("rn,rnd->rd", shares.merged_weights, self.users)
            centroids = np.concatenate([centroids, merged_centroid[:, None]], axis=1)
        return model[:, None] + self.delta * (centroids - model[:, None])

    def gains(self, model: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        values = self.metric(np.concatenate([model[:, None], candidates], axis=1), self.experts[:, None])
        if self.noise and self.errors is not None:
            values = values + self.noise * self.errors.standard_normal(values.shape)
        return values[:, 1:] - values[:, :1]

    def take(self, model: np.ndarray, candidates: np.ndarray, taken: np.ndarray, improved: np.ndarray) -> np.ndarray:
        return np.where(improved[:, None], candidates[np.arange(len(taken)), taken], model)


@dataclass(frozen=True)
class Trace:
    """The first run, round by round. models: (T + 1, d). labels, weights: (T, n). merged_weights: (T, n), 0 where
    there was no merged candidate. taken: (T,), a candidate or NONE; number num_groups is the merged one."""

    models: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    merged_weights: np.ndarray
    taken: np.ndarray


@dataclass(frozen=True)
class Simulated:
    """distances: (R, T + 1), Euclidean, of the model from the expert, first at the start. points: (R, n). errors: (R, n),
    the points' standard errors, NaN where the scoring knows none."""

    distances: np.ndarray
    points: np.ndarray
    errors: np.ndarray
    trace: Trace


def simulate(
    crowd: Crowd,
    grouping: Grouping,
    metric: Metric,
    scoring: Scoring,
    rules: Rules,
    rng: np.random.Generator,
    delta: float = DELTA,
    noise: float = 0.0,
    errors: np.random.Generator | None = None,
) -> Simulated:
    """The competition for every run of the crowd. noise, errors: see VectorWorld.

    Raises InputError where a user's own function misbehaves.
    """
    runs, n, _ = crowd.users.shape
    world = VectorWorld(crowd.users, crowd.experts, metric, delta, noise, errors)
    played = []
    distances = [np.linalg.norm(crowd.models - crowd.experts, axis=1)]
    standing = Standing(np.ones((runs, n)))
    for step in compete(world, crowd.models, (runs, n), grouping, scoring, rules, rng):
        distances.append(np.linalg.norm(step.model - crowd.experts, axis=1))
        standing = step.standing
        past, nothing = step.round, np.zeros(n)
        merged = nothing if past.merged_weights is None else past.merged_weights[0]
        played.append((step.model[0], past.labels[0], past.weights[0], merged, step.taken[0]))
    models, *others = (np.array(column) for column in zip(*played, strict=True))
    known = np.full((runs, n), np.nan) if standing.errors is None else standing.errors
    return Simulated(np.stack(distances, axis=1), standing.points, known, Trace(np.vstack([crowd.models[:1], models]), *others))


def weighted_centroids(users: np.ndarray, labels: np.ndarray, weights: np.ndarray, num_groups: int) -> np.ndarray:
    """The groups' weighted sums of their members' vectors. users (R, n, d), labels and weights (R, n) -> (R, G, d)."""
    runs, n, d = users.shape
    place = labels + num_groups * np.arange(runs)[:, None]
    by_user = scipy.sparse.csc_array(
        (weights.ravel(), place.ravel(), np.arange(runs * n + 1)), shape=(runs * num_groups, runs * n)
    )
    return (by_user @ users.reshape(-1, d)).reshape(runs, num_groups, d)
