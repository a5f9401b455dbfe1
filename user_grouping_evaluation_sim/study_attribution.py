"""What was tried on attributed points: agreement with Shapley values against regret, and the default on fresh crowds.

Settings are compared on the crowds of --tuning-seed; what README reports of the default comes from --seed, which no
choice was made on. Run: python user_grouping_evaluation_sim/study_attribution.py
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiment.command_line import StudySettings, run_script
from experiment.figures import COLOURS, LINES, MARKERS, legend_below, new_figure, save_figure
from experiment.files import ROOT
from experiment.parallel import parallel_map
from experiment.statistics import mean_interval
from experiment.tables import write_table
from user_grouping_evaluation_sim.competition import Rules
from user_grouping_evaluation_sim.grouping import GROUPINGS
from user_grouping_evaluation_sim.hull import hull_distance
from user_grouping_evaluation_sim.metrics import METRICS
from user_grouping_evaluation_sim.preferences import Crowd, Preferences, draw_crowds, read_movielens
from user_grouping_evaluation_sim.scoring import (
    LEANING,
    SCORINGS,
    SHARPNESS,
    Round,
    Scoring,
    Standing,
    attributed,
    marginal,
    ranked,
)
from user_grouping_evaluation_sim.settings import DATA
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.tables import pearson
from user_grouping_evaluation_sim.vector_world import simulate

DEFAULT = "attributed"
ALONE = "points"  # the family of what was tried with one setting only
RESULTS = ROOT / "results" / "user_grouping_evaluation_sim" / "attribution"


@dataclass(frozen=True)
class Settings(StudySettings):
    tuning_seed: int = 1000
    """The crowds that settings are compared on."""
    num_runs: int = 50


def weighted_groups(standing: Standing, history: Sequence[Round], num_rounds: int, *, sharpness: float) -> Standing:
    """Tried and left: no measuring, no merged candidate; users weigh exp(sharpness beta / std) in their groups."""
    measured = attributed(replace(standing, merged_weights=None), history, num_rounds, measured_share=(1.0, 1.0))
    beta = measured.points - 1
    spread = np.maximum(beta.std(axis=1, keepdims=True), np.finfo(float).tiny)
    return replace(measured, group_weights=np.exp(sharpness * (beta - beta.max(axis=1, keepdims=True)) / spread))


NOISE = 0.0404  # of four times fewer samples than experiment 1 has


def candidates() -> list[tuple[str, str, Scoring]]:
    """(family, setting, scoring): everything that is compared. Families that say so are compared under noise."""
    found: list[tuple[str, str, Scoring]] = [
        ("marginal", "", marginal),
        ("ranked", "", ranked),
        (DEFAULT, "", attributed),
    ]
    found += [("pay and steering", name, SCORINGS[name]) for name in SCORINGS if "_" in name]
    for eta in (0.25, 0.5, 1.0, 2.0):
        found.append(("weights inside groups: sharpness", f"{eta:g}", partial(weighted_groups, sharpness=eta)))
    for share in (0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9):
        scoring = partial(attributed, measured_share=(share, share))
        found.append(("measure, then merge: share measured", f"{share:g}", scoring))
    for family in ("merge: sharpness", f"merge: sharpness, noise {NOISE}"):
        for sharpness in (4.0, 16.0, 48.0, 200.0, 1000.0):
            found.append((family, f"{sharpness:g}", partial(attributed, sharpness=sharpness)))
    for leaning in (0.0, 0.5, 1.0, 2.0, 4.0):
        scoring = partial(attributed, leaning=leaning)
        found += [(family, f"{leaning:g}", scoring) for family in ("groups lean", f"groups lean, noise {NOISE}")]
    return found


@dataclass(frozen=True)
class Trial:
    """One scoring under one protocol on the crowds of one seed."""

    family: str
    setting: str
    scoring: Scoring
    grouping: str
    metric: str
    num_users: int
    num_groups: int
    seed: int

    @property
    def crowds(self) -> tuple[int, int, str]:
        """Trials with the same have the same crowds and Shapley values."""
        return self.seed, self.num_users, self.metric

    @property
    def noise(self) -> float:
        return NOISE if "noise" in self.family else 0.0


Truth = tuple[Crowd, np.ndarray, np.ndarray]
"""Crowds, their users' Shapley values (R, n), the distances to the hull (R,)."""


def truth_of(preferences: Preferences, num_runs: int, crowds: tuple[int, int, str]) -> Truth:
    seed, users, metric = crowds
    crowd = draw_crowds(preferences, users, np.random.SeedSequence(seed, spawn_key=(users,)).spawn(num_runs))
    pairs = list(zip(crowd.users, crowd.experts, strict=True))
    shapley = [shapley_values(*pair, METRICS[metric], precision=0.02).values for pair in pairs]
    return crowd, np.array(shapley), np.array([hull_distance(*pair) for pair in pairs])


def perform(case: tuple[Truth, Trial]) -> dict[str, object]:
    (crowd, shapley, hull), trial = case
    rng, errors = (np.random.default_rng([trial.seed, trial.num_groups, *more]) for more in ([], [1]))
    rules, metric = Rules(num_groups=trial.num_groups), METRICS[trial.metric]
    functions = GROUPINGS[trial.grouping], metric, trial.scoring
    found = simulate(crowd, *functions, rules, rng, noise=trial.noise, errors=errors)
    regret = (found.distances[:, -1] - hull) / (found.distances[:, 0] - hull)
    row: dict[str, object] = {name: value for name, value in vars(trial).items() if name != "scoring"}
    for name, values in (("pearson", pearson(found.points, shapley)), ("regret", regret)):
        row[name], row[f"{name}_low"], row[f"{name}_high"] = map(float, mean_interval(values))
    return row


def agreement_and_regret(tried: pd.DataFrame) -> Figure:
    """Everything that was tried: agreement above, regret below; a column a family of settings, a mark a grouping."""
    alone = tried["setting"] == ""
    tried = tried.assign(
        family=tried["family"].mask(alone, ALONE), setting=tried["setting"].where(~alone, tried["family"])
    )
    groupings = list(tried["grouping"].unique())
    families = {name: list(rows["setting"].unique()) for name, rows in tried.groupby("family", sort=False)}
    default = tried[tried["setting"] == DEFAULT].set_index("grouping")
    noisy = tried[tried["family"].str.contains("noise") & tried["setting"].isin([f"{LEANING:g}", f"{SHARPNESS:g}"])]
    noisy = noisy.drop_duplicates("grouping").set_index("grouping")  # the default, under noise
    figure, axes = new_figure(
        2, len(families), width=13, height=5.6, sharey="row", width_ratios=[len(names) for names in families.values()]
    )
    for row, measure in enumerate(("pearson", "regret")):
        for ax, (family, settings) in zip(axes[row], families.items(), strict=True):
            for i, grouping in enumerate(groupings):
                part = tried[(tried["family"] == family) & (tried["grouping"] == grouping)]
                y = part[measure]
                line = (noisy if "noise" in family else default).loc[grouping, measure]
                ax.axhline(line, color=COLOURS[i % 7], linewidth=0.8, linestyle=LINES[i % 4])
                ax.errorbar(
                    np.arange(len(settings)) + 0.22 * (i - (len(groupings) - 1) / 2),
                    y,
                    yerr=[y - part[f"{measure}_low"], part[f"{measure}_high"] - y],
                    fmt=MARKERS[i % 7],
                    color=COLOURS[i % 7],
                    ms=4,
                    elinewidth=0.8,
                    label=f"{grouping} (line: the default)",
                )
            ax.set_xlim(-0.6, len(settings) - 0.4)
            slanted: dict[str, Any] = {"rotation": 35, "ha": "right"} if max(map(len, settings)) > 4 else {}
            ax.set_xticks(range(len(settings)), settings if row else [], fontsize=7, **slanted)
            if row:
                ax.set_xlabel(textwrap.fill(family, 7 + 3 * len(settings)))
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_yticks([0.02, 0.05, 0.1, 0.2, 0.4], ["0.02", "0.05", "0.1", "0.2", "0.4"])
    axes[1, 0].set_yticks([], minor=True)
    axes[0, 0].set_ylabel("Pearson r,\npoints and Shapley values")
    axes[1, 0].set_ylabel("normalised regret\n(log scale)")
    figure.suptitle("l2, 75 users, 4 groups: means over runs with 95 % intervals", fontsize=9)
    legend_below(figure, axes[0, 0], 3)
    return figure


def main(settings: Settings) -> None:
    folder = settings.output_dir or RESULTS
    preferences = read_movielens(DATA / "ratings.csv.gz", DATA / "movies.csv.gz")
    trials = [
        Trial(*candidate, grouping, "l2", 75, 4, settings.tuning_seed)
        for candidate in candidates()
        for grouping in GROUPINGS
    ]
    fresh = [("marginal", marginal), ("ranked", ranked), ("attributed", attributed)]
    settings_shown = [(75, 4, ("l2",)), (100, 5, tuple(METRICS)), (100, 2, tuple(METRICS))]
    reported = [
        Trial(name, "", scoring, grouping, metric, users, groups, settings.seed)
        for users, groups, metrics in settings_shown
        for metric in metrics
        for grouping in GROUPINGS
        for name, scoring in fresh
    ]
    print(
        f"{len(trials)} trials on tuning crowds, {len(reported)} on fresh ones, {settings.num_runs} runs each",
        flush=True,
    )
    everything = [*trials, *reported]
    crowds = list(dict.fromkeys(trial.crowds for trial in everything))
    found = parallel_map(
        partial(truth_of, preferences, settings.num_runs), crowds, jobs=settings.jobs, description="Shapley values"
    )
    truths = dict(zip(crowds, found, strict=True))
    cases = [(truths[trial.crowds], trial) for trial in everything]
    rows = list(parallel_map(perform, cases, jobs=settings.jobs, description="trials"))
    tried, shown = pd.DataFrame(rows[: len(trials)]), pd.DataFrame(rows[len(trials) :])
    for name, frame in (("tried", tried), ("reported", shown)):
        write_table(frame, folder, name, "%.6g")
    save_figure(agreement_and_regret(tried), folder, "agreement_against_regret")
    print(f"results: {folder}")


if __name__ == "__main__":
    sys.exit(run_script("user_grouping_evaluation_sim.study_attribution", Settings, {"default": {}}, __doc__))
