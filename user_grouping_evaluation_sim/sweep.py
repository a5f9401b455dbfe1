"""A run as independent tasks: the Shapley values and the competitions of every setting and combination."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Protocol

import numpy as np

from experiment.command_line import blaming
from experiment.errors import InputError
from experiment.parallel import parallel_map, reach_cluster_again
from experiment.run_folder import Arrays, RunFolder, load_arrays, save_arrays
from user_grouping_evaluation_sim.attribution import MOST_DENSE
from user_grouping_evaluation_sim.audit import audits_of
from user_grouping_evaluation_sim.competition import Rules
from user_grouping_evaluation_sim.hull import hull_distance
from user_grouping_evaluation_sim.incentives import STRATEGIES, Scene
from user_grouping_evaluation_sim.preferences import Crowd, Preferences, draw_crowds
from user_grouping_evaluation_sim.protocol_game import ProtocolGame, protocol_shapley_values
from user_grouping_evaluation_sim.settings import Settings, Size, functions_of, metric_of, stream
from user_grouping_evaluation_sim.shapley import shapley_values
from user_grouping_evaluation_sim.tables import Combination
from user_grouping_evaluation_sim.vector_world import Conduct, Trace, simulate

KERNEL_EVALUATIONS = 10_000  # the study's budget for shap.KernelExplainer
RUNS_A_TASK = 10  # of Shapley values
NUMBERS_A_TASK = 20_000_000  # users' coordinates, or entries of their matrices, that a simulation task holds


@dataclass(frozen=True)
class Validation:
    """Task: Shapley values of some runs, or with method "hull" the distances to the hull."""

    num_users: int
    metric: str
    method: str
    first_run: int
    num_runs: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.num_users}-{_safe(self.metric)}-{self.first_run}-{self.num_runs}"


@dataclass(frozen=True)
class Competition:
    """Task: the simulation of some runs of one combination."""

    num_users: int
    num_groups: int
    grouping: str
    metric: str
    scoring: str
    first_run: int
    num_runs: int

    @property
    def name(self) -> str:
        return _name_of("run", self)


@dataclass(frozen=True)
class ProtocolValidation:
    """Task: Shapley values of one run in the protocol game of one combination."""

    num_users: int
    num_groups: int
    grouping: str
    metric: str
    scoring: str
    first_run: int

    num_runs = 1

    @property
    def name(self) -> str:
        return _name_of("protocol", self)


Task = Validation | ProtocolValidation | Competition


class Named(Protocol):
    """What finish_tasks needs of a task."""

    @property
    def name(self) -> str: ...


def _safe(name: str) -> str:
    return name.replace(":", ".").replace("/", ".")


def _name_of(what: str, task: "Competition | ProtocolValidation") -> str:
    parts = (task.grouping, task.metric, task.scoring)
    return "-".join([what, str(task.num_users), str(task.num_groups), *map(_safe, parts), str(task.first_run)])


def tasks_of(settings: Settings, sizes: Sequence[Size], dimensions: int) -> list[Task]:
    tasks: list[Task] = []

    def blocks(num_runs: int, length: int) -> Iterator[tuple[int, int]]:
        return ((first, min(length, num_runs - first)) for first in range(0, num_runs, length))

    for users in dict.fromkeys(users for users, _ in sizes):
        tasks += [Validation(users, "", "hull", *block) for block in blocks(settings.num_runs, 1000)]
        for metric in settings.metric:
            if settings.shapley == "none" or settings.reference == "protocol":
                continue
            if users == settings.num_users and settings.shapley != "kernel":
                tasks += [
                    Validation(users, metric, "kernel", *block)
                    for block in blocks(min(settings.kernel_runs, settings.num_runs), 2)
                ]
            tasks += [
                Validation(users, metric, settings.shapley, *block) for block in blocks(settings.num_runs, RUNS_A_TASK)
            ]
    for users, groups in sizes:
        width = max(dimensions, 10 * users if users <= MOST_DENSE else 0)  # matrices come by the dozen
        length = max(1, NUMBERS_A_TASK // (users * width))
        for grouping in settings.grouping:
            for metric in settings.metric:
                for scoring in settings.scoring:
                    tasks += [
                        Competition(users, groups, grouping, metric, scoring, *block)
                        for block in blocks(settings.num_runs, length)
                    ]
                    if settings.shapley != "none" and settings.reference == "protocol":
                        tasks += [
                            ProtocolValidation(users, groups, grouping, metric, scoring, run)
                            for run in range(settings.num_runs)
                        ]
    return tasks


def finish_tasks(
    run: RunFolder, settings: Settings, tasks: Sequence[Named], function: Callable[[Any], Arrays], description: str
) -> dict[str, Arrays]:
    """Every task's arrays by name; those of an earlier, interrupted run are loaded, each other is saved when done."""
    done = {task.name: load_arrays(run.part_path(f"{task.name}.npz")) for task in tasks}
    missing = [task for task in tasks if done[task.name] is None]
    if missing:
        reach_cluster_again(settings.backend, settings.scheduler)
    results = parallel_map(
        function,
        missing,
        jobs=settings.jobs,
        backend=settings.backend,
        scheduler=settings.scheduler,
        description=description,
    )
    with closing(results):  # an error here ends the workers and the progress bar at once
        for task, arrays in zip(missing, results, strict=True):
            save_arrays(run.part_path(f"{task.name}.npz"), arrays)
            done[task.name] = arrays
    return {name: arrays for name, arrays in done.items() if arrays is not None}


def perform(settings: Settings, preferences: Preferences, task: Task) -> Arrays:
    """One task, wherever it runs. Its random numbers follow from the seed and its name alone."""
    crowd = crowd_of(settings, preferences, task.num_users, task.first_run, task.num_runs)
    if isinstance(task, Validation):
        if task.method == "hull":
            return {"hull": np.array([hull_distance(*pair) for pair in zip(crowd.users, crowd.experts, strict=True)])}
        metric = metric_of(task.metric)
        estimates = [
            shapley_values(
                users,
                expert,
                metric,
                method=task.method,
                precision=settings.shapley_precision,
                max_evaluations=KERNEL_EVALUATIONS if task.method == "kernel" else None,
                seed=stream(settings, f"shapley {task.metric} {task.method} {task.num_users}", task.first_run + run),
            )
            for run, (users, expert) in enumerate(zip(crowd.users, crowd.experts, strict=True))
        ]
        return {
            "values": np.array([estimate.values for estimate in estimates]),
            "standard_errors": np.array([estimate.standard_errors for estimate in estimates]),
        }
    if isinstance(task, ProtocolValidation):
        estimate = protocol_shapley_values(
            protocol_game(settings, crowd, task),
            method=settings.shapley,
            precision=settings.shapley_precision,
            seed=stream(settings, f"shapley of {task.name}", task.first_run),
        )
        return {"values": estimate.values[None], "standard_errors": estimate.standard_errors[None]}
    simulated = simulate(
        crowd,
        *functions_of(task.grouping, task.metric, task.scoring),
        _rules(settings, task.num_groups),
        np.random.default_rng(stream(settings, f"competition {task.name}", task.first_run)),
        settings.delta,
        noise=settings.evaluation_noise,
        errors=np.random.default_rng(stream(settings, f"evaluations {task.name}", task.first_run)),
        conduct=conduct_of(settings, crowd, task.first_run),
    )
    names = ("distances", "points", "points_errors", "pay", "pay_errors", "budget")
    arrays = {name: getattr(simulated, name) for name in names}
    if task.first_run == 0:
        arrays |= {f"trace_{name}": value for name, value in vars(simulated.trace).items()}
    return arrays


def conduct_of(settings: Settings, crowd: Crowd, first_run: int) -> Conduct | None:
    """With --absent: everybody is away in a share of the rounds."""
    if not settings.absent:
        return None
    rng = np.random.default_rng(stream(settings, "absent", first_run))
    here = rng.random((settings.num_rounds, *crowd.user_ids.shape), dtype=np.float32) >= settings.absent
    return Conduct(lambda _: crowd.users, lambda t: here[t])


def protocol_game(settings: Settings, crowd: Crowd, task: ProtocolValidation) -> ProtocolGame:
    """Of the crowd's first run."""
    return ProtocolGame(
        crowd.users[0],
        crowd.experts[0],
        crowd.models[0],
        *functions_of(task.grouping, task.metric, task.scoring),
        _rules(settings, task.num_groups),
        stream(settings, f"plays of {task.name}", task.first_run),
        settings.delta,
        settings.evaluation_noise,
    )


def rehearse(settings: Settings, preferences: Preferences, rounds: int = 3) -> None:
    """A few rounds of what the user's own functions take part in: a mistake in them shows before a file is written."""
    crowd = crowd_of(settings, preferences, settings.num_users, 0, min(2, settings.num_runs))
    rules = replace(_rules(settings, settings.num_groups), num_rounds=rounds)
    for names in product(settings.grouping, settings.metric, settings.scoring):
        if own := [name for name in names if ":" in name]:
            with blaming(own):
                simulate(crowd, *functions_of(*names), rules, np.random.default_rng(settings.seed))
                if settings.shapley != "none" and settings.reference == "protocol":
                    task = ProtocolValidation(settings.num_users, settings.num_groups, *names, 0)
                    game = replace(protocol_game(settings, crowd, task), rules=rules)
                    game(np.tri(min(3, settings.num_users), settings.num_users) > 0)
    for name in settings.metric:
        if ":" in name and settings.shapley != "none" and settings.reference == "static":
            metric = metric_of(name)
            with blaming([name]):
                shapley_values(crowd.users[0][:2], crowd.experts[0], metric, method="exact")
                if name in {task.metric for task in audits_of(settings)}:
                    rehearse_audit(name, crowd, rounds)


def rehearse_audit(name: str, crowd: Crowd, rounds: int) -> None:
    """Raises InputError where a metric has no value for what a strategy of the audit contributes."""
    first = np.zeros((len(crowd.users), 1), dtype=int)
    scene = Scene(crowd.users, first, first[:, 0], rounds, np.random.default_rng(0))
    for strategy, (function, _) in STRATEGIES.items():
        contributed = function(scene).conduct.vectors(rounds - 1)[0]
        if not np.isfinite(metric_of(name)(contributed, crowd.experts[0])).all():
            raise InputError(f"{name}: has no value for what the strategy {strategy} of the audit contributes")


def _rules(settings: Settings, num_groups: int) -> Rules:
    return Rules(num_groups, settings.num_rounds, settings.error_probability)


def crowd_of(settings: Settings, preferences: Preferences, num_users: int, first: int, count: int) -> Crowd:
    """The crowds of the runs first .. first + count - 1; the same for every combination."""
    seeds = [stream(settings, f"crowd {num_users}", first + run) for run in range(count)]
    return draw_crowds(preferences, num_users, seeds, first_users=settings.first_users)


def combinations_of(
    settings: Settings, preferences: Preferences, done: dict[str, Arrays], num_users: int, num_groups: int
) -> list[Combination]:
    """The finished combinations of one size."""
    tasks = tasks_of(settings, [(num_users, num_groups)], preferences.vectors.shape[1])
    crowd = crowd_of(settings, preferences, num_users, 0, settings.num_runs)
    missing = np.full(crowd.user_ids.shape, np.nan)

    def joined(array: str, default: np.ndarray | None = None, /, **wanted: object) -> np.ndarray:
        """One array of the tasks with these fields, over all runs."""
        parts = [
            done[task.name][array]
            for task in tasks
            if array in done[task.name] and all(getattr(task, key, None) == value for key, value in wanted.items())
        ]
        if not parts and default is not None:
            return default
        return np.concatenate(parts)

    hull = joined("hull", method="hull")
    combinations = []
    for grouping, metric, scoring in product(settings.grouping, settings.metric, settings.scoring):
        names = {"grouping": grouping, "metric": metric, "scoring": scoring}
        validation, by_kernel = ({"metric": metric, "method": method} for method in (settings.shapley, "kernel"))
        if settings.reference == "protocol":
            validation = names
        combinations.append(
            Combination(
                (grouping, metric, scoring),
                crowd.user_ids,
                joined("distances", **names),
                joined("points", **names),
                joined("points_errors", **names),
                joined("pay", **names),
                joined("pay_errors", **names),
                joined("budget", **names),
                hull,
                joined("values", missing, **validation),
                joined("standard_errors", missing, **validation),
                missing[:0] if settings.shapley == "kernel" else joined("values", missing[:0], **by_kernel),
                Trace(**{field.name: joined(f"trace_{field.name}", **names) for field in fields(Trace)}),
            )
        )
    return combinations
