"""The retraining game: what a coalition is worth is what the model tuned on all of its members' texts writes.

v(S) = metric(mean vector of a sample of the model tuned on the texts of S, centroid); v(empty) is the base model's. All
coalitions of one repetition share the seeds of tuning and of sampling, so that they differ by their texts alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crowd_fine_tuning_sim.asking import Ask
from point_in_space_sim.engine.recipes import Model, Request, Texts, Tuned, name_of
from user_grouping_evaluation_sim.metrics import Metric
from user_grouping_evaluation_sim.shapley import Game, ShapleyEstimate, game_shapley_values


@dataclass(frozen=True)
class Retrained:
    """coalitions: (m, n) bool. vectors: (m, texts, 28) of what their models wrote."""

    coalitions: np.ndarray
    vectors: np.ndarray


def all_coalitions(n: int) -> np.ndarray:
    """(2^n, n) bool; row k holds player i where bit i of k is set."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1


def coalition_model(texts: Sequence[Texts], coalition: np.ndarray, seed: int) -> Model:
    """The model tuned on all texts of the coalition's members (n,) bool; None, the base model, of nobody."""
    pool = tuple(text for own in texts for text in own)
    members = tuple(text for own, inside in zip(texts, coalition, strict=True) if inside for text in own)
    return Tuned(members, None, seed, pool) if members else None


def retrain(
    texts: Sequence[Texts], coalitions: np.ndarray, tuning_seed: int, samples: tuple[int, ...], ask: Ask
) -> Retrained:
    """The samples, one after another, of each of the coalitions' (m, n) models. The models' weights are not stored."""
    models = [coalition_model(texts, coalition, tuning_seed) for coalition in coalitions]
    drawn = ask([Request(model, samples, discard=True) for model in models])
    vectors = [np.concatenate([drawn[name_of(model), sample].vectors for sample in samples]) for model in models]
    return Retrained(coalitions, np.array(vectors))


def audited_coalitions(n: int, leave_one_out: bool) -> np.ndarray:
    """(n + 2 or 2 n + 2, n) bool: those whose values pay is levelled by, nobody, each alone, everybody; and perhaps
    everybody but each."""
    alone = np.eye(n, dtype=bool)
    audited = [np.zeros((1, n), dtype=bool), alone, np.ones((1, n), dtype=bool)]
    return np.concatenate([*audited, ~alone] if leave_one_out else audited)


def values_of(vectors: np.ndarray, centroid: np.ndarray, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """Value of each sample's mean vector, and the variance of that value by the choice of texts: (m,) each.

    vectors: (m, samples, 28). The variance is the jackknife's (Efron and Stein, 1981): it holds for any metric.
    """
    vectors = vectors.astype(np.float64)
    count = vectors.shape[1]
    means = vectors.mean(axis=1)
    without = (count * means[:, None] - vectors) / (count - 1)
    left = np.asarray(metric(without, centroid))
    variance = (count - 1) / count * ((left - left.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    return np.asarray(metric(means, centroid), dtype=np.float64), variance


def shapley_weights(coalitions: np.ndarray) -> np.ndarray:
    """(n, m), of the coalitions (m, n): the Shapley values are these weights times the values of all coalitions."""
    n = coalitions.shape[1]
    sizes = coalitions.sum(axis=1)
    weight = np.ones(n)  # |S|! (n - |S| - 1)! / n! of a coalition of |S| others
    for size in range(n):
        weight[size] = 1.0 / n / np.prod([(n - 1 - k) / (k + 1) for k in range(size)])
    joined = weight[np.maximum(sizes - 1, 0)]
    left = weight[np.minimum(sizes, n - 1)]
    return np.where(coalitions, joined[:, None], -left[:, None]).T


def exact_shapley(values: np.ndarray, variances: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Shapley values (n,) from the values of all_coalitions(n) in their order, and their standard errors, which follow
    from the values' variances: of independent samples. values, variances: (2^n,)."""
    weights = shapley_weights(all_coalitions(n))
    return weights @ values, np.sqrt(weights**2 @ variances)


def static_game(means: np.ndarray, base: np.ndarray, centroid: np.ndarray, metric: Metric) -> Game:
    """The game without models: v(S) = metric(mean of the members' mean vectors (n, 28), centroid), as in experiment 2,
    but that nobody's value is that of the base model's mean vector (28,)."""

    def game(coalitions: np.ndarray) -> np.ndarray:
        sizes = coalitions.sum(axis=1, keepdims=True)
        vectors = np.where(sizes > 0, coalitions.astype(float) @ means / np.maximum(sizes, 1), base)
        return np.asarray(metric(vectors, centroid), dtype=np.float64)

    return game


def sampled_shapley(
    game: Game,
    static: Game,
    n: int,
    retrainings: int,
    seed: int | np.random.SeedSequence,
    features: np.ndarray | None = None,
) -> ShapleyEstimate:
    """Shapley values of an expensive game from so many of its coalitions, with the static game as control variate.

    The values of the difference of both games are sampled, those of the static game are as good as exact. features:
    the people's vectors (n, d) that the static game is of.
    """
    control = game_shapley_values(static, n, features=features, precision=1e-3, seed=0)

    def difference(coalitions: np.ndarray) -> np.ndarray:
        return game(coalitions) - static(coalitions)

    found = game_shapley_values(
        difference, n, method="stratified", precision=1e-9, max_evaluations=retrainings, seed=seed
    )
    return ShapleyEstimate(control.values + found.values, found.standard_errors, found.evaluations, "sampled")


def unsampled_noise(coalitions: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """What the values' own variances (m,) add to the variances of sampled Shapley values, (n,).

    coalitions: (m, n), those that were asked for, each once. Sizes that were asked for whole count as in the exact
    values. Of the others the sampling error holds the noise already: it is estimated from the spread of noisy values.
    """
    n = coalitions.shape[1]
    sizes = coalitions.sum(axis=1)
    counts = np.bincount(sizes, minlength=n + 1)
    whole = np.array([count == math.comb(n, size) for size, count in enumerate(counts)])
    return shapley_weights(coalitions) ** 2 @ np.where(whole[sizes], variances, 0.0)
