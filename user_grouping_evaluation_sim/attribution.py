"""How much of the groups' rewards each user brings: a mixed linear model of all rounds' rewards on weights.

To first order a reward is linear in the weights of those who made the candidate:

    r_c - mean over groups of r = sum_i (w_ci - mean over groups of w_i) (beta_i + d_bi) + error

beta ~ N(0, spread) is what a user brings. The model moves, so in each of two blocks of rounds (measuring, exploiting:
see scoring.py) it differs a little: d_b ~ N(0, drift). Errors of groups' candidates and of merged ones, which lie far
off and see the metric's curvature, have variances of their own. So a block weighs as much as the data say: under noise
all rounds alike, without it those before the model's move.

Coefficients solve the mixed model's equations (Henderson, 1975), by conjugate gradients that go on from the round
before. The variances are found by expectation maximisation, a step a round (Laird and Ware, 1982); its traces are
estimated with random signs (Hutchinson, 1990). A round costs O(users^2), or, of more than MOST_DENSE users,
O(users) for every round so far. What the equations' matrices make of the solution is kept beside it, so that
each of them is gone through once an iteration, and no more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse

if TYPE_CHECKING:
    from user_grouping_evaluation_sim.scoring import Round

BLOCKS = 2  # of rounds: measuring, exploiting
KINDS = 2  # of candidates: a group's, the merged one
OUTLIER = 10.0  # median absolute deviations; of a normal distribution 6.7 standard deviations
ITERATIONS = 4  # of conjugate gradients a round
CONVERGED = 1e-10  # relative error at which they rest
PROBES = 3  # columns of random signs; 1 where rounds are replayed: of many users one says as much
MOST_DENSE = 447  # users whose matrices are kept; of more, rounds are replayed. Not how many runs are side by side
LEAST_ERROR = 1e-4  # variance, as a share of the rewards' mean square: a fit that is better is rounding
LEAST_SPREAD = 1e-12  # variance, as a share of the same
LEAST_DRIFT = 1e-3  # variance, as a share of the spread
FIRST_DRIFT = 0.1  # the same, until both blocks have begun


@dataclass(frozen=True)
class Equations:
    """Of R runs, so many each. moment: (R, n), x'y. diagonal: (R, n), of x'x. gram: (R, n, n), x'x, or None where
    rounds are replayed. square: (R,), y'y."""

    count: int
    moment: np.ndarray
    diagonal: np.ndarray
    gram: np.ndarray | None
    square: np.ndarray

    def with_more(self, other: "Equations") -> "Equations":
        gram = None if self.gram is None or other.gram is None else self.gram + other.gram
        return Equations(
            self.count + other.count,
            self.moment + other.moment,
            self.diagonal + other.diagonal,
            gram,
            self.square + other.square,
        )


Stratum = tuple[int, int]
"""Kind of candidate and block of rounds."""
Strata = Mapping[Stratum, Equations]
Products = Mapping[Stratum, np.ndarray]


@dataclass(frozen=True)
class Attribution:
    """After so many `rounds`, for R runs of n users. errors: (KINDS, R), spread, drift: (R,), the variances.
    solved: (1 + BLOCKS, R, n, 1 + probes), beta and each d, and the same of the probes. products: each stratum's
    x'x times (beta + d), (R, n, 1 + probes)."""

    rounds: int
    strata: Strata
    errors: np.ndarray
    spread: np.ndarray
    drift: np.ndarray
    solved: np.ndarray
    products: Products

    @property
    def begun(self) -> int:
        """Blocks of rounds so far."""
        return len({block for _, block in self.strata})

    @property
    def shares(self) -> np.ndarray:
        """(R, n): beta + d of measuring, when large coalitions' marginals are seen. Later rounds speak for beta."""
        return self.shares_in(0)

    def shares_in(self, block: int) -> np.ndarray:
        """(R, n): beta + d."""
        shares: np.ndarray = self.solved[0, ..., 0] + self.solved[1 + block, ..., 0]
        return shares


def attribute(before: Attribution | None, history: Sequence["Round"], measured: int) -> Attribution:
    """With the last round of the history added. measured: how many rounds the first block has."""
    last = history[-1]
    last = replace(last, rewards=without_outliers([past.rewards for past in history]))
    new = equations_of(last, dense=last.labels.shape[1] <= MOST_DENSE)
    block = block_of(len(history), measured)
    if before is None:
        found = _begin({(kind, block): equations for kind, equations in new.items()})
    else:
        strata, products = dict(before.strata), dict(before.products)
        more = _normal_of(last, before.solved[0] + before.solved[1 + block])
        for kind, equations in new.items():
            key = kind, block
            strata[key] = strata[key].with_more(equations) if key in strata else equations
            products[key] = products[key] + more[kind] if key in products else more[kind]
        found = replace(before, rounds=before.rounds + 1, strata=strata, products=products)
    return _with_variances(_solve(found, partial(_normal, found.strata, history, measured)))


def block_of(number: int, measured: int) -> int:
    """Of the round with that number, from 1."""
    return int(number > measured)


# ---------------------------------------------------------------- equations


def without_outliers(rewards: Sequence[np.ndarray]) -> np.ndarray:
    """The last round's (R, G), none further from the round's median than OUTLIER times what rewards of all rounds are,
    in the median: one user who is a hundred times as large does not drown what all others bring."""
    by_round = np.stack(rewards)
    away = by_round - np.median(by_round, axis=2, keepdims=True)
    furthest = OUTLIER * np.median(np.abs(away), axis=(0, 2))[:, None]
    furthest = np.where(furthest > 0, furthest, np.inf)  # most rewards are equal: the others say all
    return by_round[-1] - away[-1] + np.clip(away[-1], -furthest, furthest)


def equations_of(past: "Round", *, dense: bool) -> dict[int, Equations]:
    """Of a round, by kind of candidate. dense: with the matrix."""
    runs, groups = past.rewards.shape
    common = past.rewards.mean(axis=1)
    y = past.rewards - common[:, None]
    moment = (incidence(past).T @ y.ravel()).reshape(runs, -1)
    x = group_design(past) if dense else None
    gram = None if x is None else x.transpose(0, 2, 1) @ x
    found = {0: Equations(groups - 1, moment, past.weights**2 * (1 - 1 / groups), gram, (y**2).sum(axis=1))}
    if past.merged_weights is not None and past.merged_reward is not None:
        merged, merged_y = merged_design(past, past.merged_weights), past.merged_reward - common
        gram = merged[:, :, None] * merged[:, None] if dense else None
        found[1] = Equations(1, merged * merged_y[:, None], merged**2, gram, merged_y**2)
    return found


def group_design(past: "Round") -> np.ndarray:
    """(R, G, n): weights less the groups' mean."""
    groups = past.rewards.shape[1]
    own = past.labels[:, None] == np.arange(groups)[:, None]
    return (own - 1 / groups) * past.weights[:, None]


def merged_design(past: "Round", merged_weights: np.ndarray) -> np.ndarray:
    """(R, n). Everybody weighs w / G in the groups' mean."""
    return merged_weights - past.weights / past.rewards.shape[1]


def incidence(past: "Round") -> scipy.sparse.csc_array:
    """Weights as a matrix (R G, R n), a row a group of a run."""
    runs, groups = past.rewards.shape
    place = past.labels + groups * np.arange(runs)[:, None]
    entries = past.weights.ravel(), place.ravel(), np.arange(past.labels.size + 1)
    return scipy.sparse.csc_array(entries, shape=(runs * groups, past.labels.size))


def _normal(strata: Strata, history: Sequence["Round"], measured: int, u: np.ndarray) -> Products:
    """x'x (beta + d) of every stratum: u (1 + BLOCKS, R, n, columns) -> (R, n, columns) each."""
    if all(equations.gram is not None for equations in strata.values()):
        return {key: equations.gram @ (u[0] + u[1 + key[1]]) for key, equations in strata.items()}
    result = {key: np.zeros(u.shape[1:]) for key in strata}
    for number, past in enumerate(history, start=1):
        block = block_of(number, measured)
        for kind, product in _normal_of(past, u[0] + u[1 + block]).items():
            result[kind, block] += product
    return result


def _normal_of(past: "Round", both: np.ndarray) -> dict[int, np.ndarray]:
    """x'x (beta + d) of one round, by kind of candidate: (R, n, columns) -> the same."""
    rows = incidence(past)
    sums = (rows @ both.reshape(-1, both.shape[-1])).reshape(*past.rewards.shape, -1)
    apart = sums - sums.mean(axis=1, keepdims=True)
    found = {0: (rows.T @ apart.reshape(-1, both.shape[-1])).reshape(both.shape)}
    if past.merged_weights is not None:
        merged = merged_design(past, past.merged_weights)[..., None]
        found[1] = merged * (merged * both).sum(axis=1, keepdims=True)
    return found


# ---------------------------------------------------------------- their solution


def _begin(strata: Strata) -> Attribution:
    """As if half of the first rewards' variance were what users bring, and half errors; 1 where nothing varies."""
    first = strata[0, 0]
    runs, users = first.moment.shape
    half = np.where(first.square > 0, first.square, 2.0) / max(first.count, 1) / 2
    weights = first.diagonal.sum(axis=1)
    spread = half * max(first.count, 1) / np.where(weights > 0, weights, 1.0)
    probes = 1 if first.gram is None else PROBES
    solved = np.zeros((1 + BLOCKS, runs, users, 1 + probes))
    products = {key: np.zeros(solved.shape[1:]) for key in strata}
    return Attribution(1, strata, np.stack([half] * KINDS), spread, FIRST_DRIFT * spread, solved, products)


@cache
def _signs(users: int, probes: int) -> np.ndarray:
    """(1 + BLOCKS, 1, users, probes) of -1 and 1, always the same."""
    return np.random.default_rng(0).integers(0, 2, (1 + BLOCKS, 1, users, probes)) * 2.0 - 1


def _prior(found: Attribution) -> np.ndarray:
    """Precisions of beta and of each d, (1 + BLOCKS, R, 1, 1)."""
    return 1 / np.stack([found.spread, *[found.drift] * BLOCKS])[:, :, None, None]


def _weighed(found: Attribution, by_stratum: Products) -> np.ndarray:
    """The strata's numbers (R, n, columns), summed by precision for each d, and for beta: (1 + BLOCKS, R, n, ...)."""
    result = np.zeros((1 + BLOCKS, *next(iter(by_stratum.values())).shape))
    for (kind, block), numbers in by_stratum.items():
        result[1 + block] += numbers / found.errors[kind][:, None, None]
    result[0] = result[1:].sum(axis=0)
    return result


def _preconditioner(found: Attribution) -> np.ndarray:
    """The equations' diagonal, (1 + BLOCKS, R, n, 1)."""
    diagonals = {key: equations.diagonal[..., None] for key, equations in found.strata.items()}
    return _weighed(found, diagonals) + _prior(found)


def _solve(found: Attribution, normal: Callable[[np.ndarray], Products]) -> Attribution:
    """A few steps of preconditioned conjugate gradients from what was solved before, all columns side by side."""
    prior, diagonal, u = _prior(found), _preconditioner(found), found.solved
    moments = {key: equations.moment[..., None] for key, equations in found.strata.items()}
    probes = u.shape[-1] - 1
    signs = np.broadcast_to(_signs(u.shape[2], probes), (*u.shape[:-1], probes))
    wanted = np.concatenate([_weighed(found, moments), signs], axis=-1)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("brnc,brnc->rc", a, b)[:, None]

    products = dict(found.products)
    left = wanted - _weighed(found, products) - prior * u
    direction = left / diagonal
    size = product(left, direction)
    solved_to = CONVERGED**2 * product(wanted, wanted / diagonal)
    for _ in range(ITERATIONS):
        by_stratum = normal(direction)
        through = _weighed(found, by_stratum) + prior * direction
        open_ = size > solved_to  # beyond, quotients of rounding errors would move it
        step = np.divide(size, product(direction, through), out=np.zeros_like(size), where=open_)
        u = u + step * direction
        products = {key: product + step * by_stratum[key] for key, product in products.items()}
        left = left - step * through
        better = left / diagonal
        new = product(left, better)
        direction = better + np.divide(new, size, out=np.zeros_like(size), where=open_) * direction
        size = new
    return replace(found, solved=u, products=products)


def _with_variances(found: Attribution) -> Attribution:
    """One step of expectation maximisation: a variance is its estimates' mean square plus their uncertainty."""
    _, runs, users, columns = found.solved.shape
    signs, scale = _signs(users, columns - 1), _mean_square(found.strata)
    varied = scale > 0  # else nothing is learnt: all users are alike
    u, probes = found.solved[..., 0], found.solved[..., 1:]
    uncertain = np.maximum((signs * probes).mean(axis=3).sum(axis=2), 0)  # traces, (1 + BLOCKS, R)
    of_beta, *of_drifts = (u**2).sum(axis=2) + uncertain
    spread = np.where(varied, np.maximum(of_beta / users, LEAST_SPREAD * scale), found.spread)
    drift = np.mean(of_drifts, axis=0) / users if found.begun == BLOCKS else FIRST_DRIFT * spread
    squares, counts = np.zeros((KINDS, runs)), np.zeros(KINDS)
    for (kind, block), product in found.products.items():
        equations = found.strata[kind, block]
        fitted = u[0] + u[1 + block]
        squares[kind] += equations.square - ((2 * equations.moment - product[..., 0]) * fitted).sum(axis=1)
        unsure = (product[..., 1:] * (signs[0] + signs[1 + block])).mean(axis=2).sum(axis=1)
        squares[kind] += np.maximum(unsure, 0)
        counts[kind] += equations.count
    errors = np.where(counts[:, None] > 0, squares / np.maximum(counts, 1)[:, None], found.errors)
    return replace(
        found,
        errors=np.where(varied, np.maximum(errors, LEAST_ERROR * scale), found.errors),
        spread=spread,
        drift=np.maximum(drift, LEAST_DRIFT * spread),
    )


def _mean_square(strata: Strata) -> np.ndarray:
    """(R,), of the groups' rewards while measuring, or where these do not vary of all rewards."""
    first = strata[0, 0]
    everything = sum(equations.square for equations in strata.values())
    count = sum(equations.count for equations in strata.values())
    scale: np.ndarray = np.where(first.square > 0, first.square / max(first.count, 1), everything / max(count, 1))
    return scale


def standard_errors(found: Attribution) -> np.ndarray:
    """(R, n), of the shares: their standard deviation over groups and errors drawn anew, of the same users and drift.

    Of the estimator, not of what it estimates: shrinkage towards 0 is in all of them alike. Where rounds are replayed,
    by the users' diagonal, scaled to the probes' mean: an upper bound.
    """
    _, runs, users, _ = found.solved.shape
    grams = {key: equations.gram for key, equations in found.strata.items()}
    of = np.array([1.0, 1.0] + [0.0] * (BLOCKS - 1))  # the shares, of beta and each d
    if any(gram is None for gram in grams.values()):
        signs, probes = (
            np.tensordot(of, a, 1) for a in (_signs(users, found.solved.shape[-1] - 1), found.solved[..., 1:])
        )
        mean = (signs * probes).mean(axis=(1, 2))
        by_user = 1 / _preconditioner(found)[0, ..., 0]
        return np.sqrt(by_user * (np.maximum(mean, 0) / by_user.mean(axis=1))[:, None])
    prior = np.repeat(_prior(found)[:, :, 0, 0].T, users, axis=1)
    weighed = _weighed(found, {key: np.asarray(gram) for key, gram in grams.items()})
    return np.stack([_dense_errors(weighed[:, run], prior[run], of) for run in range(runs)])


def _dense_errors(grams: np.ndarray, prior: np.ndarray, of: np.ndarray) -> np.ndarray:
    """(n,), of one run: its inverse is the largest array of all. grams: (1 + BLOCKS, n, n), by precision. prior: of
    all coefficients, ((1 + BLOCKS) n,). of: (1 + BLOCKS,)."""
    blocks, users, _ = grams.shape
    whole = np.diag(prior)
    for block, gram in enumerate(grams):
        own = slice(block * users, (1 + block) * users)  # the first is beta's
        whole[own, own] += gram
        if block:
            whole[:users, own] = whole[own, :users] = gram
    inverse = np.linalg.inv(whole).reshape(blocks, users, blocks, users)
    ours = np.einsum("b,bicj->icj", of, inverse)
    shrinkage = (ours.reshape(users, -1) ** 2 * prior).sum(axis=1)
    return np.sqrt(np.maximum(np.einsum("c,ici->i", of, ours) - shrinkage, 0))
