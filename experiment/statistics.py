"""Means with 95 % intervals."""

import numpy as np
from scipy.special import stdtrit


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
