"""Shapley values of the game v(S) = metric(mean of S's vectors, expert), v(empty) = metric(0, expert).

The estimator behind method "stratified". With A_t(i) and B_t(i) the mean value of the coalitions of size t that hold
user i and that do not, and D_t = A_t - B_t,

    phi_i = (v(N) - v(empty)) / n + (1 / n) * sum of D_t(i) over t = 1 .. n - 1,

so that one evaluated coalition informs the estimate of every user (the idea of SVARM: Kolpaczki et al., AAAI 2024).
Sizes 1, 2 and n - 1 are enumerated. In between, the value is split into a control variate, quadratic in the
coalition's mean, whose D_t is closed form, and a remainder that is sampled: a coalition T of size t with remainder r,
drawn with expected frequency m_t, adds r * (1[i in T] - t/n) / (n * m_t * t/n * (1 - t/n)) to user i. The quadratic
is fitted by regression on one half of the sample and used on the other (cross-fitting), so the estimate stays
unbiased whatever the fit; sizes are drawn in proportion to the remainder's standard deviation (Neyman allocation).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from experiment.errors import InputError
from user_grouping_evaluation_sim.metrics import Metric, dot

METHODS = ("auto", "exact", "closed_form", "stratified", "permutation", "kernel")
MOST_USERS_ENUMERATED = 16  # by method "auto"
MOST_USERS_EXACT = 22  # by method "exact"
MOST_EVALUATIONS = 2_000_000  # where the caller names no budget
DEFAULT_EVALUATIONS = 10_000  # of the methods that have no stopping rule
FITTED_COALITIONS = 20_000  # the control variate is fitted to this many at most
CHUNK_NUMBERS = 4_000_000  # how many numbers a temporary array may hold


@dataclass(frozen=True)
class ShapleyEstimate:
    """values, standard_errors: (n,), in the metric's unit. Errors are 0 for exact methods, NaN for "kernel"."""

    values: np.ndarray
    standard_errors: np.ndarray
    evaluations: int
    method: str


def shapley_values(
    user_points: np.ndarray,
    expert_point: np.ndarray,
    metric: Metric,
    *,
    method: str = "auto",
    precision: float = 0.01,
    max_evaluations: int | None = None,
    seed: int | np.random.SeedSequence = 0,
) -> ShapleyEstimate:
    """Shapley values of the users in the game v(S) = metric(mean of S's points, expert_point).

    user_points: (n, d). expert_point: (d,). metric: see metrics.py.
    method:
      "exact"        all 2^n coalitions
      "closed_form"  for the dot product: phi_i = v(N)/n + H_(n-1)/(n-1) * (x_i - mean x).e, with H the harmonic number
      "stratified"   see the module's text; stops when the largest standard error is at most `precision` times the
                     values' standard deviation, or at `max_evaluations`
      "permutation"  plain permutation sampling (Castro et al., 2009)
      "kernel"       shap.KernelExplainer (Lundberg and Lee, 2017), as in the original study
      "auto"         closed_form where the metric is the dot product, exact up to 16 users, otherwise stratified
    max_evaluations: how often the metric may be computed; 10,000 for "permutation" and "kernel" where not given.
    Raises InputError for an unknown method, one that does not fit the metric or the size, or points not finite.
    """
    points = np.asarray(user_points, dtype=np.float64)
    expert = np.asarray(expert_point, dtype=np.float64)
    if points.ndim != 2 or expert.shape != points.shape[1:] or not len(points):
        raise InputError(f"shapley: user points {points.shape} and expert {expert.shape} must be (n, d) and (d,)")
    if not (np.isfinite(points).all() and np.isfinite(expert).all()):
        raise InputError("shapley: a user's or the expert's point holds NaN or infinity; remove or fill it")
    if method == "auto":
        few = len(points) <= MOST_USERS_ENUMERATED
        method = "closed_form" if metric is dot else "exact" if few else "stratified"
    rng = np.random.default_rng(seed)
    if method == "closed_form":
        if metric is not dot:
            raise InputError("shapley: closed_form is for the metric dot; take auto, exact or stratified")
        return _closed_form(points, expert)

    def value(means: np.ndarray) -> np.ndarray:
        """The values of coalitions with these mean vectors (m, d), in chunks that bound a metric's temporaries."""
        step = max(1, CHUNK_NUMBERS // means.shape[1])
        parts = [np.asarray(metric(means[i : i + step], expert)) for i in range(0, len(means), step)]
        values = np.concatenate(parts)
        if values.shape != means.shape[:1] or not np.isfinite(values).all():
            raise InputError(
                "shapley: the metric must give one finite number a vector, "
                "also for the zero vector (the value of no users)"
            )
        return values

    if method == "exact":
        return _exact(points, value)
    if method == "stratified":
        return _stratified(points, value, precision, max_evaluations or MOST_EVALUATIONS, rng)
    if method == "permutation":
        return _permutation(points, value, max_evaluations or DEFAULT_EVALUATIONS, rng)
    if method == "kernel":
        return _kernel(points, value, max_evaluations or DEFAULT_EVALUATIONS, rng)
    raise InputError(f"shapley: unknown method {method!r}; choose from {', '.join(METHODS)}")


Value = Callable[[np.ndarray], np.ndarray]


def _closed_form(points: np.ndarray, expert: np.ndarray) -> ShapleyEstimate:
    n = len(points)
    alignment = points @ expert
    harmonic = (1.0 / np.arange(1, n)).sum()
    values = alignment.mean() / n + harmonic / max(n - 1, 1) * (alignment - alignment.mean())
    return ShapleyEstimate(values, np.zeros(n), 0, "closed_form")


def _exact(points: np.ndarray, value: Value) -> ShapleyEstimate:
    n, d = points.shape
    if n > MOST_USERS_EXACT:
        raise InputError(f"shapley: exact enumerates 2^n coalitions, too many for {n} users; take stratified")
    sums, sizes = np.zeros((1, d)), np.zeros(1, dtype=int)
    for point in points:  # bit i of a row's index says whether user i is in the coalition
        sums, sizes = np.concatenate([sums, sums + point]), np.concatenate([sizes, sizes + 1])
    values = value(sums / np.maximum(sizes, 1)[:, None])
    # |S|! (n - |S| - 1)! / n!, as a recurrence
    weight = np.cumprod(np.concatenate([[1 / n], np.arange(1, n) / (n - np.arange(1, n))]))
    phi = np.empty(n)
    coalitions = np.arange(2**n)
    for i in range(n):
        without = coalitions[(coalitions >> i) & 1 == 0]
        phi[i] = weight[sizes[without]] @ (values[without | (1 << i)] - values[without])
    return ShapleyEstimate(phi, np.zeros(n), 2**n, "exact")


def _permutation(points: np.ndarray, value: Value, evaluations: int, rng: np.random.Generator) -> ShapleyEstimate:
    n, d = points.shape
    count = max(2, evaluations // n)
    empty = value(np.zeros((1, d)))[0]
    total, squares = np.zeros(n), np.zeros(n)
    step = max(1, CHUNK_NUMBERS // (n * d))
    for start in range(0, count, step):
        rows = min(step, count - start)
        orders = rng.permuted(np.tile(np.arange(n), (rows, 1)), axis=1)
        means = points[orders].cumsum(axis=1) / np.arange(1, n + 1)[:, None]
        values = value(means.reshape(-1, d)).reshape(rows, n)
        marginals = np.diff(values, axis=1, prepend=empty)
        total += np.bincount(orders.ravel(), marginals.ravel(), n)
        squares += np.bincount(orders.ravel(), marginals.ravel() ** 2, n)
    mean = total / count
    variance = (squares / count - mean**2) * count / (count - 1)
    return ShapleyEstimate(mean, np.sqrt(np.maximum(variance, 0) / count), count * n + 1, "permutation")


def _kernel(points: np.ndarray, value: Value, evaluations: int, rng: np.random.Generator) -> ShapleyEstimate:
    import shap  # slow to import, and only the study's estimator needs it

    n = len(points)
    evaluated = 0

    def coalition_values(masks: np.ndarray) -> np.ndarray:
        nonlocal evaluated
        evaluated += len(masks)
        sizes = masks.sum(axis=1, keepdims=True)
        return value(masks @ points / np.maximum(sizes, 1))

    state = np.random.get_state()  # shap draws from NumPy's global generator
    np.random.seed(int(rng.integers(2**32)))
    try:
        explainer = shap.KernelExplainer(coalition_values, np.zeros((1, n)))
        values = explainer.shap_values(np.ones((1, n)), nsamples=evaluations, l1_reg=False, silent=True)[0]
    finally:
        np.random.set_state(state)
    return ShapleyEstimate(np.asarray(values), np.full(n, np.nan), evaluated, "kernel")


# ---------------------------------------------------------------- stratified


@dataclass(frozen=True)
class _Sample:
    """m coalitions drawn for a range of sizes. What is stored of a large coalition is who is left out of it."""

    sizes: np.ndarray  # (m,)
    stored: np.ndarray  # (m,) how many users a row stores: min(size, n - size)
    users: np.ndarray  # (stored.sum(),) the rows' users, one row after the other
    means: np.ndarray  # (m, d) of the centred points
    values: np.ndarray  # (m,)
    expected: np.ndarray  # (n + 1,) how many coalitions of each size were expected


def _stratified(
    points: np.ndarray, value: Value, precision: float, max_evaluations: int, rng: np.random.Generator
) -> ShapleyEstimate:
    n, d = points.shape
    centre = points.mean(axis=0)
    centred = points - centre

    def centred_value(means: np.ndarray) -> np.ndarray:
        return value(means + centre)

    base, evaluations = _enumerated_sizes(
        points, centred, centred_value, value, with_pairs=_worth_pairs(n, max_evaluations)
    )
    first = 3 if _worth_pairs(n, max_evaluations) else 2
    sizes = np.arange(first, n - 1)
    if not len(sizes):
        return ShapleyEstimate(base, np.zeros(n), evaluations, "stratified")

    exponent = 1.0  # of the remainder's standard deviation, as a power of 1/t - 1/n
    halves: list[list[_Sample]] = [[], []]
    shares: list[np.ndarray] = [np.zeros(n)]  # estimates from independent samples, the first from the two halves
    variances: list[np.ndarray] = [np.zeros(n)]
    counts = [0]
    wanted = min(max(1500, 8 * n), max(max_evaluations - evaluations, 16))
    while True:
        if counts[0] < FITTED_COALITIONS:
            for half in halves:
                half.append(_draw(centred, centred_value, _neyman(sizes, n, exponent) * (wanted / 2), rng))
            pooled = [_pool(half) for half in halves]
            fits = [_fit(sample, exponent, n) for sample in pooled]
            remainders = [s.values - _predict(fit, s) for s, fit in zip(pooled, fits[::-1], strict=True)]
            parts = [_remainder_part(s, r, n) for s, r in zip(pooled, remainders, strict=True)]
            evaluations += sum(len(half[-1].sizes) for half in halves)
            closed = base + sum(_closed_part(fit, centred, sizes) for fit in fits) / 2
            shares[0], variances[0] = (parts[0][0] + parts[1][0]) / 2, (parts[0][1] + parts[1][1]) / 4
            counts[0] = sum(len(sample.sizes) for sample in pooled)
            exponent = _fitted_exponent(pooled, remainders, n)
        else:  # the fit is good enough: new coalitions only sample its remainder and need not be kept
            sample = _draw(centred, centred_value, _neyman(sizes, n, exponent) * wanted, rng)
            remainder = sample.values - sum(_predict(fit, sample) for fit in fits) / 2
            share, variance = _remainder_part(sample, remainder, n)
            evaluations += len(sample.sizes)
            shares.append(share)
            variances.append(variance)
            counts.append(len(sample.sizes))
        weights = np.array(counts) / sum(counts)
        values = closed + weights @ np.array(shares)
        errors = np.sqrt(weights**2 @ np.array(variances))
        target = precision * values.std()
        left = max_evaluations - evaluations
        rounding = 1e-9 * np.abs(pooled[0].values).max(initial=0)  # all that is left where users do not differ
        if errors.max() <= max(target, rounding) or left < 16:
            return ShapleyEstimate(values, errors, evaluations, "stratified")
        # 5 % more than the rate 1/sqrt(m) asks for: a stop at the edge would come out above it half of the time.
        short = sum(counts) * (1.05 * (errors.max() / target) ** 2 - 1) if target > 0 else np.inf
        room = max(FITTED_COALITIONS - counts[0], 0) or CHUNK_NUMBERS // (8 * d)
        # A small sample fits the control variate badly and asks for too much: grow step by step.
        wanted = int(min(max(short, 0.1 * sum(counts)), 4 * sum(counts), room, left))


def _worth_pairs(n: int, max_evaluations: int) -> bool:
    return n * (n - 1) // 2 <= max_evaluations // 2


def _enumerated_sizes(
    points: np.ndarray, centred: np.ndarray, centred_value: Value, value: Value, *, with_pairs: bool
) -> tuple[np.ndarray, int]:
    """(v(N) - v(empty)) / n plus the D_t / n of the sizes 1, n - 1 and, where wanted, 2; and what it cost."""
    n, d = points.shape
    ends = value(np.stack([np.zeros(d), points.mean(axis=0)]))
    phi = np.full(n, (ends[1] - ends[0]) / n)
    if n == 1:
        return phi, 2
    alone = centred_value(centred)
    phi += (alone - alone.mean()) / (n - 1)  # A_1(i) - B_1(i) = (v({i}) - mean) n / (n - 1)
    evaluations = 2 + n
    if n > 2:
        absent = centred_value(-centred / (n - 1))
        phi += (absent.mean() - absent) / (n - 1)
        evaluations += n
    if n > 3 and with_pairs:
        row_sums = np.zeros(n)
        step = max(1, CHUNK_NUMBERS // (n * d))
        for start in range(0, n, step):
            i, j = np.nonzero(np.arange(start, min(start + step, n))[:, None] < np.arange(n))
            i += start
            pair = centred_value((centred[i] + centred[j]) / 2)
            row_sums += np.bincount(i, pair, n) + np.bincount(j, pair, n)
        held = row_sums / (n - 1)
        left_out = (row_sums.sum() / 2 - row_sums) / ((n - 1) * (n - 2) / 2)
        phi += (held - left_out) / n
        evaluations += n * (n - 1) // 2
    return phi, evaluations


def _neyman(sizes: np.ndarray, n: int, exponent: float) -> np.ndarray:
    """Each size's share of the sample, in proportion to the remainder's deviation / sqrt(p (1 - p)), p = t / n."""
    share = (1 / sizes - 1 / n) ** exponent / np.sqrt(sizes / n * (1 - sizes / n))
    weights = np.zeros(n + 1)
    weights[sizes] = share / share.sum()
    return weights


def _draw(centred: np.ndarray, centred_value: Value, expected: np.ndarray, rng: np.random.Generator) -> _Sample:
    """Coalitions in number `expected` (n + 1,) a size, on average; evenly spread over the sizes (systematic sampling).

    Coalitions of one size are consecutive blocks of random permutations, each a uniform draw.
    """
    n, _ = centred.shape
    ends = np.floor(np.cumsum(expected) + rng.random()).astype(int)
    counts = np.diff(ends, prepend=0)
    counts[0] = 0
    users, sizes = [], np.repeat(np.arange(n + 1), counts)
    for size in np.flatnonzero(counts):
        stored = min(size, n - size)
        per_permutation = n // stored
        rows = -(-counts[size] // per_permutation)
        orders = rng.permuted(np.broadcast_to(np.arange(n), (rows, n)), axis=1)
        users.append(orders[:, : per_permutation * stored].reshape(-1)[: counts[size] * stored])
    stored = np.minimum(sizes, n - sizes)
    users_flat = np.concatenate(users) if users else np.zeros(0, dtype=int)
    sums = _members(stored, users_flat, n) @ centred
    sign = np.where(sizes <= n - sizes, 1.0, -1.0)  # the centred points sum to 0: those left out sum to minus the rest
    means = sums * (sign / sizes)[:, None]
    return _Sample(sizes, stored, users_flat, means, centred_value(means), expected)


def _members(stored: np.ndarray, users: np.ndarray, n: int) -> scipy.sparse.csr_array:
    """(m, n) sparse: 1 where a row stores a user."""
    indptr = np.concatenate([[0], np.cumsum(stored)])
    return scipy.sparse.csr_array((np.ones(len(users)), users, indptr), shape=(len(stored), n))


def _pool(samples: list[_Sample]) -> _Sample:
    """Several draws as one, whose expected counts add up (the balance heuristic of multiple importance sampling)."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(sample, name) for sample in samples])

    expected = np.sum([sample.expected for sample in samples], axis=0)
    return _Sample(joined("sizes"), joined("stored"), joined("users"), joined("means"), joined("values"), expected)


@dataclass(frozen=True)
class _Quadratic:
    """g_t(z) = z.(l0 + l1/t) + z^2.(q0 + q1/t) + (z.b) z.(c0 + c1/t), plus a part that depends on t alone."""

    direction: np.ndarray  # b (d,)
    coefficients: np.ndarray  # (6, d): l0, q0, c0, l1, q1, c1; zero where the sample was too small to fit them
    constant: np.ndarray  # (2,): of 1 and 1/t


def _features(means: np.ndarray, sizes: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """(m, 2 + 6 d), in the order of _Quadratic's fields."""
    inverse = 1 / sizes[:, None]
    blocks = np.hstack([means, means**2, means * (means @ direction)[:, None]])
    return np.hstack([np.ones_like(inverse), inverse, blocks, blocks * inverse])


def _fit(sample: _Sample, exponent: float, n: int) -> _Quadratic:
    """Least squares, each coalition weighed by the inverse variance of its remainder."""
    d = sample.means.shape[1]
    weight = (1 / sample.sizes - 1 / n) ** -exponent
    usable = [columns for columns in (2, 2 + d, 2 + 3 * d, 2 + 6 * d) if columns * 4 <= len(weight)]
    coefficients = np.zeros(2 + 6 * d)
    direction = np.zeros(d)
    for columns in usable[1:2] + usable[2:][-1:]:  # the linear fit first: its slope is the quadratic's direction
        design = _features(sample.means, sample.sizes, direction)[:, :columns] * weight[:, None]
        gram = design.T @ design
        gram[np.diag_indices(columns)] *= 1 + 1e-9
        gram[np.diag_indices(columns)] += 1e-12 * np.trace(gram) / columns
        coefficients[:columns] = np.linalg.solve(gram, design.T @ (sample.values * weight))
        if columns == 2 + d:
            direction = coefficients[2 : 2 + d] / max(np.linalg.norm(coefficients[2 : 2 + d]), 1e-300)
    return _Quadratic(direction, coefficients[2:].reshape(6, d), coefficients[:2])


def _predict(fit: _Quadratic, sample: _Sample) -> np.ndarray:
    coefficients = np.concatenate([fit.constant, fit.coefficients.ravel()])
    return _features(sample.means, sample.sizes, fit.direction) @ coefficients


def _closed_part(fit: _Quadratic, centred: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(1 / n) * sum over `sizes` of the control variate's D_t, (n,).

    For sums S over t of n centred points: E[S | i in] - E[S | i out] = y_i n / (n - 1), and, with h_i = y_i' H y_i,
    E[S' H S | i in] - E[S' H S | i out] = (h_i - mean h) (1 + (3 - 2 t) / (n - 1) - 4 (t - 1) / ((n - 1) (n - 2))).
    """
    n = len(centred)
    blocks = np.stack([centred, centred**2, centred * (centred @ fit.direction)[:, None]])  # (3, n, d)
    by_power = np.einsum("bnd,pbd->pbn", blocks, fit.coefficients.reshape(2, 3, -1))
    linear_factor = n / (n - 1) / sizes
    square_factor = (1 + (3 - 2 * sizes) / (n - 1) - 4 * (sizes - 1) / ((n - 1) * (n - 2))) / sizes**2
    total = np.zeros(n)
    for power in range(2):
        linear, *squares = by_power[power]
        square = sum(squares)
        total += (linear_factor / sizes**power).sum() * linear
        total += (square_factor / sizes**power).sum() * (square - square.mean())
    return total / n


def _remainder_part(sample: _Sample, remainder: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The sampled remainders' share of every Shapley value and its variance, each (n,)."""
    p = sample.sizes / n
    scale = remainder / (n * sample.expected[sample.sizes] * p * (1 - p))
    left_out = sample.stored != sample.sizes
    members = _members(sample.stored, sample.users, n).T

    def over_holders(numbers: np.ndarray) -> np.ndarray:
        """For each user, the sum of `numbers` (m,) over the coalitions that hold the user."""
        return members @ np.where(left_out, -numbers, numbers) + numbers[left_out].sum()

    share = over_holders(scale) - (scale * p).sum()
    # (1[i in T] - p)^2 = p^2 + 1[i in T] (1 - 2 p)
    variance = over_holders(scale**2 * (1 - 2 * p)) + (scale**2 * p**2).sum()
    return share, np.maximum(variance, 0)


def _fitted_exponent(samples: list[_Sample], remainders: list[np.ndarray], n: int) -> float:
    """The slope of log |remainder| on log(1/t - 1/n), kept within what a smooth metric can show."""
    x = np.log(1 / np.concatenate([sample.sizes for sample in samples]) - 1 / n)
    y = np.log(np.abs(np.concatenate(remainders)) + 1e-300)
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / max(x @ x, 1e-300), 0.5, 2.0))
