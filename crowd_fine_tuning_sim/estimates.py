"""Shapley values by retraining, and the estimates of people's shares that are compared with them: functions of what a
case showed, in the registry ESTIMATES."""

from collections.abc import Callable

import numpy as np

from crowd_fine_tuning_sim.cases import Case, Combination, Played, combinations_of
from crowd_fine_tuning_sim.crowds import Crowd
from crowd_fine_tuning_sim.retraining import exact_shapley, sampled_shapley, static_game, unsampled_noise, values_of
from crowd_fine_tuning_sim.settings import Settings, retrained_coalitions
from experiment.command_line import blaming
from user_grouping_evaluation_sim.competition import Rules
from user_grouping_evaluation_sim.preferences import Crowd as VectorCrowd
from user_grouping_evaluation_sim.settings import functions_of, metric_of
from user_grouping_evaluation_sim.shapley import ShapleyEstimate, game_shapley_values
from user_grouping_evaluation_sim.vector_world import Conduct, Simulated, simulate


def sampled_reference(
    settings: Settings, case: Case, vectors_of: Callable[[np.ndarray], np.ndarray], base: np.ndarray
) -> ShapleyEstimate:
    """The sampled reference. vectors_of: coalitions (m, n) -> samples (m, samples, 28). base: of the untuned model."""
    crowd, metric = case.crowd, metric_of(settings.metric[0])
    means = crowd.means_at(0.0)
    static = static_game(means, base.astype(np.float64).mean(axis=0), crowd.centroid, metric)

    def game(coalitions: np.ndarray) -> np.ndarray:
        return values_of(vectors_of(coalitions), crowd.centroid, metric)[0]

    return sampled_shapley(game, static, len(means), settings.retrainings, case.streams("coalitions"), means)


def reference_of(settings: Settings, played: Played, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Shapley values of the retraining game and their standard errors, which include the judge's noise: (n,) each.

    NaN for who turns coat: coalitions are retrained on what people hold at first.
    """
    found, n = played.retraining, len(played.means)
    stays = np.where([bool(person.later) for person in played.case.crowd.people], np.nan, 1.0)
    values, variances = values_of(found["vectors"], played.case.crowd.centroid, metric_of(metric))
    if settings.reference == "exact":
        shapley, errors = exact_shapley(values, variances, n)
        return shapley * stays, errors * stays
    if settings.reference == "none":
        return np.full(n, np.nan), np.full(n, np.nan)
    rows = {coalition.tobytes(): i for i, coalition in enumerate(found["coalitions"])}

    def vectors_of(coalitions: np.ndarray) -> np.ndarray:
        return found["vectors"][[rows[np.ascontiguousarray(coalition).tobytes()] for coalition in coalitions]]

    estimate = sampled_reference(settings, played.case, vectors_of, found["vectors"][0])
    noise = unsampled_noise(found["coalitions"], variances)
    return estimate.values * stays, np.sqrt(estimate.standard_errors**2 + noise) * stays


Estimate = Callable[[Settings, Played, str], np.ndarray]


def static(settings: Settings, played: Played, metric: str) -> np.ndarray:
    """Shapley values of the game of mean text vectors, without a model."""
    game = static_game(played.means, played.base, played.case.crowd.centroid, metric_of(metric))
    return game_shapley_values(game, len(played.means), features=played.means, precision=1e-3).values


def static_alone(settings: Settings, played: Played, metric: str) -> np.ndarray:
    """Value of a person's mean text vector less that of the untuned model's: how near the person's own texts are."""
    game = static_game(played.means, played.base, played.case.crowd.centroid, metric_of(metric))
    return game(np.eye(len(played.means), dtype=bool)) - game(np.zeros((1, len(played.means)), dtype=bool))


def alone(settings: Settings, played: Played, metric: str) -> np.ndarray:
    """Value of the model that is tuned on a person's texts alone less the untuned one's, by the audits: of what pay is
    made of, the part that knows no competition. NaN with --reference none."""
    n = len(played.means)
    if "audited" not in played.retraining:
        return np.full(n, np.nan)
    values, _ = values_of(played.retraining["audited"], played.case.crowd.centroid, metric_of(metric))
    return values[1 : n + 1] - values[0]


def leaving_one_out(settings: Settings, played: Played, metric: str) -> np.ndarray:
    """Value of everybody's model less that of the model without the person, by the audits: of the samples that the
    reference is made of, noise alone would agree with it. NaN but with --reference exact."""
    n = len(played.means)
    if settings.reference != "exact":
        return np.full(n, np.nan)
    values, _ = values_of(played.retraining["audited"], played.case.crowd.centroid, metric_of(metric))
    return values[n + 1] - values[n + 2 :]


def in_run(settings: Settings, played: Played, metric: str) -> np.ndarray:
    """First-order in-run data Shapley (Wang et al., ICLR 2025), of a tuning loss: it knows no metric."""
    return played.in_run


def equal(settings: Settings, played: Played, metric: str) -> np.ndarray:
    """The same for all."""
    return np.ones(len(played.means))


def vector_points(settings: Settings, played: Played, metric: str) -> np.ndarray:
    """What experiment 2's attributed points come to on the same people's mean vectors, without a model; less the point
    that everybody starts with."""
    return simulated(settings, played, ("random", metric, "attributed")).points[0] - 1


def other_seeds(settings: Settings, played: Played, metric: str) -> np.ndarray:
    """The reference tuned and judged anew, NaN with one seed. Of two seeds, values without noise would agree with
    either at the root of this correlation (Spearman, 1904)."""
    found = [reference_of(settings, other, metric)[0] for other in played.again]
    return np.mean(found, axis=0) if found else np.full(len(played.means), np.nan)


ESTIMATES: dict[str, tuple[Estimate, str, Callable[[Settings], int]]] = {
    "equal": (equal, "equal", lambda settings: 0),
    "static": (static, "game of mean vectors", lambda settings: 0),
    "static_alone": (static_alone, "own mean vector", lambda settings: 0),
    "vector": (vector_points, "attributed on vectors", lambda settings: 0),
    # One, each of whose steps also goes through twice as many other texts.
    "in_run": (in_run, "in-run", lambda settings: 3),
    "alone": (alone, "each alone", lambda settings: settings.num_users),
    "leave_one_out": (leaving_one_out, "leave one out", lambda settings: settings.num_users + 1),
    "other_seeds": (
        other_seeds,
        "retraining, other seeds",
        lambda settings: (settings.num_seeds - 1) * retrained_coalitions(settings),
    ),
}
"""Estimate, its name in figures, and what it costs, in models tuned."""


def simulated(settings: Settings, played: Played, combination: Combination) -> Simulated:
    """Experiment 2's vector world with the same people, rounds and start."""
    return vector_world(settings, played.case, played.base, combination, settings.num_rounds)


def vector_world(
    settings: Settings, case: Case, start: np.ndarray, combination: Combination, num_rounds: int
) -> Simulated:
    """Experiment 2's, of the people's mean text vectors; start: (28,), the first model."""
    means, centroid = case.crowd.means_at(0.0), case.crowd.centroid.astype(np.float64)
    crowd = VectorCrowd(np.arange(len(means))[None], means[None], centroid[None], start[None])
    rules = Rules(settings.num_groups, num_rounds, settings.error_probability)
    rng = np.random.default_rng(case.streams("rounds"))
    return simulate(crowd, *functions_of(*combination), rules, rng, conduct=conduct_of(case.crowd, num_rounds))


def rehearse_strategies(settings: Settings, case: Case) -> None:
    """Three rounds of experiment 2's world by the user's own functions, and what a metric of theirs makes of samples: a
    mistake in them shows before a model is tuned. Raises InputError."""
    crowd = case.crowd
    for grouping, metric, scoring in combinations_of(settings):
        if own := [name for name in (grouping, metric, scoring) if ":" in name]:
            with blaming(own):
                for combination in ((grouping, metric, scoring), ("random", metric, "attributed")):
                    vector_world(settings, case, crowd.near[-1], combination, min(settings.num_rounds, 3))
                values_of(np.stack([crowd.near, crowd.near[::-1]]), crowd.centroid, metric_of(metric))


def conduct_of(crowd: Crowd, num_rounds: int) -> Conduct:
    """What the people contribute in experiment 2's vector world."""
    return Conduct(lambda t: crowd.means_at(t / num_rounds)[None])
