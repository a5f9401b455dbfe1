"""What users earn: scoring(standing, history, num_rounds) -> standing, called after every round.

A scoring sees what a coordinator sees: who was in which group with which weight, and what each candidate gained.
It returns the users' points and, if it wants to, weights for the next round: of the users inside their groups, and of
one more candidate that merges the whole crowd. The two are separate functions, a pay and a steering, of the same form;
any pair makes a scoring.

To add one, write a function of the same form and name it in PAYS or STEERINGS and PARTS, or pass it as
`module:function`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from user_grouping_evaluation_sim.attribution import Attribution, attribute, block_of, standard_errors


@dataclass(frozen=True)
class Round:
    """What one round showed, for R runs of n users in G groups.

    labels: (R, n) each user's group. weights: (R, n), summing to 1 in each group. rewards: (R, G), value(candidate) -
    value(model). improved: (R,), whether the best candidate beat the model. order: (R, C), the candidates (the groups'
    and, as number G, the merged one's) from first to last as they are paid: by reward, but for an error, in which the
    best has changed places with another; the first is taken. merged_weights: (R, n), summing to 1, and merged_reward:
    (R,), of the merged candidate, where there was one.
    """

    labels: np.ndarray
    weights: np.ndarray
    rewards: np.ndarray
    improved: np.ndarray
    order: np.ndarray
    merged_weights: np.ndarray | None = None
    merged_reward: np.ndarray | None = None


@dataclass(frozen=True)
class Standing:
    """points: (R, n). group_weights: (R, n) of users inside their groups, by default their points squared, 0 where
    negative. merged_weights: (R, n) of a merged candidate, by default there is none. brings: (R, n), what each user
    brings to a candidate's reward by a unit of weight, up to a constant, and errors: (R, n), its standard errors, where
    the scoring knows them. estimate: a scoring's own memory."""

    points: np.ndarray
    group_weights: np.ndarray | None = None
    merged_weights: np.ndarray | None = None
    brings: np.ndarray | None = None
    errors: np.ndarray | None = None
    estimate: Any = None


Scoring = Callable[[Standing, Sequence[Round], int], Standing]


def marginal(standing: Standing, history: Sequence[Round], num_rounds: int) -> Standing:
    """In a round that improved the model, each member earns the reward of the group."""
    last = history[-1]
    return _pay_members(standing, last, last.rewards)


def ranked(standing: Standing, history: Sequence[Round], num_rounds: int) -> Standing:
    """The study's points: in a round that improved the model, the members of the group whose candidate comes first earn
    as many points as there are groups, those of the next one point less, of the last 1 (Crowd-SFT, arXiv 2506.04063).
    """
    last = history[-1]
    num_groups = last.rewards.shape[1]
    place = last.order.argsort(axis=1)[:, :num_groups]
    before = place.argsort(axis=1).argsort(axis=1)  # groups that come before each; a merged candidate is no group
    return _pay_members(standing, last, (num_groups - before).astype(float))


def _pay_members(standing: Standing, last: Round, by_group: np.ndarray) -> Standing:
    """Adds its group's number (R, G) to every user's points in the runs that improved."""
    earned = np.where(last.improved[:, None], by_group, 0.0)
    return replace(standing, points=standing.points + np.take_along_axis(earned, last.labels, axis=1))


MEASURED_SHARE = (0.6, 0.85)  # of the rounds: at least, at most
MEASURED_EQUATIONS = 1.7  # group rewards a user that measuring goes on for, within those bounds
HARMFUL = 6.0  # spreads below the median: who is that far weighs less in groups
LEAST_WEIGHT = 0.01
SHARPNESS = 200.0  # of the merged candidate's weights, exp(sharpness * estimate / the spread of what users bring)
LEANING = 1.0  # the same of weights in groups
FURTHEST = 3.0  # spreads that count there at most


def attributed_pay(
    standing: Standing,
    history: Sequence[Round],
    num_rounds: int,
    *,
    measured_share: tuple[float, float] = MEASURED_SHARE,
) -> Standing:
    """1 plus what a user brings to the rewards, by a mixed linear model of all rounds (see attribution.py)."""
    found = _attribution(standing, history, num_rounds, measured_share)
    errors = standard_errors(found) if len(history) == num_rounds else None
    return replace(standing, points=1 + found.shares, brings=found.shares, errors=errors, estimate=found)


def merged_steering(
    standing: Standing,
    history: Sequence[Round],
    num_rounds: int,
    *,
    measured_share: tuple[float, float] = MEASURED_SHARE,
    sharpness: float = SHARPNESS,
    leaning: float = LEANING,
) -> Standing:
    """Measure first, exploit later: even weights in groups, which show every user equally well, and after measuring a
    merged candidate that weighs users by exp(sharpness share / spread).

    The shares are those of the rounds since measuring, see attribution.py. While measuring the model comes to rest near
    the crowd's mean, where the marginal of a large coalition is taken. The spread is what the model finds of users, or
    the shares' own if it is greater: noisy shares are shrunk against it, and tell users apart less sharply. Groups then
    lean to the same users, since under noise one of theirs often comes first. Who lies HARMFUL of the shares' own
    spreads below the median weighs LEAST_WEIGHT: one who is a hundred times as large does not drown their group.
    """
    found = _attribution(standing, history, num_rounds, measured_share)
    measured = _measured(history[-1], num_rounds, measured_share)
    shares = found.shares_in(block_of(len(history), measured))
    away = shares - np.median(shares, axis=1, keepdims=True)
    # The median absolute deviation: one user's size does not decide how sharply all others are told apart.
    own = 1.4826 * np.median(np.abs(away), axis=1, keepdims=True)  # a normal distribution's standard deviation
    own = np.where(own > 0, own, np.maximum(np.abs(away).max(axis=1, keepdims=True), np.finfo(float).tiny))
    spread = np.maximum(np.sqrt(found.spread + found.drift)[:, None], own)
    merged, weights = None, np.ones_like(away)
    if len(history) >= measured:
        merged = np.exp(sharpness * (away - away.max(axis=1, keepdims=True)) / spread)
        merged /= merged.sum(axis=1, keepdims=True)
        weights = np.exp(leaning * np.clip(away / spread, -FURTHEST, FURTHEST))
    weights = np.where(away < -HARMFUL * own, LEAST_WEIGHT, weights)
    return replace(standing, group_weights=weights, merged_weights=merged, estimate=found)


def _measured(last: Round, num_rounds: int, measured_share: tuple[float, float]) -> int:
    """Rounds of measuring."""
    low, high = measured_share
    per_user = last.rewards.shape[1] / last.labels.shape[1]  # equations a user that a round brings
    return round(num_rounds * min(high, max(low, MEASURED_EQUATIONS / per_user / num_rounds)))


def _attribution(
    standing: Standing, history: Sequence[Round], num_rounds: int, measured_share: tuple[float, float]
) -> Attribution:
    """Of all rounds; what pay has found steering need not find again."""
    found: Attribution | None = standing.estimate
    if found is not None and found.rounds == len(history):
        return found
    return attribute(found, history, _measured(history[-1], num_rounds, measured_share))


def attributed(
    standing: Standing,
    history: Sequence[Round],
    num_rounds: int,
    *,
    measured_share: tuple[float, float] = MEASURED_SHARE,
    sharpness: float = SHARPNESS,
    leaning: float = LEANING,
) -> Standing:
    """Attributed pay with merged steering."""
    paid = attributed_pay(standing, history, num_rounds, measured_share=measured_share)
    return merged_steering(
        paid, history, num_rounds, measured_share=measured_share, sharpness=sharpness, leaning=leaning
    )


def convex_pay(standing: Standing, history: Sequence[Round], num_rounds: int) -> Standing:
    """The exponential of what attributed pay finds, in standard deviations: in the protocol game (protocol_game.py) a
    few users bring most of the value. Paid out by these points, without audits."""
    found = attributed_pay(standing, history, num_rounds)
    shares = found.points - 1
    away = shares - shares.mean(axis=1, keepdims=True)
    spread = away.std(axis=1, keepdims=True)
    points = np.exp(away / np.where(spread > 0, spread, 1))
    return replace(found, points=points, brings=None, errors=None)


def squared_steering(standing: Standing, history: Sequence[Round], num_rounds: int) -> Standing:
    """The study's: users weigh their points squared in their groups."""
    return replace(standing, group_weights=None, merged_weights=None)


def scored(pay: Scoring, steering: Scoring, standing: Standing, history: Sequence[Round], num_rounds: int) -> Standing:
    """What `pay` pays, steered by `steering`."""
    return steering(pay(standing, history, num_rounds), history, num_rounds)


PAYS: dict[str, Scoring] = {
    "marginal": marginal,
    "ranked": ranked,
    "attributed": attributed_pay,
    "convex": convex_pay,
}
STEERINGS: dict[str, Scoring] = {"squared": squared_steering, "merged": merged_steering}
PARTS = {
    "marginal": ("marginal", "squared"),
    "ranked": ("ranked", "squared"),
    "attributed": ("attributed", "merged"),
    "marginal_merged": ("marginal", "merged"),
    "ranked_merged": ("ranked", "merged"),
    "attributed_squared": ("attributed", "squared"),
    "convex": ("convex", "merged"),
}
"""Pay and steering of the scorings below."""
SCORINGS: dict[str, Scoring] = {
    name: partial(scored, PAYS[pay], STEERINGS[steering]) for name, (pay, steering) in PARTS.items()
}
