"""The experiment: tasks, tables, figures and the report."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiment.command_line import NOT_IDENTITY
from experiment.files import ROOT, replace_atomically, sha256_file
from experiment.parallel import parallel_map, reach_cluster
from experiment.report import Page, finish_with_report
from experiment.run_folder import Arrays, RunFolder, open_run, shared_path
from user_grouping_evaluation_sim import tables
from user_grouping_evaluation_sim.plots import draw, figures_of
from user_grouping_evaluation_sim.preferences import Preferences, check_enough_users, read_matrix, read_movielens
from user_grouping_evaluation_sim.report_page import report_page
from user_grouping_evaluation_sim.settings import Settings, check_settings, settings_to_run
from user_grouping_evaluation_sim.sweep import Task, Validation, cells_of, crowd_of, finish_tasks, rehearse, tasks_of

RESULTS = ROOT / "results" / "user_grouping_evaluation_sim"


def main(settings: Settings) -> None:
    check_settings(settings)

    folder = settings.output_dir or RESULTS / (settings.preset + ("-sweep" if settings.sweep else ""))
    preferences, hashes = read_preferences(settings)
    settings_run = settings_to_run(settings)
    check_enough_users(preferences, max(users for users, _ in settings_run))
    tasks = tasks_of(settings, settings_run, preferences.vectors.shape[1])
    print(describe(settings, settings_run, tasks, preferences), flush=True)
    if settings.dry_run:
        return
    rehearse(settings, preferences)
    reach_cluster(settings.backend, settings.scheduler)
    with open_run(folder, identity_of(settings, hashes), overwrite=settings.overwrite, resume=settings.resume) as run:
        if run.finished:
            print(f"already complete: {folder} (--overwrite runs it again)")
            return
        with run.stage("simulation and Shapley values"):
            done = finish_tasks(run, settings, preferences, tasks)
        page = write_results(run, settings, preferences, settings_run, done)
        finish_with_report(
            run,
            page,
            experiment="user_grouping_evaluation_sim",
            dimensions=list(preferences.dimensions),
            data_files={name: shared_path(path) for name, path in data_files(settings).items()},
        )
    print(f"results: {folder}")


def data_files(settings: Settings) -> dict[str, Path]:
    """The files that the users' vectors are read from, by the option that names them."""
    if settings.preferences is not None:
        return {"preferences": settings.preferences}
    return {"ratings": settings.ratings, "movies": settings.movies}


def read_preferences(settings: Settings) -> "tuple[Preferences, dict[str, str]]":
    """The users' vectors, and the SHA-256 of the files they were read from."""

    if settings.preferences is not None:
        preferences = read_matrix(settings.preferences)
    else:
        preferences = read_movielens(settings.ratings, settings.movies, keep_no_genres=settings.keep_no_genres)
    return preferences, {name: sha256_file(path) for name, path in data_files(settings).items()}


def identity_of(settings: Settings, hashes: dict[str, str]) -> dict[str, object]:
    """All that decides the results: settings, the data's content (not where it lies), the user's own code."""

    skipped = (*NOT_IDENTITY, "dry_run", "preferences", "ratings", "movies")
    identity: dict[str, object] = {key: value for key, value in asdict(settings).items() if key not in skipped}
    own = [name for name in (*settings.grouping, *settings.metric, *settings.scoring) if ":" in name]
    files = {name: importlib.import_module(name.partition(":")[0]).__file__ for name in own}
    return identity | {
        "data_sha256": hashes,
        "code_sha256": {name: sha256_file(str(file)) for name, file in files.items()},
    }


def describe(
    settings: Settings, cells: Sequence[tuple[int, int]], tasks: "Sequence[Task]", preferences: "Preferences"
) -> str:
    """The first line a user sees: what runs, on what, about how long."""
    n, d = preferences.vectors.shape
    combinations = len(settings.grouping) * len(settings.metric) * len(settings.scoring)
    where = f"{settings.backend} cluster" if settings.backend in ("dask", "ray") else f"{settings.jobs} processes"
    what = f"{settings.num_users} users in {settings.num_groups} groups"
    if len(cells) > 1:
        what += f" and {len(cells) - 1} more settings"
    seconds = sum(map(_rough_seconds(settings), tasks)) / settings.jobs + 4
    return (
        f"{what}: {settings.num_runs} runs of {settings.num_rounds} rounds for each of {combinations} combinations, "
        f"drawn from {n} users x {d} dimensions; {where}, about {max(1, round(seconds))} s"
    )


def _rough_seconds(settings: Settings) -> "Callable[[Task], float]":
    """Orders of magnitude on one core of 2023; only the estimate that is printed depends on them."""

    def seconds(task: "Task") -> float:
        if isinstance(task, Validation):
            a_run = {"hull": 1e-3, "kernel": 0.3}.get(task.method, 0.02 if task.metric == "l2" else 0.05)
            return task.num_runs * a_run
        rounds = settings.num_rounds * task.num_runs * task.num_users
        replayed = 0.0 if task.scoring == "marginal" else 0.6 * min(1.5 * task.num_users / task.num_groups, 60) + 10
        return rounds * (2.5e-7 + 3e-8 * replayed)

    return seconds


def write_results(
    run: "RunFolder",
    settings: Settings,
    preferences: "Preferences",
    settings_run: Sequence[tuple[int, int]],
    done: "dict[str, Arrays]",
) -> "Page":
    """Tables, then figures; gives what the report says of them."""

    with run.stage("tables"):
        cells = cells_of(settings, preferences, done, *settings_run[0])
        frames = tables.run_tables(cells)
        if settings.sweep:
            grid = [
                pair for pair in settings_run if pair[0] in settings.sweep_users and pair[1] in settings.sweep_groups
            ]
            by_setting = {pair: tables.runs_table(cells_of(settings, preferences, done, *pair)) for pair in grid}
            frames |= tables.sweep_tables(by_setting, np.random.default_rng(settings.seed))
        for name, frame in frames.items():
            with replace_atomically(run.path / f"{name}.csv") as temporary:
                frame.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    with run.stage("figures"):
        figures = figures_of(run.path, frames, cells, crowd_of(settings, preferences, settings.num_users, 0, 1))
        for _ in parallel_map(draw, figures, jobs=settings.jobs, description="drawing"):
            pass
    users, dimensions = preferences.vectors.shape
    data = f"Users are drawn from {users} users x {dimensions} dimensions."
    return report_page(settings, frames, [figure.name for figure in figures], data)
