"""How good a model is for the expert: metric(a, b) compares vectors along the last axis; higher is better.

To add a metric, write a function of the same form and name it in METRICS, or pass it as `module:function`.
"""

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]


def l2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Negative Euclidean distance. a, b: (..., d), broadcast against each other. Returns (...)."""
    difference = a - b
    return -np.sqrt(np.einsum("...i,...i->...", difference, difference))


def l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Negative Manhattan distance. a, b: (..., d), broadcast against each other. Returns (...)."""
    return -np.abs(a - b).sum(axis=-1)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot product. a, b: (..., d), broadcast against each other. Returns (...)."""
    return np.einsum("...i,...i->...", a, b)


METRICS: dict[str, Metric] = {"l2": l2, "l1": l1, "dot": dot}
