"""Run by bench_shapley.py in shapiq's own environment: python shapley_by_shapiq.py GAME.npz BUDGET SEED OUT.json

Writes, of every estimator that ends within LIMIT seconds, the values and the seconds.
"""

import json
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import shapiq
from shapley_games import value_of

LIMIT = 120

# Their own defaults, but for ProxySPEX's search of hyperparameters, which takes minutes a game.
ESTIMATORS = {
    "RegressionMSR": lambda n, seed: shapiq.approximator.RegressionMSR(n=n, index="SV", random_state=seed),
    "LeverageSHAP": lambda n, seed: shapiq.approximator.LeverageSHAP(n=n, random_state=seed),
    "OddSHAP": lambda n, seed: shapiq.approximator.OddSHAP(n=n, random_state=seed),
    "ProxySPEX": lambda n, seed: shapiq.approximator.ProxySPEX(
        n=n, max_order=1, index="SV", hpo=False, random_state=seed
    ),
    "SVARM": lambda n, seed: shapiq.approximator.SVARM(n=n, random_state=seed),
    "KernelSHAP": lambda n, seed: shapiq.approximator.KernelSHAP(n=n, random_state=seed),
}


def out_of_time(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    signal.signal(signal.SIGALRM, out_of_time)
    path, budget, seed, out = sys.argv[1:]
    with np.load(path, allow_pickle=False) as arrays:
        game = dict(arrays)
    n, value = len(game["truth"]), value_of(game)
    found = {}
    for name, make in ESTIMATORS.items():
        asked = 0

        def counted(coalitions: np.ndarray) -> np.ndarray:
            nonlocal asked
            asked += len(coalitions)
            return value(coalitions)

        start = time.perf_counter()
        signal.alarm(LIMIT)
        try:
            estimate = make(n, int(seed)).approximate(
                int(budget), lambda rows: counted(np.atleast_2d(rows).astype(bool))
            )
        except TimeoutError:
            print(f"  {name}: not done after {LIMIT} s, left out")
            continue
        finally:
            signal.alarm(0)
        seconds = time.perf_counter() - start
        values = [float(estimate[(player,)]) for player in range(n)]
        found[name] = {"values": values, "seconds": seconds, "evaluations": asked}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
