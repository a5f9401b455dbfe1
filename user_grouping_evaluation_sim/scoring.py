"""What users earn: scoring(standing, history, num_rounds) -> standing, called after every round.

A scoring sees what a coordinator sees: who was in which group with which weight, and what each candidate gained.
It returns the users' points and, if it wants to, weights for the next round: of the users inside their groups, and of
one more candidate that merges the whole crowd.

To add one, write a function of the same form and name it in SCORINGS, or pass it as `module:function`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from user_grouping_evaluation_sim.grouping import sums_by_group


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
    negative.
    merged_weights: (R, n) of a merged candidate, by default there is none. estimate: (R, n) a scoring's own memory."""

    points: np.ndarray
    group_weights: np.ndarray | None = None
    merged_weights: np.ndarray | None = None
    estimate: np.ndarray | None = None


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


MEASURED_SHARE = (0.4, 0.85)  # of the rounds: at least, at most
MEASURED_EQUATIONS = 1.7  # group rewards a user that measuring goes on for, within those bounds
REPLAYED_EQUATIONS = 1.5  # group rewards a user that are replayed in a round of measuring
REPLAYED_ROUNDS = 10  # replayed in a round of exploiting: the model moves, old rewards no longer hold
SHARPNESS = 24.0  # of the merged candidate's weights, exp(sharpness * estimate / its standard deviation)


def attributed(
    standing: Standing,
    history: Sequence[Round],
    num_rounds: int,
    *,
    measured_share: tuple[float, float] = MEASURED_SHARE,
    measured_equations: float = MEASURED_EQUATIONS,
    replayed_equations: float = REPLAYED_EQUATIONS,
    replayed_rounds: int = REPLAYED_ROUNDS,
    sharpness: float = SHARPNESS,
) -> Standing:
    """Each user's own share beta of the groups' rewards, found by regression; measure first, exploit later.

    To first order a reward is linear in the weights: r_g - mean(r) = sum_i (w_gi - mean w_i) beta_i. The equations are
    solved by projection onto one round after the other (block Kaczmarz; Elfving, 1980), newest last, which from the
    estimate before converges to the least-squares solution nearest to it: a ridge regression whose prior is the past,
    at O(users) a replayed round.

    Measuring: even weights, which show every user equally well; the model comes to rest near the crowd's mean, where
    the marginal of a large coalition is taken, and the points are 1 + beta. Exploiting: points stay; groups go on
    measuring around the moving model, and a merged candidate weighs users by exp(sharpness beta / std(beta)).
    """
    last = history[-1]
    runs, users = last.labels.shape
    per_user = last.rewards.shape[1] / users  # equations a user that a round brings
    low, high = measured_share
    measured = round(num_rounds * min(high, max(low, measured_equations / per_user / num_rounds)))
    if len(history) <= measured:
        replayed = history[-max(1, round(replayed_equations / per_user)) :]
    else:
        replayed = history[max(measured, len(history) - replayed_rounds) :]
    beta = np.zeros((runs, users)) if standing.estimate is None else standing.estimate.copy()
    for past in replayed:
        beta = _project(beta, past)
    even = np.ones((runs, users))
    if len(history) < measured:
        return Standing(1 + beta, group_weights=even, estimate=beta)
    points = 1 + beta if len(history) == measured else standing.points
    spread = np.maximum(beta.std(axis=1, keepdims=True), np.finfo(float).tiny)
    merged = np.exp(sharpness * (beta - beta.max(axis=1, keepdims=True)) / spread)
    return Standing(points, even, merged / merged.sum(axis=1, keepdims=True), beta)


def _project(beta: np.ndarray, past: Round) -> np.ndarray:
    """The nearest beta (R, n) that explains a round's rewards, up to a constant that all candidates share."""
    num_groups = past.rewards.shape[1]
    surprise = past.rewards - sums_by_group(past.weights * beta, past.labels, num_groups)
    common = surprise.mean(axis=1, keepdims=True)
    step = (surprise - common) / sums_by_group(past.weights**2, past.labels, num_groups)
    beta = beta + past.weights * np.take_along_axis(step, past.labels, axis=1)
    if past.merged_weights is not None and past.merged_reward is not None:
        w = past.merged_weights
        surprise = past.merged_reward[:, None] - common - (w * beta).sum(axis=1, keepdims=True)
        beta += w * surprise / (w**2).sum(axis=1, keepdims=True)
    return beta


SCORINGS: dict[str, Scoring] = {"marginal": marginal, "ranked": ranked, "attributed": attributed}
