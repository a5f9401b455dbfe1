"""Shapley values: error and time against kernel SHAP, plain permutations and SVARM; honest errors; growth with users.

Error: root mean square over users against a converged reference, as a share of the values' standard deviation.
Run: python benchmarks/bench_shapley.py   (needs requirements-dev.txt)
"""

import time
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.measure import report
from user_grouping_evaluation_sim.metrics import METRICS, Metric
from user_grouping_evaluation_sim.preferences import Crowd, Preferences, draw_crowds, read_movielens
from user_grouping_evaluation_sim.settings import DATA
from user_grouping_evaluation_sim.shapley import shapley_values

BUDGET = 10_000
REPEATS = 200
CROWDS = 5
KINDS: dict[str, dict[str, Any]] = {
    "precise": {"precision": 0.01},
    "ours": {"precision": 0, "max_evaluations": BUDGET},
    "svarm": {},
    "permutation": {"method": "permutation", "max_evaluations": BUDGET},
    "kernel": {"method": "kernel", "max_evaluations": BUDGET},
}


def crowds(preferences: Preferences, num_users: int, count: int) -> Crowd:
    return draw_crowds(preferences, num_users, np.random.SeedSequence(7, spawn_key=(num_users,)).spawn(count))


def svarm(users: np.ndarray, expert: np.ndarray, metric: Metric, seed: int) -> np.ndarray:
    import shapiq

    def value(coalitions: np.ndarray) -> np.ndarray:
        sizes = coalitions.sum(axis=1, keepdims=True)
        return metric(coalitions @ users / np.maximum(sizes, 1), expert)

    found = shapiq.SVARM(n=len(users), random_state=seed).approximate(BUDGET, value)
    return np.array([found[(i,)] for i in range(len(users))])


def main() -> None:
    preferences = read_movielens(DATA / "ratings.csv.gz", DATA / "movies.csv.gz", keep_no_genres=True)
    drawn = crowds(preferences, 75, CROWDS)
    print(f"75 users x {preferences.vectors.shape[1]} dimensions, mean over {CROWDS} crowds, one thread")
    for name, bar in (("l2", "0.025"), ("l1", "0.03")):
        metric = METRICS[name]
        errors: dict[str, list[float]] = {kind: [] for kind in KINDS}
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for users, expert in zip(drawn.users, drawn.experts, strict=True):
            reference = shapley_values(
                users, expert, metric, method="stratified", precision=5e-4, max_evaluations=5_000_000, seed=1
            ).values
            for kind, options in KINDS.items():
                start = time.perf_counter()
                if kind == "svarm":
                    values = svarm(users, expert, metric, 2)
                else:
                    values = shapley_values(users, expert, metric, seed=2, **options).values
                seconds[kind].append(time.perf_counter() - start)
                errors[kind].append(float(np.sqrt(((values - reference) ** 2).mean()) / reference.std()))
        mean = {kind: float(np.mean(values)) for kind, values in errors.items()}
        took = {kind: float(np.median(values)) for kind, values in seconds.items()}
        report(f"{name}, to precision 0.01: error", mean["precise"], "of the spread", "0.01")
        report(f"{name}, to precision 0.01: time", took["precise"] * 1000, "ms", "50")
        for other in ("kernel", "permutation", "svarm"):
            report(f"{name}, {BUDGET} evaluations: error", mean["ours"], "of the spread", bar, mean[other], other)
            report(f"{name}, {BUDGET} evaluations: time", took["ours"] * 1000, "ms", "-", took[other] * 1000, other)
        users, expert = drawn.users[0], drawn.experts[0]
        reference = shapley_values(
            users, expert, metric, method="stratified", precision=2e-4, max_evaluations=20_000_000, seed=1
        )
        estimates = [shapley_values(users, expert, metric, seed=seed) for seed in range(100, 100 + REPEATS)]
        covered = np.array([np.abs(e.values - reference.values) <= 1.96 * e.standard_errors for e in estimates])
        report(f"{name}, 95 % intervals cover, over {REPEATS} repeats", 100 * covered.mean(), "%", "92 to 98")
    sizes = np.array([50, 100, 200, 400, 800])
    pool = np.random.default_rng(0).permutation(np.vstack([preferences.vectors] * 2))
    many = Preferences(np.arange(len(pool)), preferences.dimensions, pool)
    for name in ("l2", "l1"):
        took = []
        for n in sizes:
            crowd = crowds(many, int(n), 3)
            best = []
            for users, expert in zip(crowd.users, crowd.experts, strict=True):
                start = time.perf_counter()
                shapley_values(users, expert, METRICS[name], seed=3)
                best.append(time.perf_counter() - start)
            took.append(np.median(best))
        slope = np.polyfit(np.log(sizes), np.log(took), 1)[0]
        print(f"{name}, {sizes} users: {np.round(np.array(took) * 1000, 1)} ms")
        report(f"{name}, 50 to 800 users: time grows as n to the power", slope, "", "2, aim 1.5")


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
