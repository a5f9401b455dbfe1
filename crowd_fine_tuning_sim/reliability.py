"""Whether people's pay can be told apart, and how many samples, texts or seeds that takes (classical test theory).

The reliability of a set of estimates is the share of their variance between people that is not their errors'. That of
k times as much material is k r / (1 + (k - 1) r) (Spearman and Brown, 1910). Here it is computed from jackknife
variances, and observed as the correlation between the Shapley values of random halves: the formula is checked on the
data. Errors are counted as they tell people apart: what a coalition's error adds to everybody's value tells nobody
apart, and is not in the variance between people either.
"""

from collections.abc import Callable, Sequence

import numpy as np

from crowd_fine_tuning_sim.retraining import all_coalitions, shapley_weights, static_game
from user_grouping_evaluation_sim.metrics import Metric

SPLITS = 50
ENOUGH = 0.9
ROUNDING = 1e-12


def spearman_brown(reliability: float, times: float) -> float:
    """Of so many times the material."""
    return times * reliability / (1 + (times - 1) * reliability)


def needed(at: float, reliability: float) -> float:
    """How much material gives ENOUGH, where `at` of it gives `reliability`; NaN where that is not above 0."""
    if not reliability > 0:
        return np.nan
    return at * ENOUGH / (1 - ENOUGH) * (1 - reliability) / reliability


def varies(values: np.ndarray) -> np.ndarray:
    """Whether values differ along the last axis by more than rounding."""
    return np.ptp(values, axis=-1) > ROUNDING * (np.abs(values).max(axis=-1) + 1e-3)


def share_not_error(values: np.ndarray, error: float) -> float:
    """Reliability of the people's values (n,), at least 0. error: the errors' variance between people."""
    return float(max(0.0, 1 - error / values.var(ddof=1))) if varies(values) else 0.0


def exact_reliability(values: np.ndarray, variances: np.ndarray) -> float:
    """Of the Shapley values from the values of all_coalitions, with these variances of their own: (2^n,) each."""
    n = len(values).bit_length() - 1
    weights = shapley_weights(all_coalitions(n))
    error = ((weights - weights.mean(axis=0)) ** 2 @ variances).sum() / (n - 1)
    return share_not_error(weights @ values, float(error))


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, along the last axis; NaN where one does not vary."""
    differ = varies(a) & varies(b)
    a, b = a - a.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), scale, out=np.full(scale.shape, np.nan), where=differ)


def mean_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


# ---------------------------------------------------------------- samples of the models


def split_samples(vectors: np.ndarray, centroid: np.ndarray, metric: Metric, rng: np.random.Generator) -> float:
    """Mean correlation between the Shapley values of random halves of every model's sample.

    vectors: (2^n, samples, 28), of all_coalitions; an odd sample leaves one out of both halves.
    """
    count, samples, _ = vectors.shape
    half, weights = samples // 2, shapley_weights(all_coalitions(count.bit_length() - 1))
    order = np.tile(np.arange(samples), (count, 1))
    found = np.empty(SPLITS)
    for split in range(SPLITS):
        shuffled = np.take_along_axis(vectors, rng.permuted(order, axis=1)[..., None], axis=1).astype(np.float64)
        halves = [shuffled[:, :half], shuffled[:, half : 2 * half]]
        a, b = (weights @ np.asarray(metric(part.mean(axis=1), centroid)) for part in halves)
        found[split] = correlation(a, b)
    return mean_known(found)


# ---------------------------------------------------------------- texts that people hold


def static_shapley(means: np.ndarray, base: np.ndarray, centroid: np.ndarray, metric: Metric) -> np.ndarray:
    """(k, n): exact Shapley values of the static games of several crowds' means (k, n, 28)."""
    coalitions = all_coalitions(means.shape[1])
    weights = shapley_weights(coalitions)
    return np.array([weights @ static_game(own, base, centroid, metric)(coalitions) for own in means])


def text_reliability(texts: Sequence[np.ndarray], values_of_means: Callable[[np.ndarray], np.ndarray]) -> float:
    """Of the values (n,) by the choice of each person's texts. texts: each person's vectors (texts, 28).

    values_of_means: means (k, n, 28) -> values (k, n). The errors' variance is the jackknife's, person by person.
    """
    means = np.array([own.mean(axis=0) for own in texts])
    error = 0.0
    for person, own in enumerate(texts):
        without = np.repeat(means[None], len(own), axis=0)
        without[:, person] = (own.sum(axis=0) - own) / (len(own) - 1)
        values = values_of_means(without)
        apart = values - values.mean(axis=1, keepdims=True)
        error += (len(own) - 1) * apart.var(axis=0).sum() / (len(texts) - 1)
    return share_not_error(values_of_means(means[None])[0], float(error))


def split_texts(
    texts: Sequence[np.ndarray], values_of_means: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator
) -> float:
    """Mean correlation between the values of random halves of every person's texts."""
    halves = np.empty((2, SPLITS, len(texts), texts[0].shape[1]))
    for split in range(SPLITS):
        for person, own in enumerate(texts):
            half, order = len(own) // 2, rng.permutation(len(own))
            halves[0, split, person] = own[order[:half]].mean(axis=0)
            halves[1, split, person] = own[order[half : 2 * half]].mean(axis=0)
    return mean_known(correlation(values_of_means(halves[0]), values_of_means(halves[1])))
