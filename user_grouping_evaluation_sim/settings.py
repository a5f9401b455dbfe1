"""The options of run.py, its presets, and what they must be."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiment.command_line import CommonSettings, check_common, check_name, check_range, named_function
from experiment.errors import InputError
from experiment.files import ROOT
from user_grouping_evaluation_sim.grouping import GROUPINGS, Grouping
from user_grouping_evaluation_sim.metrics import METRICS, Metric
from user_grouping_evaluation_sim.scoring import SCORINGS, Scoring
from user_grouping_evaluation_sim.shapley import METHODS, MOST_USERS_EXACT

DATA = ROOT / "data" / "movielens"


@dataclass(frozen=True)
class Settings(CommonSettings):
    num_users: int = 75
    """Users in the crowd, the expert not counted."""
    num_groups: int = 4
    """Groups a round; each makes one candidate."""
    num_rounds: int = 100
    num_runs: int = 50
    """Independent repetitions, each with its own expert, crowd and starting model."""
    delta: float = 0.1
    """Step of a candidate from the model towards its group's centroid, in (0, 1]."""
    error_probability: float = 0.05
    """Probability that a round takes a random candidate that is not the best, in [0, 1]."""
    evaluation_noise: float = 0.0
    """Standard deviation of the error of every evaluation of a candidate or of the model, in the metric's unit."""
    grouping: tuple[str, ...] = ("random", "epsilon_greedy", "interleaved")
    """Who works together: see grouping.py."""
    metric: tuple[str, ...] = ("l2", "l1", "dot")
    """How candidates are valued: see metrics.py."""
    scoring: tuple[str, ...] = ("marginal", "ranked", "attributed")
    """What users earn: see scoring.py."""
    preferences: Path | None = None
    """A user x dimension matrix (.csv; first column the user id) in place of MovieLens."""
    ratings: Path = DATA / "ratings.csv.gz"
    """GroupLens ratings (.csv or .csv.gz)."""
    movies: Path = DATA / "movies.csv.gz"
    """GroupLens movies (.csv or .csv.gz)."""
    first_users: bool = False
    """Draw the crowd from the first users by id, as the study did, and not from all."""
    keep_no_genres: bool = False
    """Count "(no genres listed)" as a genre, as the study did."""
    reference: Literal["static", "protocol"] = "static"
    """The game whose Shapley values points are compared with: v(S) = metric(mean of S, expert), or what a competition
    of S alone reaches (protocol_game.py), which takes some thousand competitions a run and combination."""
    shapley: str = "auto"
    """How Shapley values are computed (see shapley.py), or none."""
    shapley_precision: float = 0.01
    """Largest standard error of a Shapley value, as a share of the values' standard deviation."""
    kernel_runs: int = 6
    """This many runs are validated by shap.KernelExplainer too, as the study did, to show its noise."""
    absent: float = 0.0
    """Probability with which a user is away in a round, in [0, 1)."""
    audit: bool = False
    """Play every strategy of incentives.py against all combinations and runs, not only the first of them."""
    sweep: bool = False
    """Also run every number of users and of groups below."""
    sweep_users: tuple[int, ...] = (10, 25, 50, 75, 100)
    sweep_groups: tuple[int, ...] = (2, 3, 4, 5)


Size = tuple[int, int]
"""(num_users, num_groups)"""

REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "grouping": GROUPINGS,
    "metric": METRICS,
    "scoring": SCORINGS,
}
"""What --grouping, --metric and --scoring can name, besides functions of the user's own."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "first_users": True,
        "keep_no_genres": True,
        "scoring": ("ranked",),
    },
    "quick": {"num_users": 20, "num_rounds": 20, "num_runs": 6, "kernel_runs": 2},
}


def check_strategies(settings: CommonSettings) -> None:
    """Raises InputError for a grouping, metric or scoring that is not there or named twice; settings has all three."""
    for option, registry in REGISTRIES.items():
        names = getattr(settings, option)
        if not names or len(set(names)) < len(names):
            raise InputError(f"--{option} {' '.join(names)}: name at least one, and each once")
        for name in names:
            named_function(f"--{option}", name, registry)


def check_settings(settings: Settings) -> None:
    """Raises InputError for names and numbers that cannot be."""
    check_strategies(settings)
    check_name("--shapley", settings.shapley, [*METHODS, "none"])
    if settings.shapley == "closed_form" and settings.metric != ("dot",):
        raise InputError("--shapley closed_form: fits --metric dot alone; choose auto")
    if settings.reference == "protocol" and settings.shapley in ("closed_form", "kernel"):
        raise InputError(f"--shapley {settings.shapley}: fits --reference static alone; choose auto")
    check_common(settings)
    for option in ("num_users", "num_groups", "num_rounds", "num_runs"):
        check_range(f"--{option.replace('_', '-')}", getattr(settings, option), 1, 10**9)
    check_range("--delta", settings.delta, 0, 1, open_low=True)
    check_range("--error-probability", settings.error_probability, 0, 1)
    check_range("--evaluation-noise", settings.evaluation_noise, 0, 1e6)
    check_range("--absent", settings.absent, 0, 0.99)
    check_range("--shapley-precision", settings.shapley_precision, 0, 1, open_low=True)
    check_range("--kernel-runs", settings.kernel_runs, 0, 10**9)
    if settings.sweep and not (settings.sweep_users and settings.sweep_groups):
        raise InputError("--sweep: --sweep-users and --sweep-groups need at least one number each")
    for users, groups in sizes_to_run(settings):
        if min(users, groups) < 1:
            raise InputError(f"{users} users in {groups} groups: both must be at least 1")
        if groups > users:
            raise InputError(f"--num-groups {groups}: more groups than the {users} users; lower it")
        if settings.shapley == "exact" and users > MOST_USERS_EXACT:
            raise InputError(f"--shapley exact: too many coalitions of {users} users; choose auto")


def sizes_to_run(settings: Settings) -> list[Size]:
    """The run's own size first, then the sweep's."""
    grid = [(users, groups) for users in settings.sweep_users for groups in settings.sweep_groups]
    return list(dict.fromkeys([(settings.num_users, settings.num_groups), *(grid if settings.sweep else [])]))


def functions_of(grouping: str, metric: str, scoring: str) -> tuple[Grouping, Metric, Scoring]:
    """By their names, or module:function."""
    return (
        named_function("--grouping", grouping, GROUPINGS),
        metric_of(metric),
        named_function("--scoring", scoring, SCORINGS),
    )


def metric_of(name: str) -> Metric:
    metric: Metric = named_function("--metric", name, METRICS)
    return metric


def stream(settings: Settings, purpose: str, run: int) -> np.random.SeedSequence:
    """A random stream of its own for every purpose and run, from the one seed."""
    return np.random.SeedSequence(settings.seed, spawn_key=(zlib.crc32(purpose.encode()), run))
