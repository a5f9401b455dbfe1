"""Can one pay by these points? Noise, what pays and what steers, intervals, copies, and which strategies survive.

All on crowds of --seed, which no setting was chosen on. Run: python user_grouping_evaluation_sim/study_pay.py
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
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
from user_grouping_evaluation_sim import incentives, payout
from user_grouping_evaluation_sim.competition import Rules
from user_grouping_evaluation_sim.grouping import GROUPINGS
from user_grouping_evaluation_sim.hull import hull_distance
from user_grouping_evaluation_sim.metrics import METRICS
from user_grouping_evaluation_sim.preferences import Crowd, draw_crowds, read_movielens
from user_grouping_evaluation_sim.scoring import SCORINGS
from user_grouping_evaluation_sim.settings import DATA
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.tables import pearson, spearman
from user_grouping_evaluation_sim.vector_world import Conduct, Simulated, always, simulate

RESULTS = ROOT / "results" / "user_grouping_evaluation_sim" / "pay"
NOISE = (0.0, 0.0101, 0.0202, 0.0404, 0.0808)
USERS, GROUPS = 75, 4
REPEATS = 12  # of a crowd, for the intervals' coverage
TOURNAMENT = ("honest", "zero vector", "mirror", "exaggerate", "farthest corner", "copy of a random user")
GENERATIONS, SETTLED, MUTATION = 30, 10, 0.01
TOLERANCES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # between users, in rating points
MOVED = (0.5, 1.0, 2.0, 4.0)  # how far a sybil's accounts are from one's own vector, against two of the tolerances


@dataclass(frozen=True)
class Settings(StudySettings):
    seed: int = 8000
    num_runs: int = 100


@dataclass(frozen=True)
class Truth:
    """Crowds with the Shapley values (R, n) of the static game by metric, and the distance to the hull (R,)."""

    crowd: Crowd
    shapley: Mapping[str, np.ndarray]
    hull: np.ndarray


def truth_of(settings: Settings) -> Truth:
    preferences = read_movielens(DATA / "ratings.csv.gz", DATA / "movies.csv.gz")
    crowd = draw_crowds(preferences, USERS, np.random.SeedSequence(settings.seed).spawn(settings.num_runs))
    pairs = list(zip(crowd.users, crowd.experts, strict=True))
    shapley = {
        name: np.array([shapley_values(*pair, METRICS[name], precision=0.02).values for pair in pairs])
        for name in ("l2", "l1")
    }
    return Truth(crowd, shapley, np.array([hull_distance(*pair) for pair in pairs]))


def play(
    truth: Truth,
    grouping: str,
    metric: str,
    scoring: str,
    noise: float,
    seed: tuple[int, ...],
    conduct: Conduct | None = None,
) -> Simulated:
    functions = GROUPINGS[grouping], METRICS[metric], SCORINGS[scoring]
    rng, errors = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    return simulate(truth.crowd, *functions, Rules(GROUPS), rng, noise=noise, errors=errors, conduct=conduct)


def measured(name: str, values: np.ndarray) -> dict[str, float]:
    mean, low, high = (float(end) for end in mean_interval(values))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def under_noise(truth: Truth, seed: int, case: tuple[str, str, str, float]) -> dict[str, Any]:
    """A row of noise.csv. gap: r less that of marginal points in the same runs. alone: what each user is worth alone,
    by one evaluation each, in place of points, and as what is paid."""
    grouping, metric, scoring, noise = case
    found = play(truth, grouping, metric, scoring, noise, (seed, 0))
    marginal = play(truth, grouping, metric, "marginal", noise, (seed, 0))
    shapley, way = truth.shapley[metric], found.distances[:, 0] - truth.hull
    r, theirs = pearson(found.points, shapley), pearson(marginal.points, shapley)
    return {
        **dict(zip(("grouping", "metric", "scoring", "noise"), case, strict=True)),
        **measured("pearson", r),
        **measured("spearman", spearman(found.points, shapley)),
        **measured("gap", r - theirs),
        **measured("regret", (found.distances[:, -1] - truth.hull) / way),
        **measured("misallocation", payout.misallocation(found.pay, shapley)),
        **measured("alone_pearson", pearson(found.alone, shapley)),
        **measured("alone_misallocation", payout.misallocation(np.maximum(found.alone, 0), shapley)),
        "equal_misallocation": float(payout.misallocation(np.ones_like(shapley), shapley).mean()),
        "budget_ratio": float((found.pay.sum(axis=1) / np.maximum(found.budget, 1)).mean()),
    }


def coverage(truth: Truth, seed: int, noise: float) -> dict[str, Any]:
    """How often a run's 95 % interval holds the mean of the crowd's other repeats; that mean's error is allowed for."""
    repeats = [play(truth, "random", "l2", "attributed", noise, (seed, 1, i)) for i in range(REPEATS)]
    points, errors = np.array([r.points for r in repeats]), np.array([r.points_errors for r in repeats])
    others = (points.sum(axis=0) - points) / (REPEATS - 1)
    allowed = 1.96 * np.sqrt(errors**2 + (errors**2).mean(axis=0) / (REPEATS - 1))
    return {"noise": noise, **measured("covered", (np.abs(points - others) <= allowed).mean(axis=(0, 2)))}


def tournament(truth: Truth, seed: int, scheme: str) -> pd.DataFrame:
    """Users choose strategies by what paid before (replicator dynamics with mutation): shares by generation and run."""
    users = truth.crowd.users
    runs, n, _ = users.shape
    everybody = np.broadcast_to(np.arange(n), (runs, n))
    rng = np.random.default_rng((seed, 2))
    best = truth.shapley["l2"].argmax(axis=1)
    scene = incentives.Scene(users, everybody, best, Rules().num_rounds, rng)
    offered = np.stack([incentives.STRATEGIES[name][0](scene).conduct.vectors(0) for name in TOURNAMENT])
    shares = np.full((runs, len(TOURNAMENT)), 1 / len(TOURNAMENT))
    frames = []
    for generation in range(GENERATIONS):
        ladder = shares.cumsum(axis=1)
        picked = np.minimum((rng.random((runs, n, 1)) > ladder[:, None]).sum(axis=2), len(TOURNAMENT) - 1)
        contributed = np.take_along_axis(offered, picked[None, :, :, None], axis=0)[0]
        if scheme == "equal pay":
            pay = np.ones((runs, n))
        else:
            conduct = always(contributed)
            pay = play(truth, "random", "l2", scheme, 0.0, (seed, 3, generation), conduct).pay.astype(float)
        mean = np.maximum(pay.mean(axis=1), 1e-12)
        for s in range(len(TOURNAMENT)):
            used = picked == s
            paid = np.where(used, pay, 0).sum(axis=1) / np.maximum(used.sum(axis=1), 1)
            shares[:, s] *= np.where(used.any(axis=1), paid / mean, 1.0)
        shares /= shares.sum(axis=1, keepdims=True)
        shares = (1 - MUTATION) * shares + MUTATION / len(TOURNAMENT)
        frames.append(
            pd.DataFrame(
                {
                    "scheme": scheme,
                    "generation": generation + 1,
                    "run": np.repeat(np.arange(runs), len(TOURNAMENT)),
                    "strategy": list(TOURNAMENT) * runs,
                    "share": shares.ravel(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def merging(truth: Truth, seed: int, case: tuple[float, float]) -> dict[str, Any]:
    """What a quotient by contributions within a tolerance does to honest crowds, and to a sybil whose accounts each lie
    a distance from one's own vector, in random directions. case: (tolerance, distance), in rating points. found: share
    of the further accounts that are taken for their owner.

    The competition and pay are of the people that are told apart; a person's accounts share it evenly.
    """
    tolerance, distance = case
    crowd, shapley = truth.crowd, truth.shapley["l2"]
    runs, n, dimensions = crowd.users.shape
    merged, r, gains, found = np.zeros(runs), np.zeros((2, runs)), np.zeros(runs), np.zeros(runs)
    for run in range(runs):
        own = Truth(Crowd(*(np.asarray(part)[run : run + 1] for part in vars(crowd).values())), {}, truth.hull)
        firsts = incentives.quotient(crowd.users[run], tolerance)
        merged[run] = (firsts != np.arange(n)).mean()
        honest = _paid_by_person(own, crowd.users[run], firsts, (seed, 4, run))
        r[0, run] = pearson(honest, shapley[run])
        apart = _paid_by_person(own, crowd.users[run], np.arange(n), (seed, 4, run))
        r[1, run] = pearson(apart, shapley[run])
        ways = np.random.default_rng((seed, 5, run)).standard_normal((incentives.ACCOUNTS - 1, dimensions))
        moved = distance * ways / np.linalg.norm(ways, axis=1, keepdims=True)
        copies = np.concatenate([crowd.users[run], crowd.users[run][0] + moved])
        told = incentives.quotient(copies, tolerance)
        paid = _paid_by_person(own, copies, told, (seed, 4, run))
        accounts = [0, *range(n, len(copies))]
        found[run] = (told[n:] == told[0]).mean()
        gains[run] = paid[accounts].sum() / honest[0] if honest[0] > 0 else np.nan
    return {
        "tolerance": tolerance,
        "distance": distance,
        **measured("merged", merged),
        **measured("pearson", r[0]),
        **measured("lost", r[1] - r[0]),
        **measured("found", found),
        **measured("sybil_gain", gains),
    }


def _paid_by_person(truth: Truth, users: np.ndarray, first: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """(accounts,): pay of one crowd (accounts, d) whose people are told apart by `first`."""
    people = np.unique(first)
    conduct = always(users[people][None])
    pay = np.zeros(len(users))
    pay[people] = play(truth, "random", "l2", "attributed", 0.0, seed, conduct).pay[0]
    return incentives.split_by(first, pay)


def noise_figure(table: pd.DataFrame) -> Figure:
    """r and regret against noise: a column a metric, a colour and line a scoring, random grouping."""
    table = table[table["grouping"] == "random"]
    metrics = list(table["metric"].unique())
    figure, axes = new_figure(2, len(metrics), width=7.4, height=5.0, sharex=True, sharey="row")
    for column, metric in enumerate(metrics):
        for row, measure in enumerate(("pearson", "regret")):
            for number, (scoring, own) in enumerate(table[table["metric"] == metric].groupby("scoring", sort=False)):
                error = [own[measure] - own[f"{measure}_low"], own[f"{measure}_high"] - own[measure]]
                style: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 4}
                label = f"{scoring} points"
                axes[row, column].errorbar(
                    own["noise"], own[measure], yerr=error, linestyle=LINES[number], label=label, **style
                )
        axes[0, column].set_title(f"{metric}, random grouping", fontsize=9)
        axes[1, column].set_xlabel(f"error of an evaluation (standard deviation, {metric})")
    axes[0, 0].set_ylabel("Pearson r,\npoints and Shapley values")
    axes[1, 0].set_ylabel("normalised regret")
    legend_below(figure, axes[0, 0], 3)
    return figure


def tournament_figure(table: pd.DataFrame) -> Figure:
    """The honest share by generation, a line a scheme, with 95 % intervals over crowds."""
    figure, axes = new_figure(1, 1, width=5.4, height=3.4)
    honest = table[table["strategy"] == incentives.honest.__name__]
    for number, (scheme, own) in enumerate(honest.groupby("scheme", sort=False)):
        style: dict[str, Any] = {"color": COLOURS[number], "linestyle": LINES[number % len(LINES)]}
        axes[0, 0].plot(own["generation"], own["share"], marker=MARKERS[number], ms=3, label=scheme, **style)
        band = own["share_low"], own["share_high"]
        axes[0, 0].fill_between(own["generation"], *band, color=COLOURS[number], alpha=0.15, linewidth=0)
    axes[0, 0].axhline(1 / len(TOURNAMENT), color="black", linewidth=0.6, linestyle=":", label="at the start")
    axes[0, 0].set_ylim(0, None)
    axes[0, 0].set_xlabel("generation")
    axes[0, 0].set_ylabel("share of users who are honest")
    legend_below(figure, axes[0, 0], 5)
    return figure


def shares_over_crowds(table: pd.DataFrame, *key: str) -> pd.DataFrame:
    """Mean share with its interval over crowds: tournament.csv by generation, equilibrium.csv over the last SETTLED."""
    by_run = table.groupby([*key, "run"], sort=False)["share"].mean()
    rows = [
        {**dict(zip(key, values, strict=True)), **measured("share", own.to_numpy())}
        for values, own in by_run.groupby([*key], sort=False)
    ]
    return pd.DataFrame(rows)


def main(settings: Settings) -> None:
    folder = settings.output_dir or RESULTS
    truth, seed = truth_of(settings), settings.seed
    print(f"{settings.num_runs} crowds of {USERS} users in {GROUPS} groups, fresh ones", flush=True)

    def mapped(function: Callable[..., Any], cases: list[Any], description: str) -> list[Any]:
        work = partial(function, truth, seed)
        return list(parallel_map(work, cases, jobs=settings.jobs, description=description))

    noisy = [*product(GROUPINGS, ("l2", "l1"), ("marginal", "ranked", "attributed"), NOISE)]
    apart = [("random", "l2", scoring, noise) for scoring in SCORINGS for noise in (0.0, 0.0202)]
    copies = [*product(TOLERANCES, (0.0,)), *product((0.75, 1.5), MOVED)]
    schemes = ["marginal", "ranked", "attributed", "equal pay"]  # as in other figures, each in its colour
    games = pd.concat(mapped(tournament, schemes, "tournament"), ignore_index=True)
    late = games[games["generation"] > GENERATIONS - SETTLED]
    tables = {
        "noise": pd.DataFrame(mapped(under_noise, noisy, "noise")),
        "pay_and_steering": pd.DataFrame(mapped(under_noise, apart, "pay and steering")),
        "coverage": pd.DataFrame(mapped(coverage, [0.0, 0.0202, 0.0404], "intervals")),
        "tournament": shares_over_crowds(games, "scheme", "strategy", "generation"),
        "equilibrium": shares_over_crowds(late, "scheme", "strategy"),
        "quotient": pd.DataFrame(mapped(merging, copies, "copies")),
    }
    for name, table in tables.items():
        write_table(table, folder, name, "%.6g")
    save_figure(noise_figure(tables["noise"]), folder, "noise")
    save_figure(tournament_figure(tables["tournament"]), folder, "tournament")
    print(f"results: {folder}")


if __name__ == "__main__":
    sys.exit(run_script("user_grouping_evaluation_sim.study_pay", Settings, {"default": {}}, __doc__))
