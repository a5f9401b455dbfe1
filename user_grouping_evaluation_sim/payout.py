"""Points into pay: shares of a budget, in whole units, with what a coordinator sees and two audited values.

A scoring that knows what each user brings to a reward (Standing.brings) is brought to the level of Shapley values; of
any other the points are taken as they are. Nobody is paid less than nothing, or anything who never took part.
"""

import numpy as np

from experiment.errors import InputError
from user_grouping_evaluation_sim.scoring import Standing

VESTED = 0.8  # of what a user has earned, paid to the extent that they are still there at the end
LAST = 0.1  # of the rounds: the end
UNIT = 1e-6  # of the metric
MOST_UNITS = 1e12  # of which floats still tell a thousandth


def levelled(brings: np.ndarray, alone: np.ndarray, everybody: np.ndarray, step: float | None) -> np.ndarray:
    """Estimates of Shapley values (R, n) from what users bring to a reward (R, n), and n + 1 audits.

    alone: (R, n), v({i}) - v(nobody). everybody: (R,), v(all) - v(nobody). step: how far a candidate goes towards its
    group. A Shapley value is the mean over sizes of what joining a coalition of that size brings. At size 0 that is
    `alone`; at sizes from 1 on, in a game of means that is linear, it is (x_i - mean x)'e / (size + 1), and a reward is
    `step` times its group's mean of x'e. All alike get what the sum lacks to v(all).
    """
    users = brings.shape[-1]
    later = slope_of(brings, alone, step) * (brings - brings.mean(axis=-1, keepdims=True))
    level: np.ndarray = (everybody - alone.mean(axis=-1))[..., None] / users
    return level + alone / users + later


def slope_of(brings: np.ndarray, alone: np.ndarray, step: float | None) -> np.ndarray:
    """(R, 1): how far Shapley values differ where what users bring differs by 1, (H_n - 1) / (n - 1) / step.

    Where nobody knows the step, None, it is how much less users differ in what they bring, (R, n), than in what they
    are worth alone, (R, n): in a linear game the two differ by the step alone.
    """
    users = brings.shape[-1]
    unit = float((1 / np.arange(2, users + 1)).sum() / max(users - 1, 1))
    if step is not None:
        return np.full((*brings.shape[:-1], 1), unit / step)
    spread = brings.std(axis=-1, keepdims=True)
    return unit * alone.std(axis=-1, keepdims=True) / np.where(spread > 0, spread, np.inf)


def credits(attended: np.ndarray, stayed: np.ndarray, vested: float = VESTED) -> np.ndarray:
    """What share of their value users are paid for, (R, n): that of the rounds which they took part in, `attended`; of
    this the vested part only as far as they took part in the last rounds, `stayed`."""
    return attended * (1 - vested + vested * stayed)


def shares(estimates: np.ndarray, credit: np.ndarray) -> np.ndarray:
    """(R, n) that sum to 1: by the estimates that are above 0, times the credit; even ones where nothing is."""
    earned = np.maximum(estimates, 0) * credit
    total = earned.sum(axis=-1, keepdims=True)
    here = credit > 0
    even = np.where(here.any(axis=-1, keepdims=True), here, True)
    return np.where(total > 0, earned / np.where(total > 0, total, 1), even / even.sum(axis=-1, keepdims=True))


def allotted(budget: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Whole shares (..., n) of whole budgets (...) by weight (..., n), by the largest remainder; of equal ones the
    first. They sum to the budget exactly."""
    budget = np.asarray(budget, dtype=np.int64)[..., None]
    exact = budget * weights / weights.sum(axis=-1, keepdims=True)
    # What rounding errors leave below a whole number is that number.
    counts = np.floor(exact + 1e-9).astype(np.int64)
    rank = np.argsort(np.argsort(-(exact - counts), axis=-1, kind="stable"), axis=-1)
    return counts + (rank < budget - counts.sum(axis=-1, keepdims=True))


def budget_units(gained: np.ndarray) -> np.ndarray:
    """Whole units of what the model has gained (R,), none where it lost, at most MOST_UNITS."""
    return np.round(np.clip(gained / UNIT, 0, MOST_UNITS)).astype(np.int64)


def last_rounds(num_rounds: int) -> int:
    """How many rounds are the end."""
    return max(1, round(LAST * num_rounds))


def pay(
    standing: Standing,
    alone: np.ndarray,
    everybody: np.ndarray,
    gained: np.ndarray,
    credit: np.ndarray,
    step: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Whole units (R, n) that sum to the budget, what the model has gained (R,), and their standard errors, NaN where
    the scoring knows none. alone, everybody, step: see levelled. credit: see credits.

    Raises InputError where the scoring knows what users bring and an audit has no value.
    """
    budget, unknown = budget_units(gained), np.full(credit.shape, np.nan)
    if standing.brings is None:
        return allotted(budget, shares(standing.points, credit)), unknown
    if not (np.isfinite(alone).all() and np.isfinite(everybody).all()):
        raise InputError("pay: the metric must give one finite number a vector, also for the zero vector (nobody's)")
    estimates = levelled(standing.brings, alone, everybody, step)
    total = (np.maximum(estimates, 0) * credit).sum(axis=-1, keepdims=True)
    a_unit = slope_of(standing.brings, alone, step) * credit * budget[:, None] / np.where(total > 0, total, np.nan)
    return allotted(budget, shares(estimates, credit)), a_unit * (
        unknown if standing.errors is None else standing.errors
    )


# ---------------------------------------------------------------- how good pay is


def fair_shares(shapley: np.ndarray) -> np.ndarray:
    """Shapley values' shares (R, n) of a budget, nobody below nothing; NaN where none is above it."""
    positive = np.maximum(shapley, 0)
    total = positive.sum(axis=-1, keepdims=True)
    return positive / np.where(total > 0, total, np.nan)


def misallocation(pay: np.ndarray, shapley: np.ndarray) -> np.ndarray:
    """Share of the budget that is with the wrong people, (R,): half the sum of the absolute differences of shares; NaN
    where there is none."""
    total = pay.sum(axis=-1, keepdims=True)
    own = pay / np.where(total > 0, total, np.nan)
    return 0.5 * np.abs(own - fair_shares(shapley)).sum(axis=-1)


def unpaid(pay: np.ndarray, shapley: np.ndarray) -> np.ndarray:
    """Share of the users with a positive Shapley value who are paid nothing, (R,); NaN where nobody has one."""
    deserving = shapley > 0
    count = deserving.sum(axis=-1)
    return ((pay <= 0) & deserving).sum(axis=-1) / np.where(count > 0, count, np.nan)


def gini(pay: np.ndarray) -> np.ndarray:
    """Gini coefficient (R,): 0 where all are paid alike, 1 - 1/n where one is paid everything."""
    users = pay.shape[-1]
    ordered = np.sort(pay, axis=-1)
    total = ordered.sum(axis=-1)
    ranked = (ordered * (2 * np.arange(1, users + 1) - users - 1)).sum(axis=-1)
    return ranked / np.where(total > 0, total, 1) / users
