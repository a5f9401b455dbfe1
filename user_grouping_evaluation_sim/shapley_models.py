"""Control variates for the estimator of shapley_sampling.py: models of a coalition game whose D_t is closed form.

D_t(i) is the mean value of the coalitions of size t that hold player i less that of those which do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln
from threadpoolctl import threadpool_limits

PENALTIES = (1e-9, 1e-3, 1e-2, 1e-1, 1.0)  # of ridge regression, as shares of a column's sum of squares
PLENTY = 10  # so many coalitions a coefficient need no penalty
LEAST_FOR_TREES = 400  # coalitions
GOOD = 1e-6  # share of the values' variance left, with which no trees are tried
TREES = 300
LEAVES = 63
FEW = 1000  # coalitions, of which who is in them is tried as well where there are features


@dataclass(frozen=True)
class Model:
    """predict: members (m, n) bool, sizes (m,) -> (m,). contrasts: (n + 1, n), D_t of sizes 1 .. n - 1, else 0."""

    predict: Callable[[np.ndarray, np.ndarray], np.ndarray]
    contrasts: np.ndarray


@dataclass(frozen=True)
class _Basis:
    """columns: members, sizes -> (m, k). contrasts: coefficients (k,) -> (n + 1, n)."""

    columns: Callable[[np.ndarray, np.ndarray], np.ndarray]
    contrasts: Callable[[np.ndarray], np.ndarray]


def nothing(n: int) -> Model:
    return Model(lambda members, sizes: np.zeros(len(sizes)), np.zeros((n + 1, n)))


def _of_size(sizes: np.ndarray, n: int) -> np.ndarray:
    """(m, 4) what depends on the size alone; no player's D_t."""
    p = sizes / n
    return np.stack([np.ones_like(p), 1 / sizes, p, p**2], axis=1)


def membership(n: int) -> _Basis:
    """Sums over the members: of w_i + u_i / t."""
    sizes = np.arange(1, n)

    def columns(members: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        inside = members - (sizes / n)[:, None]
        return np.hstack([_of_size(sizes, n), inside, inside / sizes[:, None]])

    def contrasts(coefficients: np.ndarray) -> np.ndarray:
        fixed, shared = coefficients[4:].reshape(2, n)
        found = np.zeros((n + 1, n))
        by_size = fixed + shared / sizes[:, None]
        found[1:n] = (by_size - by_size.mean(axis=1, keepdims=True)) * (n / (n - 1))
        return found

    return _Basis(columns, contrasts)


def mean_linear(standard: np.ndarray) -> _Basis:
    """Of a coalition's mean feature z: z.l. standard: (n, d), of mean 0."""
    n, _ = standard.shape

    def columns(members: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return np.hstack([_of_size(sizes, n), (members @ standard) / sizes[:, None]])

    def contrasts(coefficients: np.ndarray) -> np.ndarray:
        found = np.zeros((n + 1, n))
        found[1:n] = standard @ coefficients[4:] * (n / (n - 1) / np.arange(1, n))[:, None]
        return found

    return _Basis(columns, contrasts)


def mean_quadratic(standard: np.ndarray, direction: np.ndarray) -> _Basis:
    """z.(l0 + l1/t) + z^2.(q0 + q1/t) + (z.b) z.(c0 + c1/t), with z a coalition's mean feature and b the direction.

    For sums S over t of n centred points: E[S | i in] - E[S | i out] = y_i n / (n - 1), and, with h_i = y_i' H y_i,
    E[S' H S | i in] - E[S' H S | i out] = (h_i - mean h) (1 + (3 - 2 t) / (n - 1) - 4 (t - 1) / ((n - 1) (n - 2))).
    """
    n, d = standard.shape

    def columns(members: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        inverse = 1 / sizes[:, None]
        z = (members @ standard) * inverse
        k = len(sizes)
        found = np.empty((k, 4 + 6 * d))
        found[:, :4] = _of_size(sizes, n)
        blocks = found[:, 4 : 4 + 3 * d]
        blocks[:, :d] = z
        np.multiply(z, z, out=blocks[:, d : 2 * d])
        np.multiply(z, (z @ direction)[:, None], out=blocks[:, 2 * d :])
        np.multiply(blocks, inverse, out=found[:, 4 + 3 * d :])
        return found

    def contrasts(coefficients: np.ndarray) -> np.ndarray:
        sizes = np.arange(1, n)
        blocks = np.stack([standard, standard**2, standard * (standard @ direction)[:, None]])  # (3, n, d)
        by_power = np.einsum("bnd,pbd->pbn", blocks, coefficients[4:].reshape(2, 3, d))
        straight = n / (n - 1) / sizes
        square = (1 + (3 - 2 * sizes) / (n - 1) - 4 * (sizes - 1) / ((n - 1) * max(n - 2, 1))) / sizes**2
        found = np.zeros((n + 1, n))
        for power in range(2):
            linear, *squares = by_power[power]
            sum_of_squares = sum(squares)
            found[1:n] += np.outer(straight / sizes**power, linear)
            found[1:n] += np.outer(square / sizes**power, sum_of_squares - sum_of_squares.mean())
        return found

    return _Basis(columns, contrasts)


def ridge(
    basis: _Basis, members: np.ndarray, sizes: np.ndarray, values: np.ndarray, weights: np.ndarray, least: int
) -> list[tuple[Model, np.ndarray]]:
    """Weighted least squares with standardised columns: a model and its coefficients for every penalty.

    least: coalitions that the smallest part has which is fitted so; all parts get the same penalties.
    """
    design = basis.columns(members, sizes) * weights[:, None]
    spread = np.sqrt(np.einsum("mk,mk->k", design, design))
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    gram = (design.T @ design) * scale * scale[:, None]
    slope = (design.T @ (values * weights)) * scale
    penalties = PENALTIES[:1] if least >= PLENTY * len(gram) else PENALTIES
    found = []
    for penalty in penalties:
        inner = gram.copy()
        inner[np.diag_indices(len(gram))] += np.where(spread > 0, penalty, 1)
        coefficients = np.linalg.solve(inner, slope) * scale
        found.append((_linear(basis, coefficients), coefficients))
    return found


def _linear(basis: _Basis, coefficients: np.ndarray) -> Model:
    return Model(lambda members, sizes: basis.columns(members, sizes) @ coefficients, basis.contrasts(coefficients))


def trees(members: np.ndarray, sizes: np.ndarray, values: np.ndarray, weights: np.ndarray, seed: int) -> Model:
    """Gradient boosting on who is in a coalition and on how many they are."""
    from sklearn.ensemble import HistGradientBoostingRegressor  # slow to import, and few games need it

    n = members.shape[1]
    scale = np.abs(values).max() or 1.0
    grown = HistGradientBoostingRegressor(
        max_iter=TREES,
        max_leaf_nodes=LEAVES,
        learning_rate=0.15,
        max_features=0.4,
        early_stopping=False,
        random_state=seed,
    )
    with threadpool_limits(1):  # more threads than free cores would wait for each other
        grown.fit(np.column_stack([members, sizes]), values / scale, sample_weight=(weights / weights.mean()) ** 2)
    contrasts = np.zeros((n + 1, n))
    for tree in grown._predictors:  # no public name shows them
        contrasts += _tree_contrasts(tree[0].nodes, n)

    def predict(members: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        with threadpool_limits(1):
            return grown.predict(np.column_stack([members, sizes])) * scale

    return Model(predict, contrasts * scale)


def _tree_contrasts(nodes: np.ndarray, n: int) -> np.ndarray:
    """A leaf is a game: its value where all of `inside` and none of `outside` are members, and the size fits."""
    inside, outside = np.zeros((2, len(nodes), n), dtype=bool)
    least, most = np.zeros(len(nodes)), np.full(len(nodes), float(n))
    for parent in np.flatnonzero(~nodes["is_leaf"].astype(bool)):  # parents come before their children
        left, right, feature = (int(nodes[name][parent]) for name in ("left", "right", "feature_idx"))
        for child in (left, right):
            inside[child], outside[child] = inside[parent], outside[parent]
            least[child], most[child] = least[parent], most[parent]
        if feature == n:
            threshold = np.floor(nodes["num_threshold"][parent])
            most[left], least[right] = min(most[parent], threshold), max(least[parent], threshold + 1)
        else:
            outside[left, feature] = inside[right, feature] = True
    leaves = nodes["is_leaf"].astype(bool)
    inside, outside = inside[leaves], outside[leaves]
    p, q = inside.sum(axis=1)[:, None], outside.sum(axis=1)[:, None]
    sizes = np.arange(1, n)
    fits = (sizes >= least[leaves][:, None]) & (sizes <= most[leaves][:, None])
    worth = nodes["value"][leaves][:, None] * fits
    others = n - p - q
    chance = _ratio(others, sizes - p, n, sizes)
    held = _ratio(others - 1, sizes - 1 - p, n - 1, sizes - 1)
    missing = _ratio(others - 1, sizes - p, n - 1, sizes)
    free = worth * (held - missing)
    found = np.zeros((n + 1, n))
    found[1:n] = (worth * chance * n / sizes - free).T @ inside - (worth * chance * n / (n - sizes) + free).T @ outside
    found[1:n] += free.sum(axis=0)[:, None]
    return found


def _ratio(a: np.ndarray, b: np.ndarray, c: np.ndarray | int, d: np.ndarray) -> np.ndarray:
    """C(a, b) / C(c, d), 0 where there is no such choice."""
    a, b, c, d = np.broadcast_arrays(a, b, c, d)
    possible = (b >= 0) & (b <= a) & (d >= 0) & (d <= c)
    a, b, c, d = (np.where(possible, x, 0) for x in (a, b, c, d))
    log = gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1) - gammaln(c + 1) + gammaln(d + 1) + gammaln(c - d + 1)
    return np.where(possible, np.exp(log), 0.0)


def standardised(features: np.ndarray) -> np.ndarray:
    """(n, d) of mean 0 and variance 1 a column; columns that are constant, to rounding, are left out."""
    centred = features - features.mean(axis=0)
    spread = centred.std(axis=0)
    kept = spread > 1e-12 * np.abs(features).max(axis=0, initial=0)
    return centred[:, kept] / spread[kept]


def cross_fitted(
    members: np.ndarray,
    sizes: np.ndarray,
    values: np.ndarray,
    folds: np.ndarray,
    weights: np.ndarray,
    standard: np.ndarray | None,
    seed: int,
) -> tuple[list[Model], np.ndarray]:
    """For every fold (0 .. K - 1) the model fitted on the others, and each coalition's prediction by its fold's, (m,).

    Of several kinds the one whose predictions are best. standard: the players' standardised features, if any.
    """
    m, n = members.shape
    count = int(folds.max(initial=0)) + 1
    least = m - int(np.bincount(folds).max(initial=0))
    kinds: list[list[Model]] = []  # of each fold
    for fold in range(count):
        others = folds != fold
        part = members[others].astype(float), sizes[others], values[others], weights[others], least
        found = [nothing(n)]
        if standard is not None:
            straight = ridge(mean_linear(standard), *part)
            slope = straight[len(straight) // 2][1][4:]
            direction = slope / (np.linalg.norm(slope) or 1.0)
            found += [model for model, _ in straight + ridge(mean_quadratic(standard, direction), *part)]
        if standard is None or m < FEW:
            found += [model for model, _ in ridge(membership(n), *part)]
        kinds.append(found)

    def predictions(fits: list[Model]) -> np.ndarray:
        predicted = np.zeros(m)
        for fold, fit in enumerate(fits):
            predicted[folds == fold] = fit.predict(members[folds == fold], sizes[folds == fold])
        return predicted

    def misses(pair: tuple[list[Model], np.ndarray]) -> float:
        return float((((values - pair[1]) * weights) ** 2).sum())

    candidates = [(list(fits), predictions(list(fits))) for fits in zip(*kinds, strict=True)]
    best = min(candidates, key=misses)
    spread = float((((values - np.average(values, weights=weights**2)) * weights) ** 2).sum()) if m else 0.0
    explained = standard is not None and standard.shape[1] > 0
    if explained or m < LEAST_FOR_TREES or misses(best) < GOOD * spread:
        return best
    grown = [
        trees(members[others], sizes[others], values[others], weights[others], seed)
        for others in (folds != fold for fold in range(count))
    ]
    return min(best, (grown, predictions(grown)), key=misses)
