"""Shapley values: error and time against the best ready-made estimators; honest errors; growth with users.

Error: root mean square over players against the truth, as a share of the true values' standard deviation.
shapiq above 1.4 needs Python 3.12: the script makes it an environment of its own, in the user's cache folder.
Run: python benchmarks/bench_shapley.py
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.measure import report
from benchmarks.shapley_games import Arrays, airport, majority, trees, value_of
from user_grouping_evaluation_sim.metrics import METRICS
from user_grouping_evaluation_sim.preferences import Crowd, Preferences, draw_crowds, read_movielens
from user_grouping_evaluation_sim.settings import DATA
from user_grouping_evaluation_sim.shapley import game_shapley_values, shapley_values

BUDGET = 10_000
REPEATS = 200
CROWDS = 5
GAMES = 4  # of each kind and size
BESIDE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crowd-sft-shapiq-1.8"


def shapiq_python() -> Path | None:
    """The Python of the environment that holds shapiq 1.8, made where it is not there yet."""
    python = CACHE / "bin" / "python"
    if (CACHE / "complete").exists():
        return python
    newer = shutil.which("python3.12")
    if not newer or subprocess.run([newer, "--version"], capture_output=True, check=False).returncode:
        print("python3.12 is not on PATH: shapiq 1.8 is left out")
        return None
    subprocess.run([newer, "-m", "venv", "--clear", CACHE], check=True)
    packages = ["shapiq==1.8.*", "xgboost", "lightgbm"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    (CACHE / "complete").touch()
    return python


def by_shapiq(python: Path, game: Arrays, seed: int) -> dict[str, tuple[np.ndarray, float]]:
    """Values and seconds of shapiq's estimators for a game handed over as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "game.npz", Path(folder) / "found.json"
        np.savez(path, **game)
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        arguments = [python, BESIDE / "shapley_by_shapiq.py", path, str(BUDGET), str(seed), out]
        subprocess.run([str(argument) for argument in arguments], check=True, env=one_thread)
        found = json.loads(out.read_text())
    return {name: (np.array(one["values"]), one["seconds"]) for name, one in found.items()}


def compare(title: str, games: list[Arrays], python: Path | None, bar: str, *, seen: bool) -> None:
    """Ours beside the alternatives on games of a kind; `seen`: ours is given the users' vectors."""
    errors: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed, game in enumerate(games):
        value, truth = value_of(game), game["truth"]
        found = by_shapiq(python, game, seed) if python else {}
        for method in ("stratified", "permutation", "kernel"):
            start = time.perf_counter()
            estimate = game_shapley_values(
                value,
                len(truth),
                features=game["users"] if seen else None,
                method=method,
                precision=0,
                max_evaluations=BUDGET,
                seed=seed,
            )
            found[method] = estimate.values, time.perf_counter() - start
        for name, (values, took) in found.items():
            errors.setdefault(name, []).append(float(np.sqrt(((values - truth) ** 2).mean()) / truth.std()))
            seconds.setdefault(name, []).append(took)
    errors = {name: found for name, found in errors.items() if len(found) == len(games)}
    ours = np.mean(errors["stratified"])
    print(f"{title}: {BUDGET} evaluations, mean of {len(games)} games +- 1.96 standard errors")
    for name in sorted(errors, key=lambda name: np.mean(errors[name])):
        mean, half = np.mean(errors[name]), 1.96 * np.std(errors[name], ddof=1) / len(games) ** 0.5
        shown = "ours" if name == "stratified" else {"kernel": "shap.KernelExplainer"}.get(name, name)
        took = np.median(seconds[name])
        print(
            f"  {shown:22} {mean:.4f} +- {half:.4f} of the spread; {mean / ours:7.3g} x ours; {took:.3g} s", flush=True
        )
    others = {name: float(np.mean(one)) for name, one in errors.items() if name != "stratified"}
    best = min(others, key=lambda name: others[name])
    report(f"{title}: error", float(ours), "of the spread", bar, others[best], f"best other, {best}")


def crowds(preferences: Preferences, num_users: int, count: int) -> Crowd:
    return draw_crowds(preferences, num_users, np.random.SeedSequence(7, spawn_key=(num_users,)).spawn(count))


def main() -> None:
    python = shapiq_python()
    preferences = read_movielens(DATA / "ratings.csv.gz", DATA / "movies.csv.gz", keep_no_genres=True)
    drawn = crowds(preferences, 75, CROWDS)
    pairs = list(zip(drawn.users, drawn.experts, strict=True))
    print(f"one thread. Users' vectors seen by ours, 75 users x {preferences.vectors.shape[1]} dimensions")
    for norm, name in ((2, "l2"), (1, "l1")):
        references = [shapley_values(*pair, name, method="stratified", precision=5e-4, seed=1).values for pair in pairs]
        games: list[Arrays] = [
            {"kind": np.array("mean"), "users": users, "expert": expert, "norm": np.array(norm), "truth": truth}
            for (users, expert), truth in zip(pairs, references, strict=True)
        ]
        compare(f"{name}, 75 users", games, python, "5 x", seen=True)
        seconds, errors = [], []
        for pair, truth in zip(pairs, references, strict=True):
            start = time.perf_counter()
            values = shapley_values(*pair, name, seed=2).values
            seconds.append(time.perf_counter() - start)
            errors.append(np.sqrt(((values - truth) ** 2).mean()) / truth.std())
        report(f"{name}, to precision 0.01: error", float(np.mean(errors)), "of the spread", "0.01")
        report(f"{name}, to precision 0.01: time", float(np.median(seconds)) * 1000, "ms", "50")
    print("black boxes: all see v(S) only")
    for make in (airport, majority, trees):
        for n in (30, 75):
            streams = np.random.SeedSequence(11, spawn_key=(n,)).spawn(GAMES)
            games = [make(n, np.random.default_rng(stream)) for stream in streams]
            compare(f"{make.__name__}, {n} players", games, python, "1 x", seen=False)
    for name in ("l2", "l1"):
        reference = shapley_values(*pairs[0], name, method="stratified", precision=2e-4, seed=1)
        estimates = [shapley_values(*pairs[0], name, seed=seed) for seed in range(100, 100 + REPEATS)]
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
