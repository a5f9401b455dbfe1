"""Shapley values of coalition games, and of the game v(S) = metric(mean of S's vectors, expert)."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import numpy as np

from experiment.errors import InputError
from user_grouping_evaluation_sim.metrics import METRICS, Metric, dot
from user_grouping_evaluation_sim.shapley_sampling import stratified

METHODS = ("auto", "exact", "closed_form", "stratified", "permutation", "kernel")
MOST_USERS_ENUMERATED = 16  # by method "auto"
MOST_USERS_EXACT = 22  # by method "exact"
MOST_EVALUATIONS = 2_000_000  # where the caller names no budget
DEFAULT_EVALUATIONS = 10_000  # of the methods that have no stopping rule
CHUNK_NUMBERS = 4_000_000  # how many numbers a temporary array may hold

Game = Callable[[np.ndarray], np.ndarray]
numpys_generator = Lock()  # the global one, from which shap draws


@dataclass(frozen=True)
class ShapleyEstimate:
    """values, standard_errors: (n,), in the game's unit. Errors are 0 for exact methods, NaN where none is known.

    evaluations: of how many coalitions the game was asked.
    """

    values: np.ndarray
    standard_errors: np.ndarray
    evaluations: int
    method: str


def game_shapley_values(
    game: Game,
    num_players: int,
    *,
    features: np.ndarray | None = None,
    method: str = "auto",
    precision: float = 0.01,
    max_evaluations: int | None = None,
    seed: int | np.random.SeedSequence = 0,
) -> ShapleyEstimate:
    """Shapley values of the players in any coalition game.

    game: coalitions, bool (m, n) -> values (m,). It is asked for the empty coalition too, and for none twice, but by
      "permutation" and "kernel".
    features: (n, d) of the players, where a coalition's value depends mainly on the mean of its members' features.
    method:
      "exact"        all 2^n coalitions
      "stratified"   see shapley_sampling.py; stops when the largest standard error is at most `precision` times the
                     values' standard deviation, or at `max_evaluations`
      "permutation"  plain permutation sampling (Castro et al., 2009)
      "kernel"       shap.KernelExplainer (Lundberg and Lee, 2017), as in the original study
      "auto"         exact up to 16 players, if the budget allows, otherwise stratified
    max_evaluations: of how many coalitions the game may be asked; 10,000 for "permutation" and "kernel" by default.
    Raises InputError for an unknown method, one that does not fit the size or the budget, or values not finite.
    """
    n = num_players
    if n < 1:
        raise InputError(f"shapley: a game of {n} players has no values")
    if features is not None:
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or len(features) != n or not np.isfinite(features).all():
            raise InputError(f"shapley: features {features.shape} must be ({n}, d) and finite")
    if method not in METHODS or method == "closed_form":
        choices = ", ".join(name for name in METHODS if name != "closed_form")
        raise InputError(f"shapley: unknown method {method!r} of a coalition game; choose from {choices}")
    if method == "auto":
        few = n <= MOST_USERS_ENUMERATED and 2**n <= (max_evaluations or MOST_EVALUATIONS)
        method = "exact" if few else "stratified"
    budget = max_evaluations or (MOST_EVALUATIONS if method in ("exact", "stratified") else DEFAULT_EVALUATIONS)
    least = {"exact": 2, "stratified": 2, "permutation": 2 * n + 1, "kernel": 2}[method]
    if budget < least:
        raise InputError(f"shapley: {method} needs at least {least} evaluations of {n} players; {budget} are allowed")
    rng = np.random.default_rng(seed)
    asked, largest = 0, 0.0

    def value(coalitions: np.ndarray) -> np.ndarray:
        """The game's values, in chunks that bound a game's temporaries."""
        nonlocal asked, largest
        step = max(1, CHUNK_NUMBERS // n)
        parts = [np.asarray(game(coalitions[i : i + step])) for i in range(0, len(coalitions), step)]
        values = np.concatenate([np.zeros(0), *parts]) if all(part.ndim == 1 for part in parts) else np.zeros(0)
        if values.shape != coalitions.shape[:1] or not np.isfinite(values).all():
            raise InputError("shapley: the game must give one finite number a coalition, also for the empty one")
        asked += len(values)
        largest = max(largest, float(np.abs(values).max(initial=0)))
        return values

    empty = value(np.zeros((1, n), dtype=bool))[0]

    def worth(coalitions: np.ndarray) -> np.ndarray:
        return value(coalitions) - empty

    if method == "exact":
        values, errors = _exact(worth, n), np.zeros(n)
    elif method == "stratified":

        def rounding() -> float:
            return 8 * np.finfo(float).eps * largest

        values, errors = stratified(worth, n, features, precision, budget - 1, rounding, rng)
    elif method == "permutation":
        values, errors = _permutation(worth, n, budget - 1, rng)
    else:
        # It asks for the empty coalition and for all players beside its samples.
        values, errors = _kernel(worth, n, max(budget - 3, 1), rng), np.full(n, np.nan)
    return ShapleyEstimate(values, errors, asked, method)


def shapley_values(
    user_points: np.ndarray,
    expert_point: np.ndarray,
    metric: Metric | str,
    *,
    method: str = "auto",
    precision: float = 0.01,
    max_evaluations: int | None = None,
    seed: int | np.random.SeedSequence = 0,
) -> ShapleyEstimate:
    """Shapley values of the users in the game v(S) = metric(mean of S's points, expert_point); v(empty) is of zeros.

    user_points: (n, d). expert_point: (d,). metric: see metrics.py, or its name there.
    method: as in game_shapley_values, and
      "closed_form"  for the dot product: phi_i = v(N)/n + H_(n-1)/(n-1) * (x_i - mean x).e, with H the harmonic number;
                     "auto" takes it there
    Raises InputError for an unknown method or metric, a method that does not fit, or points not finite.
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            raise InputError(f"shapley: unknown metric {metric!r}; choose from {', '.join(METRICS)}")
        metric = METRICS[metric]
    points = np.asarray(user_points, dtype=np.float64)
    expert = np.asarray(expert_point, dtype=np.float64)
    if points.ndim != 2 or expert.shape != points.shape[1:] or not len(points):
        raise InputError(f"shapley: user points {points.shape} and expert {expert.shape} must be (n, d) and (d,)")
    if not (np.isfinite(points).all() and np.isfinite(expert).all()):
        raise InputError("shapley: a user's or the expert's point holds NaN or infinity; remove or fill it")
    if method == "closed_form" or (method == "auto" and metric is dot):
        if metric is not dot:
            raise InputError("shapley: closed_form is for the metric dot; take auto, exact or stratified")
        return _closed_form(points, expert)
    return game_shapley_values(
        mean_game(points, expert, metric),
        len(points),
        features=points,
        method=method,
        precision=precision,
        max_evaluations=max_evaluations,
        seed=seed,
    )


def mean_game(points: np.ndarray, expert: np.ndarray, metric: Metric) -> Game:
    """v(S) = metric(mean of S's points (n, d), expert (d,)). A coordinate that all members have at 0 is exactly 0."""
    step = max(1, CHUNK_NUMBERS // points.shape[1])

    def game(coalitions: np.ndarray) -> np.ndarray:
        sizes = coalitions.sum(axis=1, keepdims=True)
        means = coalitions.astype(np.float64) @ points / np.maximum(sizes, 1)
        values = [np.asarray(metric(means[i : i + step], expert)) for i in range(0, len(means), step)]
        if any(part.ndim != 1 or not np.isfinite(part).all() for part in values):
            raise InputError(
                "shapley: the metric must give one finite number a vector, "
                "also for the zero vector (the value of no users)"
            )
        return np.concatenate(values) if values else np.zeros(0)

    return game


def _closed_form(points: np.ndarray, expert: np.ndarray) -> ShapleyEstimate:
    n = len(points)
    alignment = points @ expert
    harmonic = (1.0 / np.arange(1, n)).sum()
    values = alignment.mean() / n + harmonic / max(n - 1, 1) * (alignment - alignment.mean())
    return ShapleyEstimate(values, np.zeros(n), 0, "closed_form")


def _exact(worth: Game, n: int) -> np.ndarray:
    if n > MOST_USERS_EXACT:
        raise InputError(f"shapley: exact enumerates 2^n coalitions, too many for {n} users; take stratified")
    coalitions = np.arange(2**n)  # bit i of a number says whether player i is in the coalition
    step = max(1, CHUNK_NUMBERS // n)
    values, sizes = np.zeros(2**n), np.zeros(2**n, dtype=int)
    for start in range(1, 2**n, step):  # the empty coalition's worth is 0
        members = (coalitions[start : start + step, None] >> np.arange(n)) & 1 == 1
        values[start : start + step], sizes[start : start + step] = worth(members), members.sum(axis=1)
    # |S|! (n - |S| - 1)! / n!, as a recurrence
    weight = np.cumprod(np.concatenate([[1 / n], np.arange(1, n) / (n - np.arange(1, n))]))
    phi = np.empty(n)
    for i in range(n):
        without = coalitions[(coalitions >> i) & 1 == 0]
        phi[i] = weight[sizes[without]] @ (values[without | (1 << i)] - values[without])
    return phi


def _permutation(worth: Game, n: int, evaluations: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    count = evaluations // n
    total, squares = np.zeros(n), np.zeros(n)
    step = max(1, CHUNK_NUMBERS // n**2)
    for start in range(0, count, step):
        rows = min(step, count - start)
        places = rng.permuted(np.tile(np.arange(n), (rows, 1)), axis=1)  # of every player in the order of joining
        coalitions = places[:, None, :] <= np.arange(n)[:, None]  # (rows, n, n)
        values = worth(coalitions.reshape(-1, n)).reshape(rows, n)
        marginals = np.take_along_axis(np.diff(values, axis=1, prepend=0), places, axis=1)
        total += marginals.sum(axis=0)
        squares += (marginals**2).sum(axis=0)
    mean = total / count
    variance = (squares / count - mean**2) * count / (count - 1)
    return mean, np.sqrt(np.maximum(variance, 0) / count)


def _kernel(worth: Game, n: int, evaluations: int, rng: np.random.Generator) -> np.ndarray:
    import shap  # slow to import, and only the study's estimator needs it

    def coalition_values(masks: np.ndarray) -> np.ndarray:
        return worth(masks > 0.5)

    with numpys_generator:
        state = np.random.get_state()
        np.random.seed(int(rng.integers(2**32)))
        try:
            explainer = shap.KernelExplainer(coalition_values, np.zeros((1, n)))
            values = explainer.shap_values(np.ones((1, n)), nsamples=evaluations, l1_reg=False, silent=True)
            return np.asarray(values[0])
        finally:
            np.random.set_state(state)
