"""Reliability: the formula against closed forms, and against data whose reliability is known."""

import numpy as np
import pandas as pd
import pytest

from crowd_fine_tuning_sim.reliability import (
    exact_reliability,
    needed,
    spearman_brown,
    split_samples,
    split_texts,
    static_shapley,
    text_reliability,
)
from crowd_fine_tuning_sim.results import seed_rows
from crowd_fine_tuning_sim.retraining import all_coalitions, values_of
from user_grouping_evaluation_sim.metrics import dot
from user_grouping_evaluation_sim.shapley import game_shapley_values

FIRST = np.eye(28)[0]


def test_the_number_that_is_needed_gives_the_reliability():
    assert spearman_brown(0.5, 2) == pytest.approx(2 / 3)
    assert spearman_brown(spearman_brown(0.3, 5), 1 / 5) == pytest.approx(0.3)
    assert spearman_brown(0.4, needed(12, 0.4) / 12) == pytest.approx(0.9)
    assert np.isnan(needed(12, 0.0)) and needed(12, 1.0) == 0


def test_halves_of_samples_agree_as_predicted():
    """People worth a fixed amount each, and a judge whose noise is known: the errors' variance between people follows
    from values of noise alone."""
    n, samples, deviation = 4, 20, 1.0
    coalitions, numbers = all_coalitions(n), 1 << np.arange(n)
    worth = np.array([0.5, 0.1, -0.2, 0.3])
    rng = np.random.default_rng(0)
    noise = []
    for _ in range(400):
        table = rng.normal(size=2**n) * deviation
        values = game_shapley_values(lambda c, table=table: table[c @ numbers], n, method="exact").values
        noise.append(values.var(ddof=1))
    error = np.mean(noise) / (samples // 2)
    truth = worth.var(ddof=1) / (worth.var(ddof=1) + error)
    predicted, observed = [], []
    for _ in range(60):
        vectors = np.zeros((2**n, samples, 28))
        vectors[..., 0] = (coalitions @ worth)[:, None] + rng.normal(size=(2**n, samples)) * deviation
        predicted.append(spearman_brown(exact_reliability(*values_of(vectors, FIRST, dot)), 1 / 2))
        observed.append(split_samples(vectors, FIRST, dot, rng))
    assert 0.3 < truth < 0.8
    assert np.mean(predicted) == pytest.approx(truth, abs=0.05)
    assert np.mean(observed) == pytest.approx(truth, abs=0.1)  # Pearson's of four people, of a few data sets
    assert np.mean(observed) == pytest.approx(np.mean(predicted), abs=0.1)


def test_reliability_over_texts_is_that_of_the_persons_means():
    """In the dot game a value is a constant and a multiple of a person's mean: the analysis of variance gives it."""
    rng = np.random.default_rng(1)
    texts = [rng.normal(loc=person / 8, size=(9, 28)) for person in range(6)]

    def values_of_means(means):
        return static_shapley(means, np.full(28, 0.3), FIRST, dot)

    own = np.array([each[:, 0] for each in texts])
    within = own.var(axis=1, ddof=1).mean() / 9
    assert text_reliability(texts, values_of_means) == pytest.approx(1 - within / own.mean(axis=1).var(ddof=1))

    game = game_shapley_values(
        lambda c: np.where(c.any(1), c @ own.mean(axis=1) / np.maximum(c.sum(1), 1), 0.3), 6, method="exact"
    )
    np.testing.assert_allclose(values_of_means(np.array([each.mean(axis=0) for each in texts])[None])[0], game.values)


def test_halves_of_texts_agree_as_predicted():
    rng = np.random.default_rng(2)
    centres = rng.normal(size=40)
    half, truth = 5, 1 / (1 + 4.0 / 5)  # centres of variance 1, texts of variance 4
    texts = [np.zeros((2 * half, 28)) for _ in centres]
    for own, centre in zip(texts, centres, strict=True):
        own[:, 0] = centre + 2 * rng.normal(size=2 * half)

    def values_of_means(means):  # of 40 people: Shapley's values in the dot game are these, scaled
        return means[..., 0] - means[..., 0].mean(axis=-1, keepdims=True)

    predicted = spearman_brown(text_reliability(texts, values_of_means), 1 / 2)
    observed = split_texts(texts, values_of_means, rng)
    assert predicted == pytest.approx(truth, abs=0.12) and observed == pytest.approx(predicted, abs=0.05)


def test_alike_people_are_not_told_apart():
    texts = [np.tile(FIRST, (4, 1))] * 3

    def values_of_means(means):
        return static_shapley(means, np.zeros(28), FIRST, dot)

    assert text_reliability(texts, values_of_means) == 0
    assert np.isnan(split_texts(texts, values_of_means, np.random.default_rng(0)))


def test_seeds_are_compared_with_all_others_of_their_crowd():
    a, b, c = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0], [2.0, 2.5, 0.0]
    points = pd.DataFrame(
        [
            {
                "target": "joy",
                "crowd": 1,
                "seed": seed,
                "metric": "l2",
                "scoring": name,
                "user": user,
                "shapley": phi,
            }
            for seed, values in ((5, a), (6, b), (7, c))
            for name in ("marginal", "ranked")
            for user, phi in enumerate(values)
        ]
    )
    ((source, at, predicted, observed, wanted),) = seed_rows(points, ("joy", 1, 5, "l2"), 0.97)
    expected = (np.corrcoef(a, b)[0, 1] + np.corrcoef(a, c)[0, 1]) / 2
    assert (source, at, predicted) == ("seeds", 1, 0.97) and observed == pytest.approx(expected)
    assert np.isnan(wanted) if expected <= 0 else wanted == pytest.approx(9 * (1 - expected) / expected)
    assert seed_rows(points[points["seed"] == 5], ("joy", 1, 5, "l2"), 0.97) == []
