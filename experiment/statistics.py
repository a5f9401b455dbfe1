"""Means with 95 % intervals."""

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
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


NEAREST = 0.999  # to 1, that a correlation is taken for: of few users a perfect one is not infinitely far from others
LEVELS = (np.arange(50) + 0.5) / 50  # of equally likely values of a pivot


def correlation_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of correlations (units,), leaving out NaN, and a 95 % interval of the mean over all such units.

    Fisher's z of the units is taken for normal, and the mean correlation for the integral of tanh over that
    distribution (Hafdahl, 2009). Its mean and variance are known up to their pivots, so the interval is the middle of
    the integrals over all values of these (generalised inference; Weerahandi, 1993). Unlike Student's it is not
    symmetrical, as few units with r near 1 and one far below are not. The ends are NaN for fewer than two units.
    """
    known = values[np.isfinite(values)]
    count = len(known)
    mean = float(known.mean()) if count else np.nan
    if count < 2:
        return mean, np.nan, np.nan
    z = np.arctanh(np.clip(known, -NEAREST, NEAREST))
    deviation = z.std(ddof=1) * np.sqrt((count - 1) / chdtri(count - 1, LEVELS))[:, None]
    centre = z.mean() + deviation * ndtri(LEVELS) / np.sqrt(count)
    nodes, weights = hermegauss(21)
    integrals = np.tanh(centre[..., None] + deviation[..., None] * nodes) @ (weights / weights.sum())
    low, high = np.quantile(integrals, [0.025, 0.975])
    return mean, float(low), float(high)


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
