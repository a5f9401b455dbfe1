"""How near a sample of comments comes to the neighbourhood. MEASURES is the registry: tables, figures, report follow.

A measure gives each comment a number whose mean over the sample is the measure's value, and whose spread is that of the
comment's influence on it (Hampel, 1974). So all measures have the same intervals, and the same paired differences.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist


@dataclass(frozen=True)
class Measure:
    """values: vectors (n, 28), texts (n), the neighbourhood's vectors (k, 28) -> (n,). better: -1 where less is.
    column: its name in generations.csv."""

    values: Callable[[np.ndarray, Sequence[str], np.ndarray], np.ndarray]
    short: str
    better: int
    column: str


def distance(vectors: np.ndarray, texts: Sequence[str], near: np.ndarray) -> np.ndarray:
    """Each comment's L2 distance to the centroid. A sample that writes one comment over and over may have the least."""
    return np.linalg.norm(vectors - near.mean(axis=0), axis=1)


def energy(vectors: np.ndarray, texts: Sequence[str], near: np.ndarray) -> np.ndarray:
    """Energy distance between the sample and the neighbourhood, 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Székely and Rizzo,
    2013), unbiased (pairs of different comments only): 0 where both have one distribution, so it may fall below."""
    n, k = len(vectors), len(near)
    across = cdist(vectors, near).mean(axis=1)
    within = cdist(vectors, vectors).sum(axis=1) / max(n - 1, 1)
    among = cdist(near, near).sum() / (k * max(k - 1, 1))
    value = 2 * across.mean() - within.mean() - among
    return value + 2 * (across - across.mean()) - 2 * (within - within.mean())


def centre(vectors: np.ndarray, texts: Sequence[str], near: np.ndarray) -> np.ndarray:
    """L2 distance of the sample's mean vector to the centroid: how far off it aims, however much it spreads."""
    mean = vectors.mean(axis=0)
    off = mean - near.mean(axis=0)
    value = np.linalg.norm(off)
    return value + (vectors - mean) @ (off / value if value > 0 else off)


def distinct(vectors: np.ndarray, texts: Sequence[str], near: np.ndarray) -> np.ndarray:
    """Share of distinct texts: a text that comes m times counts 1 / m each time."""
    count = Counter(texts)
    return np.array([1 / count[text] for text in texts])


MEASURES = {
    "distance": Measure(distance, "mean distance", -1, "mean_distance"),
    "energy": Measure(energy, "energy distance", -1, "energy_distance"),
    "centre": Measure(centre, "centre distance", -1, "centre_distance"),
    "distinct": Measure(distinct, "distinct texts", 1, "distinct"),
}
