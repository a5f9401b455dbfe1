"""The competition: groups of users pull candidates, the best candidate becomes the model. All runs at once."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from experiment.errors import InputError
from user_grouping_evaluation_sim.grouping import Grouping
from user_grouping_evaluation_sim.metrics import Metric
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.scoring import Round, Scoring, Standing

MERGED = -2  # Trace.chosen: the merged candidate; NONE: no candidate improved, the model stayed
NONE = -1


@dataclass(frozen=True)
class Protocol:
    """delta: the step of a candidate towards its group's centroid. error_probability: of taking a random candidate
    that is not the best. negative_points_weigh: the study's weights, points squared whatever their sign."""

    num_groups: int = 4
    num_rounds: int = 100
    delta: float = 0.1
    error_probability: float = 0.05
    negative_points_weigh: bool = False


@dataclass(frozen=True)
class Trace:
    """The first run, round by round. models: (T + 1, d). labels, weights: (T, n). merged_weights: (T, n), 0 where
    there was no merged candidate. chosen: (T,), a group, MERGED or NONE."""

    models: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    merged_weights: np.ndarray
    chosen: np.ndarray


@dataclass(frozen=True)
class Simulated:
    """distances: (R, T + 1), Euclidean, of the model from the expert, first at the start. points: (R, n)."""

    distances: np.ndarray
    points: np.ndarray
    trace: Trace


def simulate(
    crowd: Crowd,
    grouping: Grouping,
    metric: Metric,
    scoring: Scoring,
    protocol: Protocol,
    rng: np.random.Generator,
) -> Simulated:
    """Runs the protocol for every run of the crowd. Raises InputError where a user's own function misbehaves."""
    runs, n, _ = crowd.users.shape
    expert = crowd.experts[:, None]
    model = crowd.models.copy()
    standing = Standing(np.ones((runs, n)))
    history: list[Round] = []
    distances = [np.linalg.norm(model - crowd.experts, axis=1)]
    models, chosen = [model[0]], []
    every_run = np.arange(runs)
    for t in range(protocol.num_rounds):
        labels = grouping(standing.points, protocol.num_groups, t / protocol.num_rounds, rng)
        labels = _checked_labels(labels, (runs, n), protocol.num_groups)
        weights = _group_weights(standing, labels, protocol)
        centroids = _weighted_sums(crowd.users, labels, weights, protocol.num_groups)
        if standing.merged_weights is not None:
            merged_centroid = np.einsum("rn,rnd->rd", standing.merged_weights, crowd.users)
            centroids = np.concatenate([centroids, merged_centroid[:, None]], axis=1)
        candidates = model[:, None] + protocol.delta * (centroids - model[:, None])
        gains = metric(candidates, expert) - metric(model[:, None], expert)
        _check_finite("the metric", gains, (runs, centroids.shape[1]))

        best = gains.argmax(axis=1)
        improved = gains[every_run, best] > 0
        another = (best + rng.integers(1, max(2, gains.shape[1]), runs)) % gains.shape[1]
        taken = np.where(rng.random(runs) < protocol.error_probability, another, best)
        model = np.where(improved[:, None], candidates[every_run, taken], model)

        groups = slice(0, protocol.num_groups)
        merged_gain = gains[:, -1] if standing.merged_weights is not None else None
        history.append(Round(labels, weights, gains[:, groups], improved, standing.merged_weights, merged_gain))
        standing = scoring(standing, history, protocol.num_rounds)
        _check_finite("the scoring", standing.points, (runs, n))
        if standing.merged_weights is not None and not np.allclose(standing.merged_weights.sum(axis=1), 1):
            raise InputError("the scoring returned merged weights that do not sum to 1")

        distances.append(np.linalg.norm(model - crowd.experts, axis=1))
        models.append(model[0])
        merged_taken = merged_gain is not None and taken[0] == protocol.num_groups
        chosen.append(NONE if not improved[0] else MERGED if merged_taken else int(taken[0]))
    trace = Trace(
        np.array(models),
        np.array([past.labels[0] for past in history]),
        np.array([past.weights[0] for past in history]),
        np.array([np.zeros(n) if past.merged_weights is None else past.merged_weights[0] for past in history]),
        np.array(chosen),
    )
    return Simulated(np.stack(distances, axis=1), standing.points, trace)


def _group_weights(standing: Standing, labels: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Weights (R, n) that sum to 1 in each group; even ones in a group whose members all weigh nothing."""
    if standing.group_weights is not None:
        raw = standing.group_weights
    elif protocol.negative_points_weigh:
        raw = standing.points**2
    else:
        raw = np.maximum(standing.points, 0) ** 2
    totals = _sums_by_group(raw, labels, protocol.num_groups)
    if (totals <= 0).any():
        raw = np.where(np.take_along_axis(totals <= 0, labels, axis=1), 1.0, raw)
        totals = _sums_by_group(raw, labels, protocol.num_groups)
    return raw / np.take_along_axis(totals, labels, axis=1)


def _sums_by_group(numbers: np.ndarray, labels: np.ndarray, num_groups: int) -> np.ndarray:
    """(R, n) summed by group: (R, G)."""
    runs = len(labels)
    cell = labels + num_groups * np.arange(runs)[:, None]
    return np.bincount(cell.ravel(), numbers.ravel(), runs * num_groups).reshape(runs, num_groups)


def _weighted_sums(users: np.ndarray, labels: np.ndarray, weights: np.ndarray, num_groups: int) -> np.ndarray:
    """The groups' centroids, (R, G, d)."""
    runs, n, d = users.shape
    cell = labels + num_groups * np.arange(runs)[:, None]
    by_user = scipy.sparse.csc_array(
        (weights.ravel(), cell.ravel(), np.arange(runs * n + 1)), shape=(runs * num_groups, runs * n)
    )
    return (by_user @ users.reshape(-1, d)).reshape(runs, num_groups, d)


def _checked_labels(returned: object, shape: tuple[int, int], num_groups: int) -> np.ndarray:
    """What the grouping returned, if it puts each user into one group and leaves none empty."""
    try:
        labels = np.asarray(returned)
    except ValueError:  # lists of members, of unequal lengths
        raise InputError(
            f"the grouping returned a ragged list; it must give each user one group, integers {shape} (runs, users)"
        ) from None
    if labels.shape != shape or labels.dtype.kind not in "iu":
        raise InputError(
            f"the grouping returned an array {labels.shape} of {labels.dtype}; "
            f"it must give each user one group, integers {shape} (runs, users)"
        )
    if labels.min() < 0 or labels.max() >= num_groups:
        raise InputError(f"the grouping returned label {labels.min()} to {labels.max()}; must be 0 to {num_groups - 1}")
    empty = np.argwhere(_sums_by_group(np.ones(shape), labels, num_groups) == 0)
    if len(empty):
        raise InputError(f"the grouping left group {empty[0][1]} of run {empty[0][0]} empty; each needs a member")
    return labels


def _check_finite(what: str, numbers: np.ndarray, shape: tuple[int, int]) -> None:
    if np.shape(numbers) != shape or not np.isfinite(numbers).all():
        raise InputError(f"{what} returned numbers {np.shape(numbers)} that are not finite or not of shape {shape}")
