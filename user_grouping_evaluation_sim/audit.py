"""The audit of a scoring: every strategy of incentives.py played against it, beside its honest twin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiment.run_folder import Arrays
from experiment.statistics import mean_interval
from user_grouping_evaluation_sim.competition import Rules
from user_grouping_evaluation_sim.incentives import STRATEGIES, Play, Scene, chosen_users, ratio_interval
from user_grouping_evaluation_sim.payout import misallocation
from user_grouping_evaluation_sim.preferences import Crowd
from user_grouping_evaluation_sim.scoring import PARTS
from user_grouping_evaluation_sim.settings import Settings, functions_of, metric_of, stream
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.tables import COMBINATION, pearson
from user_grouping_evaluation_sim.vector_world import simulate

HONEST = "honest"
RUNS = 12  # of the audit that every run has
PRECISION = 0.05  # of the Shapley values with a strategist in the crowd


@dataclass(frozen=True)
class Audit:
    """Task: a strategy against a combination; without one, the Shapley values of the crowd with its strategists."""

    strategy: str
    metric: str
    grouping: str = ""
    scoring: str = ""

    @property
    def name(self) -> str:
        parts = (self.strategy, self.metric, self.grouping, self.scoring)
        return "audit-" + "-".join(part.replace(":", ".").replace("/", ".").replace(" ", "_") for part in parts)


def audits_of(settings: Settings) -> list[Audit]:
    """Of the first grouping and metric; with --audit of all. Strategists are compared by the static game's values."""
    if settings.shapley == "none" or settings.reference == "protocol":
        return []
    groupings, metrics = (names if settings.audit else names[:1] for names in (settings.grouping, settings.metric))
    plays = [
        Audit(strategy, metric, grouping, scoring)
        for metric in metrics
        for grouping in groupings
        for scoring in settings.scoring
        for strategy in STRATEGIES
    ]
    plays += [part for part in ablations_of(settings) if part not in plays]
    return plays + [Audit(strategy, metric) for metric in metrics for strategy in STRATEGIES if strategy != HONEST]


def ablations_of(settings: Settings) -> list[Audit]:
    """Every pair of a pay and a steering among honest users, by the first grouping and metric."""
    return [Audit(HONEST, settings.metric[0], settings.grouping[0], scoring) for scoring in PARTS]


def runs_of(settings: Settings) -> int:
    return settings.num_runs if settings.audit else min(settings.num_runs, RUNS)


def played(settings: Settings, strategy: str, crowd: Crowd, shapley: np.ndarray) -> Play:
    """shapley: (R, n), of the honest crowd."""
    function, whose = STRATEGIES[strategy]
    rng = np.random.default_rng(stream(settings, f"strategy {strategy}", 0))
    chosen = chosen_users(whose, shapley, rng)
    return function(Scene(crowd.users, chosen, shapley.argmax(axis=1), settings.num_rounds, rng))


def perform_audit(settings: Settings, crowd: Crowd, shapley: Mapping[str, np.ndarray], task: Audit) -> Arrays:
    """pay: (R,), of the strategists, or of honest users (R, n). accounts: (R, j), the strategists'. distance: (R, 2),
    of the first and the last model from the expert. points: (R, n), of the users before any new accounts. Or shapley:
    (R,), of the strategists. Who is no strategist is always there, whatever --absent says."""
    honest = shapley[task.metric]
    play = played(settings, task.strategy, crowd, honest)
    rows = np.arange(len(honest))[:, None]
    if not task.scoring:
        if not play.stays:
            return {"shapley": np.full(len(honest), np.nan)}
        users, metric = play.conduct.vectors(0), metric_of(task.metric)
        values = [
            shapley_values(
                own, expert, metric, precision=PRECISION, seed=stream(settings, f"audit shapley {task.name}", run)
            ).values
            for run, (own, expert) in enumerate(zip(users, crowd.experts, strict=True))
        ]
        return {"shapley": np.array(values)[rows, play.accounts].sum(axis=1)}
    name = f"audit {task.grouping} {task.metric} {task.scoring}"  # the same for all strategies: they are paired
    found = simulate(
        crowd,
        *functions_of(task.grouping, task.metric, task.scoring),
        Rules(settings.num_groups, settings.num_rounds, settings.error_probability),
        np.random.default_rng(stream(settings, name, 0)),
        settings.delta,
        noise=settings.evaluation_noise,
        errors=np.random.default_rng(stream(settings, f"{name} evaluations", 0)),
        conduct=play.conduct,
    )
    pay, users = found.pay.astype(float), honest.shape[1]
    return {
        "pay": pay[:, :users] if task.strategy == HONEST else pay[rows, play.accounts].sum(axis=1),
        "accounts": play.accounts,
        "distance": found.distances[:, [0, -1]],
        "points": found.points[:, :users],
    }


def ablation_table(
    tasks: Sequence[Audit], done: Mapping[str, Arrays], shapley: Mapping[str, np.ndarray], hull: np.ndarray
) -> pd.DataFrame:
    """ablation.csv: what a pay and a steering come to together, with 95 % intervals over crowds."""
    rows = []
    for task in tasks:
        own, values = done[task.name], shapley[task.metric]
        start, final = own["distance"].T
        measures = {
            "pearson": pearson(own["points"], values),
            "regret": (final - hull) / (start - hull),
            "misallocation": misallocation(own["pay"], values),
        }
        row: dict[str, object] = dict(zip(("pay", "steering"), PARTS[task.scoring], strict=True))
        row |= {"grouping": task.grouping, "metric": task.metric, "scoring": task.scoring, "runs": len(values)}
        for name, numbers in measures.items():
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, mean_interval(numbers)), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def audit_table(
    tasks: Sequence[Audit],
    scorings: Sequence[str],
    done: Mapping[str, Arrays],
    shapley: Mapping[str, np.ndarray],
    hull: np.ndarray,
) -> pd.DataFrame:
    """audit.csv, of these scorings.

    pay_vs_twin: the strategists' pay over that of the same users in the honest run, with its interval;
    shapley_vs_twin: the same of Shapley values, of strategies that stay the same. regret: the crowd's. pearson: of the
    other users' points with their Shapley values in the honest crowd.
    """
    rows: list[list[object]] = []
    for task in tasks:
        if task.scoring not in scorings:
            continue
        own = done[task.name]
        twin = done[Audit(HONEST, task.metric, task.grouping, task.scoring).name]["pay"]
        honest = shapley[task.metric]
        runs, users = honest.shape
        held = np.zeros((runs, users), dtype=bool)
        accounts = own["accounts"]
        before = accounts < users
        held[np.nonzero(before)[0], accounts[before]] = True
        twins = np.where(held, twin, 0).sum(axis=1)
        ours = twins if task.strategy == HONEST else own["pay"]
        by_shapley = np.where(held, honest, 0).sum(axis=1)
        theirs = by_shapley if task.strategy == HONEST else done[Audit(task.strategy, task.metric).name]["shapley"]
        start, final = own["distance"].T
        regret = mean_interval((final - hull) / (start - hull))[0]
        points, values = (np.ma.masked_array(each, held) for each in (own["points"], honest))
        r = [pearson(p.compressed(), v.compressed()) for p, v in zip(points, values, strict=True)]
        rows.append(
            [
                task.strategy,
                STRATEGIES[task.strategy][1],
                task.grouping,
                task.metric,
                task.scoring,
                *ratio_interval(ours, twins),
                ratio_interval(theirs, by_shapley)[0],
                float(regret),
                float(mean_interval(np.array(r))[0]),
            ]
        )
    measures = ["pay_vs_twin", "low", "high", "shapley_vs_twin", "regret", "pearson"]
    return pd.DataFrame(rows, columns=["strategy", "users", *COMBINATION, *measures])
