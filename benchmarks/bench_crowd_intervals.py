"""Whether summary.csv's 95 % intervals over a few crowds hold the mean over all crowds that could have been dealt.

The crowds are experiment 3's reference's, without language models: mean text vectors play the same rounds, and points
and pay are compared with the Shapley values of these vectors' game. The mean over --population crowds, as many for each
target, is the truth; few of them are drawn again and again, as many for each target, and summarised as summary.csv is.

    python benchmarks/bench_crowd_intervals.py
    python benchmarks/bench_crowd_intervals.py --population 600 --repeats 10000
"""

import argparse
from functools import partial

import numpy as np
from tqdm import tqdm

from crowd_fine_tuning_sim.crowds import load_source, simulated_crowd
from crowd_fine_tuning_sim.pay import misallocated
from crowd_fine_tuning_sim.results import interval_over_crowds
from crowd_fine_tuning_sim.settings import PRESETS, Settings, kinds_of
from experiment.statistics import mean_interval
from point_in_space_sim.engine.assets import cache_folder
from point_in_space_sim.mapper import load_mapper, map_texts
from user_grouping_evaluation_sim.competition import Rules
from user_grouping_evaluation_sim.grouping import GROUPINGS
from user_grouping_evaluation_sim.metrics import l2
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.scoring import SCORINGS
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.tables import pearson, spearman
from user_grouping_evaluation_sim.vector_world import simulate

QUANTITIES = ("pearson", "spearman", "misallocation", "misallocation - equal")
CROWDS = (3, 6, 12, 24)
SEED = 9000


def population(settings: Settings, per_target: int) -> np.ndarray:
    """(targets, crowds, scorings, quantities)."""
    source, mapper = load_source("shipped"), load_mapper("embedded")
    start = map_texts(mapper, source.texts, cache_folder() / "vectors").astype(np.float64).mean(axis=0)
    rules = Rules(settings.num_groups, settings.num_rounds, settings.error_probability)
    found = np.zeros((len(settings.target_emotion), per_target, len(settings.scoring), len(QUANTITIES)))
    bar = tqdm(total=found[:, :, 0, 0].size, desc="crowds", dynamic_ncols=True)
    for row, target in enumerate(settings.target_emotion):
        for number in range(per_target):
            rng = np.random.default_rng((SEED, row, number))
            held, near = settings.texts_per_user, settings.neighbours
            crowd = simulated_crowd(
                source,
                target,
                kinds_of(settings),
                held,
                near,
                lambda texts: map_texts(mapper, texts, cache_folder() / "vectors"),
                rng,
            )
            means = crowd.means_at(0.0)
            world = Crowd(
                np.arange(len(means))[None], means[None], crowd.centroid[None].astype(np.float64), start[None]
            )
            shapley = shapley_values(means, crowd.centroid, l2, method="exact").values
            equal = misallocated(np.ones(len(means)), shapley)
            for column, scoring in enumerate(settings.scoring):
                rounds = np.random.default_rng((SEED, row, number, 1))
                played = simulate(world, GROUPINGS["random"], l2, SCORINGS[scoring], rules, rounds)
                astray = misallocated(played.pay[0], shapley)
                points = played.points[0]
                found[row, number, column] = pearson(points, shapley), spearman(points, shapley), astray, astray - equal
            bar.update()
    return found


def coverage(values: np.ndarray, quantity: str, crowds: int, repeats: int, rng: np.random.Generator) -> str:
    """Coverage and mean length of summary.csv's intervals and of Student's, in words. values: (targets, crowds), NaN
    where a crowd has none."""
    each = crowds // len(values)
    drawn = np.concatenate([own[rng.integers(len(own), size=(repeats, each))] for own in values], axis=1)
    truth = np.nanmean(values)
    said = []
    for interval in (partial(interval_over_crowds, quantity), mean_interval):
        low, high = np.array([interval(own)[1:] for own in drawn]).T
        known = np.isfinite(low)
        held = ((low <= truth) & (truth <= high))[known].mean()
        said.append(f"{held:.1%} (length {(high - low)[known].mean():.2f})")
    return f"{crowds} crowds: {said[0]}, Student's {said[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=4_000)
    given = parser.parse_args()
    settings = Settings(**PRESETS["reference"])
    found = population(settings, given.population // len(settings.target_emotion))
    rng = np.random.default_rng(SEED)
    for column, scoring in enumerate(settings.scoring):
        for which, quantity in enumerate(QUANTITIES):
            values = found[:, :, column, which]
            print(f"{scoring}, {quantity}: mean {np.nanmean(values):.2f}; 95 % intervals hold it, of")
            for n in CROWDS:
                print("   ", coverage(values, quantity, n, given.repeats, rng), flush=True)


if __name__ == "__main__":
    main()
