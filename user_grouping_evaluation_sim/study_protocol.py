"""Which truth do points follow: every scoring against Shapley values of the static and of the protocol game.

l2, random grouping, 4 groups, on crowds that nothing else is drawn or chosen on. 8 users: all coalitions are played;
75: a sample. Beside the scorings stand what a coordinator can make of attributed points: their level restored by n + 1
audits (payout.py), and either as a convex function, exp(estimate / spread). In the protocol game a coalition comes as
near as its best mixture, to which few users add most of what they all would to a mean.

Run: python user_grouping_evaluation_sim/study_protocol.py
"""

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiment.command_line import StudySettings, run_script
from experiment.figures import COLOURS, MARKERS, legend_below, new_figure, save_figure
from experiment.files import ROOT
from experiment.parallel import parallel_map
from experiment.statistics import correlation_interval, mean_interval
from experiment.tables import write_table
from user_grouping_evaluation_sim.competition import Rules
from user_grouping_evaluation_sim.grouping import GROUPINGS
from user_grouping_evaluation_sim.metrics import l2
from user_grouping_evaluation_sim.payout import levelled
from user_grouping_evaluation_sim.preferences import Preferences, draw_crowds, read_movielens
from user_grouping_evaluation_sim.protocol_game import EVALUATIONS, ProtocolGame, protocol_shapley_values
from user_grouping_evaluation_sim.scoring import SCORINGS
from user_grouping_evaluation_sim.settings import DATA
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.tables import pearson, spearman
from user_grouping_evaluation_sim.vector_world import DELTA, simulate

RESULTS = ROOT / "results" / "user_grouping_evaluation_sim" / "protocol"
# With random grouping points decide nothing: scorings that steer alike reach the same, and share a game.
STEERED_AS = dict.fromkeys(("attributed", "ranked_merged", "convex"), "marginal_merged")
STATIC, PROTOCOL = "static", "protocol"
MEASURES = {"pearson": pearson, "spearman": spearman}


@dataclass(frozen=True)
class Settings(StudySettings):
    seed: int = 5000
    runs_of_8: int = 6
    runs_of_75: int = 4
    scorings_of_75: tuple[str, ...] = tuple(name for name in SCORINGS if name != "attributed_squared")
    """Of the others no game of 75 is played; one that fits takes minutes."""
    evaluations: int = 3000
    """Coalitions that are played for one crowd of 75. Most users' values lie close together: what an estimate's errors
    take from a correlation (see `reliability` in the table), they take several times from one of ranks."""


@dataclass(frozen=True)
class Trial:
    """One steering's game of one crowd. scorings: that share it."""

    num_users: int
    run: int
    scorings: tuple[str, ...]


def trials_of(settings: Settings) -> list[Trial]:
    found = []
    for users, runs, scorings in (
        (8, settings.runs_of_8, tuple(SCORINGS)),
        (75, settings.runs_of_75, settings.scorings_of_75),
    ):
        for run in range(runs):
            for steering in dict.fromkeys(STEERED_AS.get(name, name) for name in scorings):
                alike = tuple(name for name in scorings if STEERED_AS.get(name, name) == steering)
                found.append(Trial(users, run, alike))
    return found


def perform(preferences: Preferences, settings: Settings, trial: Trial) -> list[dict[str, object]]:
    """Rows of num_users, run, scoring, of, against, measure, value; and how exactly the protocol's values are known."""
    users, run = trial.num_users, trial.run
    crowd = draw_crowds(preferences, users, [np.random.SeedSequence(settings.seed, spawn_key=(users, run))])
    pair = crowd.users[0], crowd.experts[0]
    rules, grouping = Rules(), GROUPINGS["random"]
    steering = STEERED_AS.get(trial.scorings[0], trial.scorings[0])
    stream = np.random.SeedSequence(settings.seed, spawn_key=(users, run, list(SCORINGS).index(steering)))
    game = ProtocolGame(*pair, crowd.models[0], grouping, l2, SCORINGS[steering], rules, stream)
    budget = settings.evaluations if users > 8 else EVALUATIONS
    played = protocol_shapley_values(game, max_evaluations=budget, seed=stream)
    truths = {STATIC: shapley_values(*pair, l2).values, PROTOCOL: played.values}
    key: dict[str, object] = {"num_users": users, "run": run}
    rows = []
    for scoring in trial.scorings:
        rng = np.random.default_rng([settings.seed, users, run])
        points = simulate(crowd, grouping, l2, SCORINGS[scoring], rules, rng).points[0]
        estimates = {scoring: points} | (made_of(points, *pair) if scoring == "attributed" else {})
        compared = [(name, "points", game, a, truth) for name, a in estimates.items() for game, truth in truths.items()]
        compared.append((scoring, STATIC, PROTOCOL, truths[STATIC], truths[PROTOCOL]))
        for what_is_paid, of, against, a, b in compared:
            for name, measure in MEASURES.items():
                what = {"scoring": what_is_paid, "of": of, "against": against, "measure": name}
                rows.append(key | what | {"value": float(measure(a, b))})
        reliability = 1 - (played.standard_errors**2).mean() / played.values.var()
        what = {"scoring": scoring, "of": PROTOCOL, "against": PROTOCOL, "measure": "reliability"}
        rows.append(key | what | {"value": float(reliability)})
    return rows


def made_of(points: np.ndarray, users: np.ndarray, expert: np.ndarray) -> dict[str, np.ndarray]:
    """Estimates (n,) by name, of attributed points (n,) and audits of l2."""
    nobody = l2(np.zeros(len(expert)), expert)
    alone, everybody = l2(users, expert) - nobody, l2(users.mean(axis=0), expert) - nobody
    level = levelled(points - 1, alone, np.asarray(everybody), DELTA)
    return {"levelled": level, "levelled_exp": np.exp((level - level.mean()) / level.std())}


def agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over crowds with 95 % intervals: of correlations through Fisher's z, of reliabilities Student's up to 1."""
    key = ["num_users", "scoring", "of", "against", "measure"]
    found = []
    for names, group in rows.groupby(key, sort=False):
        interval = correlation_interval if names[-1] in MEASURES else mean_interval
        mean, low, high = np.minimum(interval(group["value"].to_numpy()), 1.0)
        found.append(dict(zip(key, names, strict=True)) | {"runs": len(group), "mean": mean, "low": low, "high": high})
    return pd.DataFrame(found)


def both_games(table: pd.DataFrame) -> Figure:
    """A row a measure, a column a crowd size: each scoring's points against both games, and static against protocol."""
    sizes, scorings = list(table["num_users"].unique()), list(table["scoring"].unique())
    shown = [("points", STATIC), ("points", PROTOCOL), (STATIC, PROTOCOL)]
    labels = ["points, static game", "points, protocol game", "static game, protocol game"]
    figure, axes = new_figure(
        len(MEASURES), len(sizes), width=2 + 3.2 * len(sizes), height=5.4, sharex=True, sharey=True
    )
    for row, measure in enumerate(MEASURES):
        for column, users in enumerate(sizes):
            ax = axes[row, column]
            for i, (of, against) in enumerate(shown):
                part = table[(table["num_users"] == users) & (table["measure"] == measure)]
                part = part[(part["of"] == of) & (part["against"] == against)]
                x = part["scoring"].map(scorings.index) + 0.22 * (i - 1)
                errors = [part["mean"] - part["low"], part["high"] - part["mean"]]
                style = {"color": COLOURS[i], "fmt": MARKERS[i], "ms": 4, "elinewidth": 0.8, "label": labels[i]}
                ax.errorbar(x, part["mean"], yerr=errors, **style)
            ax.set_xticks(range(len(scorings)), scorings, rotation=40, ha="right")
            if row == 0:
                runs = table[table["num_users"] == users]["runs"].iloc[0]
                ax.set_title(f"{users} users, {runs} crowds")
        axes[row, 0].set_ylabel(f"{measure.capitalize()} correlation")
    axes[0, 0].set_ylim(0, 1.02)
    figure.suptitle("l2, random grouping, 4 groups: means over crowds with 95 % intervals", fontsize=9)
    legend_below(figure, axes[0, 0], 3)
    return figure


def main(settings: Settings) -> None:
    folder = settings.output_dir or RESULTS
    preferences = read_movielens(DATA / "ratings.csv.gz", DATA / "movies.csv.gz")
    trials = trials_of(settings)
    print(f"{len(trials)} games", flush=True)
    work = partial(perform, preferences, settings)
    rows = [row for part in parallel_map(work, trials, jobs=settings.jobs, description="games") for row in part]
    by_crowd = pd.DataFrame(rows)
    table = agreement(by_crowd)
    for name, each in (("crowds", by_crowd), ("agreement", table)):
        write_table(each, folder, name, "%.6g")
    save_figure(both_games(table), folder, "agreement")
    print(f"results: {folder}")


if __name__ == "__main__":
    sys.exit(run_script("user_grouping_evaluation_sim.study_protocol", Settings, {"default": {}}, __doc__))
