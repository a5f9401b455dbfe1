"""The competition: in every round groups make candidates, the best one becomes the model, and users earn points.

It knows who works together, which candidate is taken and what is paid, and nothing of what a model is: that is the
world's, of vectors (vector_world.py) or of language models and texts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from experiment.errors import InputError
from user_grouping_evaluation_sim.grouping import Grouping, sums_by_group
from user_grouping_evaluation_sim.scoring import Round, Scoring, Standing

NONE = -1  # Played.taken: no candidate improved, the model stayed


@dataclass(frozen=True)
class Shares:
    """Who makes which candidate of a round, and how much each user counts in it.

    labels, weights: (R, n) as in scoring.Round. merged_weights: (R, n) of one more
    candidate that merges the whole crowd, or none.
    """

    num_groups: int
    labels: np.ndarray
    weights: np.ndarray
    merged_weights: np.ndarray | None


class World(Protocol):
    """Where models live. `model` and `candidates` are the world's own; C = num_groups, plus 1 if a crowd is merged."""

    def propose(self, model: Any, shares: Shares, round_number: int) -> Any:
        """The candidates of a round, the groups' in their order, then the merged one."""

    def gains(self, model: Any, candidates: Any) -> np.ndarray:
        """(R, C), value(candidate) - value(model)."""

    def take(self, model: Any, candidates: Any, taken: np.ndarray, improved: np.ndarray) -> Any:
        """The next model: candidate taken[r] (R,) where improved[r] (R,), else the model as it is."""


@dataclass(frozen=True)
class Rules:
    """error_probability: that the best candidate changes places with another one before the first is taken."""

    num_groups: int = 4
    num_rounds: int = 100
    error_probability: float = 0.05


@dataclass(frozen=True)
class Played:
    """A round that is over. taken: (R,) the candidate that became the model, NONE where it stayed. model: after it."""

    round: Round
    taken: np.ndarray
    model: Any
    standing: Standing


def compete(
    world: World,
    model: Any,
    users: tuple[int, int],
    grouping: Grouping,
    scoring: Scoring,
    rules: Rules,
    rng: np.random.Generator,
    here: Callable[[int], np.ndarray] | None = None,
) -> Iterator[Played]:
    """Plays round after round from `model`. users: (R, n), how many runs and users. here: who takes part in the round
    of this number, from 0, (R, n) bool; all of them by default. Others weigh nothing; a group of which nobody is here
    is called together.

    Raises InputError where a function of the user's own, or the world's metric, misbehaves.
    """
    runs, _ = users
    every_run = np.arange(runs)
    standing = Standing(np.ones(users))
    history: list[Round] = []
    for t in range(rules.num_rounds):
        labels = grouping(standing.points, rules.num_groups, t / rules.num_rounds, rng)
        labels = _checked_labels(labels, users, rules.num_groups)
        present = None if here is None else here(t)
        weights = group_weights(standing, labels, rules.num_groups, present)
        merged_weights = merged_weights_of(standing, present)
        candidates = world.propose(model, Shares(rules.num_groups, labels, weights, merged_weights), t)
        gains = world.gains(model, candidates)
        count = rules.num_groups + (merged_weights is not None)
        _check_finite("the metric", gains, (runs, count))

        order = np.argsort(-gains, axis=1, kind="stable")
        best = order[:, 0].copy()
        improved = gains[every_run, best] > 0
        another = (best + rng.integers(1, max(2, count), runs)) % count
        first = np.where(rng.random(runs) < rules.error_probability, another, best)
        order[every_run, (order == first[:, None]).argmax(axis=1)] = best
        order[:, 0] = first
        model = world.take(model, candidates, first, improved)

        merged_reward = None if merged_weights is None else gains[:, -1]
        rewards = gains[:, : rules.num_groups]
        history.append(Round(labels, weights, rewards, improved, order, merged_weights, merged_reward))
        standing = scoring(standing, history, rules.num_rounds)
        _check_finite("the scoring", standing.points, users)
        for known in (standing.brings, standing.group_weights):
            if known is not None:
                _check_finite("the scoring", known, users)
        if standing.group_weights is not None and (standing.group_weights < 0).any():
            raise InputError("the scoring returned group weights below 0")
        if standing.merged_weights is not None and not np.allclose(standing.merged_weights.sum(axis=1), 1):
            raise InputError("the scoring returned merged weights that do not sum to 1")
        yield Played(history[-1], np.where(improved, first, NONE), model, standing)


def group_weights(standing: Standing, labels: np.ndarray, num_groups: int, present: np.ndarray | None) -> np.ndarray:
    """Weights (R, n) that sum to 1 in each group; even ones where those who are here weigh nothing."""
    raw = np.maximum(standing.points, 0) ** 2 if standing.group_weights is None else standing.group_weights
    if present is not None:
        raw = raw * present
    totals = sums_by_group(raw, labels, num_groups)
    for even in (np.ones(labels.shape) if present is None else present.astype(float), np.ones(labels.shape)):
        if (totals <= 0).any():
            raw = np.where(np.take_along_axis(totals <= 0, labels, axis=1), even, raw)
            totals = sums_by_group(raw, labels, num_groups)
    return raw / np.take_along_axis(totals, labels, axis=1)


def merged_weights_of(standing: Standing, present: np.ndarray | None) -> np.ndarray | None:
    """(R, n), of those who are here; as they are where none of them weighs anything."""
    if standing.merged_weights is None or present is None:
        return standing.merged_weights
    weights = standing.merged_weights * present
    totals = weights.sum(axis=1, keepdims=True)
    return np.where(totals > 0, weights / np.where(totals > 0, totals, 1), standing.merged_weights)


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
    empty = np.argwhere(sums_by_group(np.ones(shape), labels, num_groups) == 0)
    if len(empty):
        raise InputError(f"the grouping left group {empty[0][1]} of run {empty[0][0]} empty; each needs a member")
    return labels


def _check_finite(what: str, numbers: np.ndarray, shape: tuple[int, int]) -> None:
    if np.shape(numbers) != shape or not np.isfinite(numbers).all():
        raise InputError(f"{what} returned numbers {np.shape(numbers)} that are not finite or not of shape {shape}")
