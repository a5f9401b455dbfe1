"""The experiment: crowds compete and are valued, task by task; then tables, figures and the report."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiment.command_line import NOT_IDENTITY, code_sha256, naming, tell
from experiment.errors import InputError, RunFailed
from experiment.files import ROOT, sha256_file
from experiment.parallel import parallel_map, reach_cluster
from experiment.report import finish_with_report
from experiment.run_folder import Arrays, RunFolder, open_run, shared_path
from experiment.tables import LARGE, write_lines, write_table
from user_grouping_evaluation_sim import tables
from user_grouping_evaluation_sim.attribution import MOST_DENSE
from user_grouping_evaluation_sim.audit import (
    ablation_table,
    ablations_of,
    audit_table,
    audits_of,
    perform_audit,
    runs_of,
)
from user_grouping_evaluation_sim.ledger import MOST_NUMBERS, Account, ledger_lines, numbers_in
from user_grouping_evaluation_sim.plots import draw, figures_of
from user_grouping_evaluation_sim.preferences import Preferences, check_enough_users, read_matrix, read_movielens
from user_grouping_evaluation_sim.protocol_game import EVALUATIONS
from user_grouping_evaluation_sim.report_page import report_page
from user_grouping_evaluation_sim.scoring import PARTS
from user_grouping_evaluation_sim.settings import REGISTRIES, Settings, Size, check_settings, sizes_to_run
from user_grouping_evaluation_sim.sweep import (
    ProtocolValidation,
    Task,
    Validation,
    combinations_of,
    crowd_of,
    finish_tasks,
    perform,
    rehearse,
    tasks_of,
)

RESULTS = ROOT / "results" / "user_grouping_evaluation_sim"


def main(settings: Settings) -> None:
    check_settings(settings)
    folder = settings.output_dir or RESULTS / (settings.preset + ("-sweep" if settings.sweep else ""))
    files = data_files(settings)
    preferences = read_preferences(files, keep_no_genres=settings.keep_no_genres)
    sizes = sizes_to_run(settings)
    with naming("--num-users"):
        check_enough_users(preferences, max(users for users, _ in sizes))
    tasks = tasks_of(settings, sizes, preferences.vectors.shape[1])
    tell(describe(settings, sizes, tasks, preferences))
    if settings.dry_run:
        return
    rehearse(settings, preferences)
    with naming("--scheduler"):
        reach_cluster(settings.backend, settings.scheduler)
    identity = identity_of(settings, files)
    with open_run(folder, identity, overwrite=settings.overwrite, resume=settings.resume) as run:
        if run.finished:
            tell(f"already complete: {folder} (--overwrite runs it again)")
            return
        with run.stage("simulation and Shapley values"):
            done = finish_tasks(run, settings, tasks, partial(perform, settings, preferences), "simulating")
        with run.stage("audit"):
            audits = finish_audits(run, settings, preferences, done)
        with run.stage("tables"):
            frames = write_tables(run, settings, preferences, sizes, done, audits)
        with run.stage("figures"):
            drawn = draw_figures(run, settings, preferences, frames, done) if settings.figures else []
        finish_with_report(
            run,
            report_page(settings, frames, drawn, preferences.vectors.shape),
            dimensions=list(preferences.dimensions),
            data_files={name: shared_path(path) for name, path in files.items()},
        )
    tell(f"results: {folder}")


def data_files(settings: Settings) -> dict[str, Path]:
    """The files that the users' vectors are read from, by the option that names them."""
    if settings.preferences is not None:
        return {"preferences": settings.preferences}
    return {"ratings": settings.ratings, "movies": settings.movies}


def read_preferences(files: dict[str, Path], *, keep_no_genres: bool) -> Preferences:
    """The users' vectors from data_files."""
    if "preferences" in files:
        return read_matrix(files["preferences"])
    return read_movielens(files["ratings"], files["movies"], keep_no_genres=keep_no_genres)


def identity_of(settings: Settings, files: dict[str, Path]) -> dict[str, Any]:
    """All that decides the results: settings, the data's content (not where it lies), the user's own code."""
    skipped = (*NOT_IDENTITY, "preferences", "ratings", "movies")
    return {
        **{key: value for key, value in asdict(settings).items() if key not in skipped},
        "data_sha256": {name: sha256_file(path) for name, path in files.items()},
        "code_sha256": code_sha256({option: getattr(settings, option) for option in REGISTRIES}),
    }


def describe(settings: Settings, sizes: Sequence[Size], tasks: Sequence[Task], preferences: Preferences) -> str:
    """The first line a user sees: what runs, on what, about how long."""
    n, d = preferences.vectors.shape
    combinations = len(settings.grouping) * len(settings.metric) * len(settings.scoring)
    where = f"{settings.backend} cluster" if settings.backend in ("dask", "ray") else f"{settings.jobs} processes"
    what = f"{settings.num_users} users in {settings.num_groups} groups"
    if len(sizes) > 1:
        what += f" and {len(sizes) - 1} more sizes"
    seconds = sum(rough_seconds(task, settings.num_rounds) for task in tasks) / settings.jobs + 4
    played = sum(isinstance(task, ProtocolValidation) for task in tasks)
    games = f" and {played} protocol games of up to {EVALUATIONS} coalitions" if played else ""
    return (
        f"{what}: {settings.num_runs} runs of {settings.num_rounds} rounds for each of {combinations} combinations"
        f"{games}, drawn from {n} users x {d} dimensions; {where}, about {max(1, round(seconds))} s"
    )


def rough_seconds(task: Task, num_rounds: int) -> float:
    """Orders of magnitude on one core of 2023; only the estimate that is printed depends on them."""
    if isinstance(task, Validation):
        a_run = {"hull": 1e-3, "kernel": 0.3}.get(task.method, 0.02 if task.metric == "l2" else 0.05)
        return task.num_runs * a_run
    if isinstance(task, ProtocolValidation):
        users = task.num_users
        plays = EVALUATIONS if users > 30 else min(2**users, EVALUATIONS)
        fitted = fits(task.scoring)
        a_size = 4e-3 if fitted else 1.5e-3  # plays of one size go side by side
        return num_rounds * (users * a_size + plays * (1.5e-5 + users * (1e-7 + 1e-8 * users * fitted)))
    rounds = num_rounds * task.num_runs * task.num_users
    matrices = 3e-8 * (task.num_users if task.num_users <= MOST_DENSE else 10 * num_rounds)  # or all rounds replayed
    return rounds * (2.5e-7 + (matrices if fits(task.scoring) else 0))


def fits(scoring: str) -> bool:
    """Whether it solves a regression every round."""
    return not {"attributed", "convex", "merged"}.isdisjoint(PARTS.get(scoring, ()))


def finish_audits(
    run: RunFolder, settings: Settings, preferences: Preferences, done: dict[str, Arrays]
) -> dict[str, pd.DataFrame]:
    """The tables of strategies and of pay and steering, by name."""
    if not (tasks := audits_of(settings)):
        return {}
    runs = runs_of(settings)
    combinations = combinations_of(settings, preferences, done, settings.num_users, settings.num_groups)
    shapley = {combination.names[1]: combination.shapley[:runs] for combination in combinations}
    crowd = crowd_of(settings, preferences, settings.num_users, 0, runs)
    try:
        played = finish_tasks(run, settings, tasks, partial(perform_audit, settings, crowd, shapley), "auditing")
    except InputError as error:  # of a function of the user's own: what is finished is kept
        raise RunFailed(str(error)) from error
    hull = combinations[0].hull[:runs]
    return {
        "audit": audit_table(tasks, settings.scoring, played, shapley, hull),
        "ablation": ablation_table(ablations_of(settings), played, shapley, hull),
    }


def write_tables(
    run: RunFolder,
    settings: Settings,
    preferences: Preferences,
    sizes: Sequence[Size],
    done: dict[str, Arrays],
    audits: dict[str, pd.DataFrame],
) -> dict[str, pd.DataFrame]:
    """All of the run's tables, written and by name."""
    combinations = combinations_of(settings, preferences, done, *sizes[0])
    frames = tables.run_tables(combinations) | audits
    if settings.sweep:
        grid = [size for size in sizes if size[0] in settings.sweep_users and size[1] in settings.sweep_groups]
        by_size = {size: tables.runs_table(combinations_of(settings, preferences, done, *size)) for size in grid}
        frames |= tables.sweep_tables(by_size, np.random.default_rng(settings.seed))
    for name, frame in frames.items():
        write_table(frame, run.path, name, float_format="%.6g")
    write_ledger(run, [tables.account_of(combination) for combination in combinations])
    return frames


def write_ledger(run: RunFolder, accounts: Sequence[Account]) -> None:
    """What every combination's first run shows of itself, if that is not too much."""
    numbers = numbers_in(accounts)
    if numbers > MOST_NUMBERS:
        tell(f"no ledger: it would hold {numbers:,} members and weights (at most {MOST_NUMBERS:,})")
        return
    write_lines(ledger_lines(run.identity, accounts), run.path, "ledger", large=numbers > LARGE)


def draw_figures(
    run: RunFolder,
    settings: Settings,
    preferences: Preferences,
    frames: dict[str, pd.DataFrame],
    done: dict[str, Arrays],
) -> list[str]:
    """Draws what the tables allow; gives the figures' names."""
    combinations = combinations_of(settings, preferences, done, settings.num_users, settings.num_groups)
    first_crowd = crowd_of(settings, preferences, settings.num_users, 0, 1)
    drawings = figures_of(run.path, frames, combinations, first_crowd, settings.reference)
    list(parallel_map(draw, drawings, jobs=settings.jobs, description="drawing"))
    return [drawing.name for drawing in drawings]
