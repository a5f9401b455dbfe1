"""Users, experts and models as vectors: a group pulls the model towards its weighted centroid. All runs at once."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from user_grouping_evaluation_sim import payout
from user_grouping_evaluation_sim.competition import Rules, Shares, compete
from user_grouping_evaluation_sim.grouping import Grouping
from user_grouping_evaluation_sim.ledger import recorded
from user_grouping_evaluation_sim.metrics import Metric
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.scoring import Scoring, Standing

DELTA = 0.1


@dataclass(frozen=True)
class Conduct:
    """What users do in the round of a number, from 0. vectors: that they contribute, (R, n, d). here: who takes part,
    (R, n) bool, or None where all do."""

    vectors: Callable[[int], np.ndarray]
    here: Callable[[int], np.ndarray] | None = None


def always(vectors: np.ndarray) -> Conduct:
    """Everybody takes part and contributes the same vectors (R, n, d) in all rounds."""
    return Conduct(lambda _: vectors)


@dataclass(frozen=True)
class VectorWorld:
    """A competition.World whose models are (R, d) and candidates (R, C, d).

    vectors: the users' in the round of a number, (R, n, d). experts: (R, d). delta: the step of a candidate towards its
    group's centroid. noise: standard deviation of every evaluation's own normal error, in the metric's unit. errors:
    where they are drawn from.
    """

    vectors: Callable[[int], np.ndarray]
    experts: np.ndarray
    metric: Metric
    delta: float = DELTA
    noise: float = 0.0
    errors: np.random.Generator | None = None

    def propose(self, model: np.ndarray, shares: Shares, round_number: int) -> np.ndarray:
        users = self.vectors(round_number)
        centroids = weighted_centroids(users, shares.labels, shares.weights, shares.num_groups)
        if shares.merged_weights is not None:
            merged_centroid = np.einsum("rn,rnd->rd", shares.merged_weights, users)
            centroids = np.concatenate([centroids, merged_centroid[:, None]], axis=1)
        return model[:, None] + self.delta * (centroids - model[:, None])

    def gains(self, model: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        values = self.evaluate(np.concatenate([model[:, None], candidates], axis=1))
        return values[:, 1:] - values[:, :1]

    def evaluate(self, models: np.ndarray) -> np.ndarray:
        """Values of models (R, k, d), each with its own error: (R, k)."""
        values = np.asarray(self.metric(models, self.experts[:, None]))
        if self.noise and self.errors is not None:
            values = values + self.noise * self.errors.standard_normal(values.shape)
        return values

    def take(self, model: np.ndarray, candidates: np.ndarray, taken: np.ndarray, improved: np.ndarray) -> np.ndarray:
        return np.where(improved[:, None], candidates[np.arange(len(taken)), taken], model)


@dataclass(frozen=True)
class Trace:
    """The first run, round by round. models: (T + 1, d). labels, weights: (T, n). merged_weights: (T, n), 0 where
    there was no merged candidate. taken: (T,), a candidate or NONE; number num_groups is the merged one. rewards:
    (T, G + 1), the merged candidate's last, NaN where there was none. improved: (T,). order: (T, G + 1), see
    scoring.Round, NONE behind the last. alone: (n,), everybody, gained: (1,), see audited."""

    models: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    merged_weights: np.ndarray
    taken: np.ndarray
    rewards: np.ndarray
    improved: np.ndarray
    order: np.ndarray
    alone: np.ndarray
    everybody: np.ndarray
    gained: np.ndarray


@dataclass(frozen=True)
class Simulated:
    """distances: (R, T + 1), Euclidean, of the model from the expert, first at the start. points, pay: (R, n), the
    latter in whole units (payout.UNIT). points_errors, pay_errors: (R, n), their standard errors, NaN where the scoring
    knows none. budget: (R,), in whole units. alone: (R, n), see audited. trace: of the first run."""

    distances: np.ndarray
    points: np.ndarray
    points_errors: np.ndarray
    pay: np.ndarray
    pay_errors: np.ndarray
    budget: np.ndarray
    alone: np.ndarray
    trace: Trace


def simulate(
    crowd: Crowd,
    grouping: Grouping,
    metric: Metric,
    scoring: Scoring,
    rules: Rules,
    rng: np.random.Generator,
    delta: float = DELTA,
    *,
    noise: float = 0.0,
    errors: np.random.Generator | None = None,
    conduct: Conduct | None = None,
) -> Simulated:
    """The competition for every run of the crowd. noise, errors: see VectorWorld. conduct: in place of the crowd's.

    Raises InputError where a user's own function misbehaves.
    """
    conduct = conduct or always(crowd.users)
    vectors = conduct.vectors(0)
    runs, n, _ = vectors.shape
    world = VectorWorld(conduct.vectors, crowd.experts, metric, delta, noise, errors)
    played = []
    distances = [np.linalg.norm(crowd.models - crowd.experts, axis=1)]
    standing, model = Standing(np.ones((runs, n))), crowd.models
    attended, stayed = np.zeros((2, runs, n))
    last = payout.last_rounds(rules.num_rounds)
    for t, step in enumerate(compete(world, model, (runs, n), grouping, scoring, rules, rng, conduct.here)):
        standing, model, past = step.standing, step.model, step.round
        distances.append(np.linalg.norm(model - crowd.experts, axis=1))
        attended += past.weights > 0
        stayed += (past.weights > 0) if t >= rules.num_rounds - last else 0
        played.append({"models": model[0], **recorded(step)})
    trace = {name: np.array([row[name] for row in played]) for name in played[0]}
    trace["models"] = np.vstack([crowd.models[:1], trace["models"]])
    contributed = conduct.vectors(rules.num_rounds - 1)
    alone, everybody, gained = audited(world, contributed, crowd.models, model)
    credit = payout.credits(attended / rules.num_rounds, stayed / last)
    pay, pay_errors = payout.pay(standing, alone, everybody, gained, credit, delta)
    return Simulated(
        np.stack(distances, axis=1),
        standing.points,
        np.full((runs, n), np.nan) if standing.errors is None else standing.errors,
        pay,
        pay_errors,
        payout.budget_units(gained),
        alone,
        Trace(**trace, alone=alone[0], everybody=everybody[:1], gained=gained[:1]),
    )


def audited(
    world: VectorWorld, users: np.ndarray, start: np.ndarray, final: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What payout.py asks for, from one more evaluation each: of every user's own vector (R, n, d) and of their mean,
    less that of nobody's, zeros; and of the final model less that of the first, (R, d) each."""
    runs, n, d = users.shape
    asked = [users, users.mean(axis=1, keepdims=True), np.zeros((runs, 1, d)), start[:, None], final[:, None]]
    values = world.evaluate(np.concatenate(asked, axis=1))
    alone, everybody, nobody, first, last = np.split(values, [n, n + 1, n + 2, n + 3], axis=1)
    return alone - nobody, (everybody - nobody)[:, 0], (last - first)[:, 0]


def weighted_centroids(users: np.ndarray, labels: np.ndarray, weights: np.ndarray, num_groups: int) -> np.ndarray:
    """The groups' weighted sums of their members' vectors. users (R, n, d), labels and weights (R, n) -> (R, G, d)."""
    runs, n, d = users.shape
    place = labels + num_groups * np.arange(runs)[:, None]
    by_user = scipy.sparse.csc_array(
        (weights.ravel(), place.ravel(), np.arange(runs * n + 1)), shape=(runs * num_groups, runs * n)
    )
    return (by_user @ users.reshape(-1, d)).reshape(runs, num_groups, d)
