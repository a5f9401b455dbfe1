"""The estimator behind method "stratified" of shapley.py.

With A_t(i) and B_t(i) the mean value of the coalitions of size t that hold player i and that do not, D_t = A_t - B_t,

    phi_i = (v(N) - v(empty)) / n + (1 / n) * sum of D_t(i) over t = 1 .. n - 1,

so that one evaluated coalition informs the estimate of every player (the idea of SVARM: Kolpaczki et al., AAAI 2024).
Coalitions are drawn without replacement; a size of few is drawn whole. The value is split into a control variate whose
D_t is closed form (shapley_models.py) and a remainder r: m_t coalitions of size t add

    sum of r(T) * (1[i in T] - t/n) / (m_t * t/n * (1 - t/n))   to D_t(i).

The control variate is fitted on the other folds of the sample (cross-fitting), so that the estimate stays unbiased
whatever the fit; sizes are drawn in proportion to the remainder's standard deviation (Neyman allocation).
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import scipy.sparse

from user_grouping_evaluation_sim.shapley_models import Model, cross_fitted, standardised

Game = Callable[[np.ndarray], np.ndarray]

RARE = 10_000  # the population over the drawn ones' square, from which on a coalition hardly comes twice
LISTED = 50_000  # coalitions of a size, of which the missing ones are listed
FITTED_COALITIONS = 20_000  # the control variate is fitted to about this many at most
LARGE_NUMBERS = 12_000_000  # how many numbers a round's coalitions may hold after that
COUNTLESS = 10**300  # coalitions of a size are not counted further
MOST_PAIRS = 3_000  # drawn whole from the start
EXPLORED = 0.2  # of the sample is spread evenly over the sizes, however small the remainder seems to be there
LEAST_TO_CENTRE = 8  # of so many coalitions of a size the remainder's mean is subtracted
EXACT_FIT = 1e-6  # of the values: smaller remainders are the fit's rounding
UNMET = 2  # coalitions, see _estimate
FOLDS = 4
TWO_FOLDS = 1_000  # coalitions that make two folds enough, where there are features


def stratified(
    game: Game,
    n: int,
    features: np.ndarray | None,
    precision: float,
    max_evaluations: int,
    rounding: Callable[[], float],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Values and standard errors, each (n,).

    game: coalitions (m, n) -> values less v(empty). max_evaluations: of sizes 1 .. n; the empty coalition's is known.
    rounding: by how much a value's last digits may be off.
    """
    total = float(game(np.ones((1, n), dtype=bool))[0])
    if n == 1:
        return np.array([total]), np.zeros(1)
    standard = None if features is None else standardised(features)
    population = np.array([0, *(float(min(math.comb(n, t), COUNTLESS)) for t in range(1, n)), 0])
    hashes = rng.integers(-(2**62), 2**62, n)
    left = max_evaluations - 1
    sizes = np.arange(1, n)
    deviation = np.zeros(n + 1)
    deviation[1:n] = (1 / sizes - 1 / n) ** float(standard is not None)
    expected = np.zeros(n + 1)  # how many coalitions of each size, so far
    if 6 * n <= left:
        expected[[1, n - 1]] = n
    if standard is not None and population[2] <= min(left / 3, MOST_PAIRS):
        expected[2] = population[2]
    wanted = min(max(1500, 8 * n), left - int(expected.sum()))
    members, values, folds = np.zeros((0, n), dtype=bool), np.zeros(0), np.zeros(0, dtype=int)
    seen: list[np.ndarray] = [np.zeros(0, dtype=np.int64) for _ in range(n + 1)]
    drawn = np.zeros(n + 1, dtype=int)
    scale, largest = abs(total), 0.0  # of all values; of the remainders
    while True:
        frozen = len(values) >= FITTED_COALITIONS
        expected = _allocation(expected, population, deviation, wanted, left, frozen=frozen)
        counts = _counts(expected, drawn, left, rng)
        # Of sizes so large that no coalition comes twice many are drawn at once.
        at_once = frozen & (population >= RARE * (drawn + counts) ** 2.0)
        by_size = [
            _fresh(n, size, int(counts[size]), population[size], seen, hashes, rng)
            for size in np.flatnonzero(np.where(at_once, 0, counts)).tolist()
        ]
        new = np.concatenate([members[:0], *by_size, of_many_sizes(np.where(at_once, counts, 0), rng)])
        worth = game(new)
        scale = max(scale, float(np.abs(worth).max(initial=0)))
        left -= len(new)
        drawn = drawn + counts
        if not frozen:
            members, values = np.concatenate([members, new]), np.concatenate([values, worth])
            of_size = members.sum(axis=1)
            sampled = drawn[of_size] < population[of_size]
            count = min(2 if standard is not None and sampled.sum() >= TWO_FOLDS else FOLDS, max(int(sampled.sum()), 1))
            folds = rng.permutation(len(values)) % count
            with np.errstate(divide="ignore"):
                weights = 1 / deviation[of_size[sampled]]
            fits, predicted = cross_fitted(
                members[sampled],
                of_size[sampled],
                values[sampled],
                folds[sampled],
                weights,
                standard,
                int(rng.integers(2**31)),
            )
            remainder = values.copy()
            remainder[sampled] -= predicted
            moments, plain = _moments(members, of_size, remainder), _moments(members, of_size, values)
            by_fold = np.zeros((count, n + 1))
            np.add.at(by_fold, (folds[sampled], of_size[sampled]), 1)
            base, deviation = _deviation(of_size[sampled], remainder[sampled], n, smooth=standard is not None)
            largest = float((np.abs(remainder[sampled]) / base[of_size[sampled]]).max(initial=0))
        else:  # the fit is good enough: new coalitions only sample its remainder and need not be kept
            new_sizes = new.sum(axis=1)
            new_remainder = worth - sum(fit.predict(new, new_sizes) for fit in fits) / len(fits)
            moments = moments + _moments(new, new_sizes, new_remainder)
            countable = population[new_sizes] <= LARGE_NUMBERS // n
            plain = plain + _moments(new[countable], new_sizes[countable], worth[countable])
            largest = max(largest, float((np.abs(new_remainder) / base[new_sizes]).max(initial=0)))
            by_fold = by_fold + np.bincount(new_sizes, minlength=n + 1) / len(fits)
            known = (drawn == population)[:, None]
            moments = np.where(known, plain, moments)  # where all are known, nothing is left to estimate
        closed = _closed_part(fits, by_fold, expected, population, drawn)
        tolerance = 1e-9 * scale + rounding()
        perfect = (largest * base).max() <= max(EXACT_FIT * scale, tolerance)  # a spike could be anything
        unmet = np.full(n + 1, scale) if perfect else largest * base
        estimates, errors = _estimate(moments, expected, population, closed, total, unmet)
        target = precision * estimates.std()
        no_spread = perfect and estimates.std() <= tolerance  # more of the same would tell no more
        if no_spread or errors.max() <= max(target, tolerance) or left < 1 or not len(new):
            certified = scale > 0 or (drawn == population).all()
            return estimates, errors if certified else np.full(n, np.nan)
        # 5 % more than the rate 1/sqrt(m) asks for: a stop at the edge would come out above it half of the time.
        sofar = drawn[drawn < population].sum()
        short = sofar * (1.05 * (errors.max() / target) ** 2 - 1) if target > 0 else np.inf
        room = max(FITTED_COALITIONS - len(values), 0) or LARGE_NUMBERS // n
        # A small sample fits the control variate badly and asks for too much: grow step by step.
        wanted = int(min(max(short, 0.1 * sofar, 16), 4 * sofar, room, left))


def _allocation(
    expected: np.ndarray, population: np.ndarray, deviation: np.ndarray, wanted: int, left: int, *, frozen: bool
) -> np.ndarray:
    """How many coalitions of each size there are to be: `wanted` more, in proportion to deviation / sqrt(p (1 - p))."""
    n = len(expected) - 1
    p = np.arange(n + 1) / n
    is_open = (expected < population) & (population > 0)
    if not is_open.any() or wanted < 1:
        return expected
    weight = np.where(is_open, deviation, 0) / np.sqrt(np.maximum(p * (1 - p), 0.1 / n))
    if weight.sum() > 0:
        weight = weight / weight.sum()
    explored = EXPLORED if weight.sum() > 0 else 1.0
    weight = (1 - explored) * weight + explored * is_open / is_open.sum()
    more = np.maximum(weight * (expected[is_open].sum() + wanted) - expected, 0) * is_open
    wished = np.where(is_open, expected + more * (wanted / more.sum()), expected)
    found = np.minimum(wished, population)
    if frozen:  # sizes of many coalitions are no longer drawn whole
        many = is_open & (population > LARGE_NUMBERS // n)
        found[many] = np.maximum(np.minimum(wished, population / 2), expected)[many]
        is_open &= ~many
    for size in np.flatnonzero(is_open & (wished >= population / 2)):
        found[size] = population[size]
        if found.sum() - expected.sum() > left:
            found[size] = min(wished[size], population[size])
    return found


def _counts(expected: np.ndarray, drawn: np.ndarray, left: int, rng: np.random.Generator) -> np.ndarray:
    """How many to draw now, whole numbers, at most `left`; what is less than one is spread evenly over the sizes."""
    whole = np.floor(expected + 1e-9)
    rest = np.maximum(expected - whole, 0)
    counts = whole + np.diff(np.floor(np.cumsum(rest) + rng.random()), prepend=0)
    counts = np.maximum(counts.astype(int) - drawn, 0)
    while counts.sum() > left:
        counts[counts.argmax()] -= min(counts.sum() - left, max(counts.max() // 2, 1))
    return counts


def _fresh(
    n: int,
    size: int,
    count: int,
    population: float,
    seen: list[np.ndarray],
    hashes: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """(count, n) coalitions of a size that are not among the seen, by their hashes; adds them to the seen.

    Those of one size are consecutive blocks of random permutations, each a uniform draw.
    """
    stored = min(size, n - size)  # of a large coalition: who is left out of it
    had = len(seen[size])
    found = np.zeros((0, n), dtype=bool)
    keys = seen[size]
    while len(found) < count:
        lacking = count - len(found)
        listed = population <= 4 * (count + had) and (population <= LISTED or population == count + had)
        if listed:
            users = np.array(list(itertools.combinations(range(n), stored)))
        else:
            per_permutation = n // stored
            orders = rng.permuted(np.broadcast_to(np.arange(n), (-(-lacking // per_permutation), n)), axis=1)
            users = orders[:, : per_permutation * stored].reshape(-1, stored)[:lacking]
        new_keys = hashes[users].sum(axis=1)
        if stored != size:
            new_keys = hashes.sum() - new_keys
        if listed or population < RARE * (count + had) ** 2:
            _, first = np.unique(new_keys, return_index=True)
            first = first[~np.isin(new_keys[first], keys)]
            first = rng.permutation(first)[:lacking]
            users, new_keys = users[first], new_keys[first]
        some = np.zeros((len(users), n), dtype=bool)
        some[np.arange(len(users))[:, None], users] = True
        if stored != size:
            some = ~some
        found, keys = np.concatenate([found, some]), np.concatenate([keys, new_keys])
    seen[size] = keys
    return found


def of_many_sizes(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(counts.sum(), n) coalitions, counts (n + 1,) of each size: blocks of random permutations, as in _fresh."""
    n = len(counts) - 1
    sizes = np.flatnonzero(counts)
    stored = np.minimum(sizes, n - sizes)
    per_permutation = n // np.maximum(stored, 1)
    rows = -(-counts[sizes] // per_permutation)
    small = np.int16 if n < 2**15 else np.int32
    places = rng.permuted(np.broadcast_to(np.arange(n, dtype=small), (rows.sum(), n)), axis=1)
    of_size = np.repeat(np.arange(len(sizes)), counts[sizes])
    number = np.arange(len(of_size)) - np.repeat(np.cumsum(counts[sizes]) - counts[sizes], counts[sizes])
    row = (np.cumsum(rows) - rows)[of_size] + number // per_permutation[of_size]
    first = (number % per_permutation[of_size] * stored[of_size]).astype(small)[:, None]
    inside = (places[row] >= first) & (places[row] < first + stored[of_size, None].astype(small))
    return inside ^ (stored != sizes)[of_size, None]


def _moments(members: np.ndarray, sizes: np.ndarray, remainder: np.ndarray) -> np.ndarray:
    """(n + 1, 3 + 3 n): for every size the sums of 1, r, r^2, and for every player of x, r x, r^2 x, x = 1[i in T]."""
    m, n = members.shape
    of_size = scipy.sparse.csr_array((np.ones(m), (sizes, np.arange(m))), shape=(n + 1, m))
    held = members.astype(float)
    parts = [of_size @ np.stack([np.ones(m), remainder, remainder**2], axis=1), of_size @ held]
    for _ in range(2):
        held *= remainder[:, None]
        parts.append(of_size @ held)
    return np.hstack(parts)


def _deviation(sizes: np.ndarray, remainder: np.ndarray, n: int, *, smooth: bool) -> tuple[np.ndarray, np.ndarray]:
    """The remainder's deviation by size, (n + 1,): a power of 1/t - 1/n, which comes first, times a smooth curve."""
    t = np.arange(1, n)
    slope = 0.0
    if smooth and len(sizes):
        x, y = np.log(1 / sizes - 1 / n), np.log(np.abs(remainder) + 1e-300)
        x, y = x - x.mean(), y - y.mean()
        slope = float(np.clip(x @ y / max(x @ x, 1e-300), 0.5, 2.0))
    base = np.zeros(n + 1)
    base[1:n] = (1 / t - 1 / n) ** slope
    count = np.bincount(sizes, minlength=n + 1)[1:n]
    squares = np.bincount(sizes, remainder**2, minlength=n + 1)[1:n] / base[1:n] ** 2
    near = np.exp(-np.abs(t[:, None] - t) / (1 + n / 20)) + 1e-6
    found = np.zeros(n + 1)
    found[1:n] = base[1:n] * np.sqrt(near @ squares / np.maximum(near @ count, 1e-300))
    return base, found


def _closed_part(
    fits: list[Model], by_fold: np.ndarray, expected: np.ndarray, population: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Sum over sizes of the control variates' D_t, (n,), each fold's in proportion to its coalitions of the size."""
    share = np.full(by_fold.shape, 1 / len(fits))
    counted = (expected >= 1) & (drawn > 0)
    np.divide(by_fold, drawn, out=share, where=counted)
    share[:, drawn >= population] = 0
    return sum(by_size @ fit.contrasts for by_size, fit in zip(share, fits, strict=True))


def _estimate(
    moments: np.ndarray,
    expected: np.ndarray,
    population: np.ndarray,
    closed: np.ndarray,
    total: float,
    unmet: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Values and standard errors, each (n,), from the sums of _moments.

    The errors count UNMET more coalitions, spread over the sizes that are sampled, with a remainder as large as
    `unmet` (n + 1,) there: that no spike was met in m coalitions does not say that there is none.
    """
    n = len(expected) - 1
    used = np.flatnonzero(moments[:, 0] > 0)
    sums = moments[used]
    m, r, rr = (sums[:, k : k + 1] for k in range(3))
    x, rx, rrx = (sums[:, 3 + k * n : 3 + (k + 1) * n] for k in range(3))
    p, everyone = used[:, None] / n, population[used][:, None]
    centred = m >= LEAST_TO_CENTRE
    mean = np.where(centred, r / m, 0)
    divisor = np.where(
        centred,
        (m - 1) * everyone / np.maximum(everyone - 1, 1),
        np.where(expected[used][:, None] >= 1, m, expected[used][:, None]),
    )
    factor = 1 / (n * divisor * p * (1 - p))
    share = (rx - mean * x - p * (r - mean * m)) * factor
    squares = rrx - 2 * mean * rx + mean**2 * x
    all_squares = rr - 2 * mean * r + mean**2 * m
    sampled = m < everyone
    variance = np.maximum(squares * (1 - 2 * p) + p**2 * all_squares, 0)
    variance += UNMET / max(sampled.sum(), 1) * unmet[used][:, None] ** 2 * p * (1 - p)
    return total / n + closed / n + share.sum(axis=0), np.sqrt((variance * factor**2 * sampled).sum(axis=0))
