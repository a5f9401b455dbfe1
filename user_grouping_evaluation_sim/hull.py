"""The geometric limit: no mixture of users comes closer to the expert than their convex hull."""

import numpy as np
from scipy.optimize import nnls

USERS_ADDED = 64  # to the working set at a time


def hull_distance(users: np.ndarray, expert: np.ndarray) -> float:
    """Euclidean distance from the expert (d,) to the convex hull of users (n, d).

    With y_i = x_i - e, non-negative least squares min |Y' u|^2 + (1' u - 1)^2 has its solution along the weights w of
    the nearest mixture: for u = s w the best s leaves |Y' w|^2 / (1 + |Y' w|^2), which grows with |Y' w|. It is solved
    on a working set that grows by the users who would come closer, so that n may be large.
    """
    offsets = users - expert
    squares = np.einsum("ij,ij->i", offsets, offsets)
    working = np.argsort(squares, kind="stable")[: 2 * USERS_ADDED]
    while True:
        system = np.vstack([offsets[working].T, np.ones(len(working))])
        weights, _ = nnls(system, np.r_[np.zeros(offsets.shape[1]), 1.0])
        nearest = offsets[working].T @ (weights / weights.sum())
        gap = offsets @ nearest - nearest @ nearest  # below 0: moving towards this user comes closer
        gap[working] = 0
        closer = np.argsort(gap, kind="stable")[:USERS_ADDED]
        closer = closer[gap[closer] < -1e-9 * max(1.0, squares.max())]
        if not len(closer):
            return float(np.linalg.norm(nearest))
        working = np.concatenate([working[weights > 0], closer])
