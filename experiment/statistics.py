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
