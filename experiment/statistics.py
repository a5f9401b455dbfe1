"""Means with 95 % intervals."""

import numpy as np
from scipy.special import chdtri, ndtri, stdtrit


def mean_interval(values: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper end of Student's 95 % interval along `axis`, leaving out NaN.

    All three have the shape of `values` without `axis`; the ends are NaN where fewer than two values are left.
    """
    values = np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1)
    present = np.isfinite(values)
    count = present.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(present, values, 0).sum(axis=-1) / count
        squares = np.where(present, values - mean[..., None], 0) ** 2
        error = np.sqrt(squares.sum(axis=-1) / (count - 1) / count)
        half = stdtrit(count - 1.0, 0.975) * error
    return mean, mean - half, mean + half


ALMOST_ONE = 0.999  # a correlation of 1 would have an infinite z
GOLDEN = (5**0.5 - 1) / 2
PAIRS = np.arange(1000)[:, None]  # of equally likely values of the two pivots, spread evenly over their square


def correlation_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of units' correlations (units,), leaving out NaN, and a 95 % interval of the mean over all such units.

    The units' Fisher z are taken for normal; then the mean correlation is the integral of tanh over that normal
    distribution (Hafdahl, 2009, 10.1348/000711008X281633). Given the data, its deviation is distributed as
    s sqrt((n - 1) / chi2) and its mean as the mean z + deviation normal / sqrt(n): the integral is computed for a
    thousand equally likely pairs, and the interval is their middle 95 % (generalised confidence intervals; Weerahandi,
    1993), with the plain mean, which is another estimate, in any case. Student's is symmetrical, which the mean of few
    correlations near 1 is not. The ends are NaN for fewer than two units.
    """
    known = values[np.isfinite(values)]
    count = len(known)
    mean = float(known.mean()) if count else np.nan
    if count < 2:
        return mean, np.nan, np.nan
    z = np.arctanh(np.clip(known, -ALMOST_ONE, ALMOST_ONE))
    deviation = z.std(ddof=1) * np.sqrt((count - 1) / chdtri(count - 1, (PAIRS + 0.5) / len(PAIRS)))
    centre = z.mean() + deviation * ndtri((PAIRS * GOLDEN + 0.5) % 1) / np.sqrt(count)
    nodes = np.linspace(-5, 5, 101)
    weights = np.exp(-(nodes**2) / 2)
    integrals = np.tanh(centre + deviation * nodes) @ (weights / weights.sum())
    low, high = map(float, np.quantile(integrals, [0.025, 0.975]))
    return mean, min(low, mean), max(high, mean)


def pooled_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of values (units, repeats) over the repeats, with Student's 95 % intervals: each (units,).

    The variance between repeats is pooled over the units, with units x (repeats - 1) degrees of freedom: two or three
    repeats of one unit say little of it. Raises ValueError for fewer than two repeats.
    """
    units, repeats = values.shape
    if repeats < 2:
        raise ValueError("one repeat has no variance")
    freedom = units * (repeats - 1)
    mean = values.mean(axis=1)
    variance = ((values - mean[:, None]) ** 2).sum() / freedom
    half = stdtrit(float(freedom), 0.975) * np.sqrt(variance / repeats)
    return mean, mean - half, mean + half
