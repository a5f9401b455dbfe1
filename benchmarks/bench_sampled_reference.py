"""The sampled reference of experiment 3 against permutation sampling, on the coalitions of a run that retrained all.

Games are drawn from coalitions.csv: a table of all 2^n retrained values is the game, its exact Shapley values are the
truth. A permutation sampler never retrains a coalition twice either: it gets as many permutations as fit the number.
Intervals: value +- 1.96 standard errors as the estimator gives them. They are of the table's values, so nothing is
added for the judge's noise, which the table holds.

    python benchmarks/bench_sampled_reference.py                        results/crowd_fine_tuning_sim/eight
    python benchmarks/bench_sampled_reference.py FOLDER --retrainings 32 64 128 --repeats 1000
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from crowd_fine_tuning_sim.cases import CASE
from crowd_fine_tuning_sim.results import as_bits
from crowd_fine_tuning_sim.retraining import all_coalitions, exact_shapley, sampled_shapley
from experiment.files import ROOT
from experiment.tables import read_table
from user_grouping_evaluation_sim.shapley import Game, ShapleyEstimate, game_shapley_values

EIGHT = ROOT / "results" / "crowd_fine_tuning_sim" / "eight"
BAR, COVERAGE = 0.6, (0.90, 0.99)


class Errors(NamedTuple):
    """Root mean square error over people and repeats; share of intervals that hold the truth."""

    error: float
    coverage: float


def game_of(values: np.ndarray, n: int, asked: set[int] | None = None) -> Game:
    """The game whose values (2^n,) of all_coalitions are known; `asked` is filled with the coalitions' numbers."""

    def game(coalitions: np.ndarray) -> np.ndarray:
        numbers = coalitions @ (1 << np.arange(n))
        if asked is not None:
            asked.update(numbers.tolist())
        return values[numbers]

    return game


def by_permutations(values: np.ndarray, n: int, retrainings: int, seed: int) -> ShapleyEstimate | None:
    """From the most permutations that need at most so many distinct coalitions; None where two need more."""
    best = None
    for count in range(2, 2**n):
        asked: set[int] = set()
        found = game_shapley_values(
            game_of(values, n, asked), n, method="permutation", max_evaluations=1 + count * n, seed=seed
        )
        if len(asked) > retrainings:
            break
        best = found
    return best


def errors_of(estimates: list[ShapleyEstimate], truth: np.ndarray) -> Errors:
    misses = np.array([estimate.values for estimate in estimates]) - truth
    bounds = 1.96 * np.array([estimate.standard_errors for estimate in estimates])
    return Errors(float(np.sqrt((misses**2).mean())), float((np.abs(misses) <= bounds).mean()))


def compare(values: np.ndarray, static: np.ndarray, retrainings: int, repeats: int) -> tuple[Errors, Errors]:
    """Ours and permutation sampling's. values, static: (2^n,), of all_coalitions in their order."""
    n = len(values).bit_length() - 1
    truth, _ = exact_shapley(values, np.zeros(2**n), n)
    game, control = game_of(values, n), game_of(static, n)
    ours = [sampled_shapley(game, control, n, retrainings, seed) for seed in range(repeats)]
    permuted = [by_permutations(values, n, retrainings, seed) for seed in range(repeats)]
    return errors_of(ours, truth), errors_of([found for found in permuted if found is not None], truth)


def tables_of(coalitions: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and static values of all_coalitions in their order, by the case's name."""
    found = {}
    for key, own in coalitions.groupby([*CASE, "metric"], sort=False):
        every = as_bits(all_coalitions(len(own["coalition"].iloc[0])))
        by_bits = own.set_index("coalition")
        if set(every) != set(own["coalition"]):
            sys.exit(f"{', '.join(map(str, key))}: not all coalitions are there; take a run with --reference exact")
        ordered = by_bits.loc[every]
        found[", ".join(map(str, key))] = ordered["value"].to_numpy(), ordered["static_value"].to_numpy()
    return found


def line(title: str, ours: Errors, permuted: Errors) -> str:
    ratio = ours.error / permuted.error
    kept = "met" if ratio <= BAR and COVERAGE[0] <= ours.coverage <= COVERAGE[1] else "MISSED"
    return (
        f"{title}: error {ours.error:.4f}, permutations {permuted.error:.4f}, ratio {ratio:.2f} (bar {BAR}); "
        f"95 % intervals cover {ours.coverage:.1%} (bar {COVERAGE[0]:.0%} to {COVERAGE[1]:.0%}): {kept}"
    )


def overall(each: list[Errors]) -> Errors:
    return Errors(float(np.sqrt(np.mean([e.error**2 for e in each]))), float(np.mean([e.coverage for e in each])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=EIGHT)
    parser.add_argument("--retrainings", type=int, nargs="+", default=[64, 32, 128])
    parser.add_argument("--repeats", type=int, default=1000)
    given = parser.parse_args()
    if not given.folder.is_dir():
        sys.exit(f"{given.folder}: no such folder; give that of a run with --reference exact")
    tables = tables_of(read_table(given.folder, "coalitions", dtype={"coalition": str}))
    for retrainings in given.retrainings:
        found = []
        for title, (values, static) in tables.items():
            found.append(compare(values, static, retrainings, given.repeats))
            print(line(f"{retrainings} retrainings, {title}", *found[-1]), flush=True)
        ours, permuted = ([pair[which] for pair in found] for which in (0, 1))
        print(line(f"{retrainings} retrainings, all", overall(ours), overall(permuted)), flush=True)


if __name__ == "__main__":
    main()
