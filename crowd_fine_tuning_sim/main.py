"""The experiment: crowds compete with language models and are paid; every coalition is retrained; then tables, figures
and the report."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crowd_fine_tuning_sim.asking import play_together
from crowd_fine_tuning_sim.cases import (
    CASES,
    Case,
    Played,
    case_keys,
    case_name,
    crowd_arrays,
    crowd_without_texts,
    played_case,
    with_other_seeds,
)
from crowd_fine_tuning_sim.crowds import Crowd, Source, load_source, real_crowd, simulated_crowd
from crowd_fine_tuning_sim.estimates import rehearse_strategies
from crowd_fine_tuning_sim.in_run import Task, in_run_values
from crowd_fine_tuning_sim.pay import LEDGER, accounts_of
from crowd_fine_tuning_sim.plays import REPORTED, plays_of
from crowd_fine_tuning_sim.plots import write_figures
from crowd_fine_tuning_sim.report_page import FIGURES, report_page
from crowd_fine_tuning_sim.results import answer_of, run_tables
from crowd_fine_tuning_sim.settings import Settings, check_settings, kinds_of, retrained_coalitions
from experiment.command_line import NOT_IDENTITY, code_sha256, naming, tell
from experiment.errors import InputError
from experiment.figures import no_figures
from experiment.files import ROOT, sha256_file
from experiment.parallel import parallel_map, reach_cluster, reach_cluster_again
from experiment.report import finish_with_report
from experiment.run_folder import Arrays, RunFolder, load_arrays, open_run, read_record, save_arrays
from experiment.tables import LARGE, write_lines, write_table
from point_in_space_sim.engine.assets import cache_folder
from point_in_space_sim.engine.base_model import BaseModel, pick_device
from point_in_space_sim.engine.options import engine_settings
from point_in_space_sim.engine.rehearsal import rehearse
from point_in_space_sim.engine.variants import (
    Engine,
    base_of,
    engine_of,
    fulfilment,
    leave_models_to_workers,
    stacking,
)
from point_in_space_sim.main import estimated_seconds, in_words, models_identity
from point_in_space_sim.mapper import Mapper, load_mapper, map_texts
from point_in_space_sim.protocols import Work, derived_seed
from user_grouping_evaluation_sim.ledger import ledger_lines, numbers_in
from user_grouping_evaluation_sim.settings import REGISTRIES

RESULTS = ROOT / "results" / "crowd_fine_tuning_sim"
EXTENT = ("target_emotion", "num_crowds", "num_seeds")
VALIDATION_TEXTS = 16  # the nearest of the neighbourhood, whose loss values a step of tuning for the in-run values


def main(settings: Settings) -> None:
    check_settings(settings)
    folder = settings.output_dir or RESULTS / settings.preset
    with naming("--device"):
        device = str(pick_device(settings.device))
    tell(describe(settings, folder, device))
    if settings.dry_run:
        tell(f"results would go to {folder}")
        return

    with naming("--scheduler"):
        reach_cluster(settings.backend, settings.scheduler)
    with naming("--crowd"):
        source = load_source(settings.crowd, settings.user_column, settings.text_column)
    with naming(f"--mapper {settings.mapper}"):
        mapper = load_mapper(settings.mapper, device)
    crowds = crowds_of(settings, source, partial(map_texts, mapper, cache_folder=cache_folder() / "vectors"))
    rehearse_strategies(settings, Case(crowds[0], 1, settings.seed))
    tuning, sampling = engine_settings(settings)
    engine = engine_of(settings, device, tuning, sampling, settings.samples)
    with naming(f"--base-model {settings.base_model}"):
        base = base_of(engine)
    engine = stacking(engine, base)
    held = (person.texts + person.later for crowd in crowds for person in crowd.people)
    texts = list(dict.fromkeys(text for own in held for text in own))
    if longer := rehearse(base, mapper, texts, tuning, sampling):
        tell(f"{longer} of {len(texts)} texts are longer than --max-new-tokens {sampling.max_new_tokens}")
    identity = identity_of(settings, base, mapper, source)
    keys = case_keys(settings.target_emotion, settings.num_crowds, settings.num_seeds, settings.seed)
    cases = [Case(crowd, number, seed) for crowd, (_, number, seed) in zip(cycle(crowds), keys, strict=False)]
    with open_run(folder, identity, overwrite=settings.overwrite, resume=settings.resume) as run:
        if settings.redo_tables and not run.finished:
            raise InputError(f"--redo-tables: {folder} holds no finished run; leave the option out")
        redone = run.part_path("redone")  # there while tables are made again: killed meanwhile, they are of two makes
        if is_complete(folder, [case.name for case in cases], run.finished, settings.redo_tables or redone.exists()):
            tell(f"already complete: {folder} (--overwrite runs it again)")
            return
        del base
        leave_models_to_workers(settings)
        with run.stage("in-run values"):
            value_in_run(run, settings, engine, cases)
        leave_models_to_workers(settings)  # of one case they are made here
        with run.stage("competition and retraining"):
            play_cases(run, settings, engine, mapper, cases)
        with run.stage("tables"):
            arrays = {case.name: read_saved(run, case) for case in cases}
            played = with_other_seeds([finished(run, settings, case, arrays[case.name]) for case in cases])
            if settings.redo_tables:
                redone.touch()
            tables = run_tables(settings, played)
            for name, table in tables.items():
                write_table(table, run.path, name)
            if settings.reference != "none":
                accounts = [account for each in played for account in accounts_of(settings, each).values()]
                lines = ledger_lines(run.identity | extent_of(settings), accounts, LEDGER)
                write_lines(lines, run.path, "ledger", large=numbers_in(accounts) > LARGE)
        with run.stage("figures"):
            drawn = (
                write_figures(run.path, tables, played)
                if settings.figures
                else no_figures(run.path, [figure.name for figure in FIGURES])
            )
        page = report_page(settings, tables, drawn, played, [path.name for path in run.path.iterdir()])
        said = dtypes_of(run, arrays)
        finish_with_report(run, page, **extent_of(settings), dtype=said, answer=answer_of(tables))
    tell(f"results in {folder}: {page.answer[0]}")


def crowds_of(settings: Settings, source: Source, mapped: Callable[[Sequence[str]], np.ndarray]) -> list[Crowd]:
    """All crowds, a target's one after another. The first seed decides them, not how often they are played."""
    crowds = []
    for target in settings.target_emotion:
        for number in range(1, settings.num_crowds + 1):
            rng = np.random.default_rng(derived_seed(settings.seed, target, "crowd", number))
            with naming(f"--crowd {settings.crowd}, target {target}"):
                held, near = settings.texts_per_user, settings.neighbours
                if source.people:
                    crowd = real_crowd(source, target, settings.num_users, held, near, mapped, rng)
                else:
                    crowd = simulated_crowd(source, target, kinds_of(settings), held, near, mapped, rng)
            crowds.append(crowd)
    return crowds


def identity_of(settings: Settings, base: BaseModel, mapper: Mapper, source: Source) -> dict[str, Any]:
    """All that decides a case: settings, models and texts by their content, the user's own code."""
    # A case's dtype is its own: those that are finished may have been played on another machine.
    no_part = (*NOT_IDENTITY, "redo_tables", "dtype", *EXTENT)
    decides = asdict(settings) | models_identity(base, mapper)
    return {
        **{name: value for name, value in decides.items() if name not in no_part},
        "crowd": source.name,
        "crowd_sha256": source.sha256,
        "code_sha256": code_sha256({option: getattr(settings, option) for option in REGISTRIES}),
    }


def extent_of(settings: Settings) -> dict[str, Any]:
    """Which cases a run holds; more can be added to a finished one."""
    return {name: asdict(settings)[name] for name in EXTENT}


def is_complete(folder: Path, asked: Sequence[str], finished: bool, redo: bool) -> bool:
    """Whether a folder's run is finished and its tables hold these cases, and are not to be made again.

    Raises InputError where it holds a case that is not asked for, or tables are to be made and it was handed on without
    the files of the cases that it holds, or with others.
    """
    record = read_record(folder) if finished else {}
    keys = case_keys(*(record[name] for name in (*EXTENT, "seed"))) if finished else []
    written = [case_name(*key) for key in keys]
    saved_before = sorted(path.stem for path in (folder / CASES).glob("[!.]*.npz"))
    if others := [name for name in (*written, *saved_before) if name not in asked]:
        raise InputError(
            f"{folder}: holds {others[0]} too: name it too (targets, crowds, seeds), or choose another folder"
        )
    if set(asked) == set(written) and not redo:
        return True
    for name in written:
        path = folder / CASES / f"{name}.npz"
        if not path.exists() or sha256_file(path) != record.get("outputs_sha256", {}).get(f"{CASES}/{name}.npz"):
            raise InputError(
                f"{path}: is not as the run wrote it, so nothing can be added to it; choose another folder"
            )
    return False


# ---------------------------------------------------------------- what a run takes


def work_of(settings: Settings) -> Work:
    """What one case takes, on average where it depends on who wins."""
    n, held = settings.num_users, settings.texts_per_user
    combinations = len(settings.grouping) * len(settings.metric) * len(settings.scoring)
    variants = combinations * settings.num_rounds * (settings.num_groups + 0.5)  # a merged one in some rounds
    tuned, draws = variants * settings.budget, variants + combinations * (settings.num_rounds + REPORTED)
    retrained = retrained_coalitions(settings)
    tuned += retrained * held * n / 2 + 4 * held * n
    audited = 0
    if retrained:
        left_out = n if settings.reference == "exact" else 0
        audited, tuned = n + 2 + left_out, tuned + (2 * n + left_out * (n - 1)) * held
    draws = round(draws + retrained + audited + 4 * REPORTED)
    return Work(round(tuned), draws, draws * settings.samples, 2**n)


def describe(settings: Settings, folder: Path, device: str) -> str:
    """The first line of a run: what, on what, how long the repetitions take that are not finished."""
    keys = case_keys(settings.target_emotion, settings.num_crowds, settings.num_seeds, settings.seed)
    files = [folder / CASES / f"{case_name(*key)}.npz" for key in keys]
    there = 0 if settings.overwrite else sum(path.exists() for path in files)
    seconds = estimated_seconds(work_of(settings), settings.epochs, len(keys) - there, settings.jobs, device)
    how_many = {"exact": "all ", "sampled": "", "none": ""}[settings.reference] + str(retrained_coalitions(settings))
    combinations = len(settings.grouping) * len(settings.metric) * len(settings.scoring)
    before = f"({there} finished before) " if there else ""
    return (
        f"{', '.join(settings.target_emotion)}: {len(keys)} repetition{'s' * (len(keys) > 1)} {before}of "
        f"{settings.num_users} people with {settings.texts_per_user} texts each ({settings.crowd}); {combinations} "
        f"combinations of {settings.num_rounds} rounds in {settings.num_groups} groups; {how_many} coalitions "
        f"retrained; {settings.base_model} on {device}, {in_words(seconds)}"
    )


# ---------------------------------------------------------------- playing


def saved(run: RunFolder, case: Case) -> Path:
    """The file of a finished case, which is never played again."""
    return run.path / CASES / f"{case.name}.npz"


def read_saved(run: RunFolder, case: Case) -> Arrays:
    arrays = load_arrays(saved(run, case))
    assert arrays is not None, "a finished case is on disk"
    return arrays


def finished(run: RunFolder, settings: Settings, case: Case, arrays: Arrays) -> Played:
    """With the vectors that the case was played with: another machine's mapper gives other last bits.

    Raises InputError where the texts that are dealt here have other vectors than those that were played with.
    """
    crowd = case.crowd
    people = [person.name for person in crowd.people], [person.kind for person in crowd.people]
    held = crowd_without_texts(crowd.target, arrays, *people)
    pairs = zip((crowd.near, *crowd.vectors, *crowd.later), (held.near, *held.vectors, *held.later), strict=True)
    if not all(ours.shape == theirs.shape and np.allclose(ours, theirs, atol=1e-3) for ours, theirs in pairs):
        raise InputError(f"{saved(run, case)}: was played with other texts than are dealt here; choose another folder")
    as_played = replace(case, crowd=replace(crowd, near=held.near, vectors=held.vectors, later=held.later))
    return played_case(settings, as_played, arrays)


def dtypes_of(run: RunFolder, cases: Mapping[str, Arrays]) -> str | dict[str, str]:
    """The numbers in which models were made and judged, of each case where they are not the same."""
    held = read_record(run.path).get("dtype") if run.finished else None  # cases did not say it before November 2026
    before = held if isinstance(held, dict) else dict.fromkeys(cases, held or "unknown")
    said = {name: str(arrays.get("played/dtype", before.get(name, "unknown"))) for name, arrays in cases.items()}
    first, *others = set(said.values())
    return said if others else first


def parts_of(run: RunFolder, engine: Engine) -> Path:
    """The folder of unfinished work in the engine's dtype: no case is of two."""
    return run.part_path(engine.dtype)


def value_in_run(run: RunFolder, settings: Settings, engine: Engine, cases: Sequence[Case]) -> None:
    """In-run values of the people, a part a case, made where models are made."""
    parts = parts_of(run, engine)
    missing = [case for case in cases if load_arrays(saved(run, case)) is None]
    missing = [case for case in missing if load_arrays(in_run_part(parts, case)) is None]
    values = parallel_map(
        partial(in_run_values, engine),
        [in_run_task(case) for case in missing],
        jobs=settings.jobs if engine.device == "cpu" else 1,
        backend=settings.backend,
        scheduler=settings.scheduler,
        description="in-run values" if missing else "",
    )
    with closing(values):
        for case, found in zip(missing, values, strict=True):
            save_arrays(in_run_part(parts, case), {"values": found})


def in_run_task(case: Case) -> Task:
    """What in_run_values needs of a case."""
    crowd = case.crowd
    return [person.texts for person in crowd.people], crowd.near_texts[:VALIDATION_TEXTS], case.streams("retraining")


def in_run_part(parts: Path, case: Case) -> Path:
    return parts / f"{case.name}-in-run.npz"


def play_cases(run: RunFolder, settings: Settings, engine: Engine, mapper: Mapper, cases: Sequence[Case]) -> None:
    """Plays what is not saved yet, case by case; each case's competitions and retraining side by side."""
    missing = [case for case in cases if load_arrays(saved(run, case)) is None]
    if missing:
        reach_cluster_again(settings.backend, settings.scheduler)
    work = work_of(settings)
    total = len(missing) * (work.tuned * engine.tuning.epochs + work.sampled)
    parts = parts_of(run, engine)
    scratch = parts / "models"
    with (
        tqdm(total=total, unit=" texts", dynamic_ncols=True, smoothing=0.05, disable=not missing) as bar,
        fulfilment(
            engine,
            mapper,
            scratch,
            parts / "adapters",
            jobs=settings.jobs,
            backend=settings.backend,
            scheduler=settings.scheduler,
            advance=bar.update,
        ) as fulfil,
    ):
        for number, case in enumerate(missing, start=1):
            bar.set_description(f"{case.name}, {number} of {len(missing)}")
            plays = plays_of(settings, case)
            done = play_together(plays, fulfil)
            in_run = load_arrays(in_run_part(parts, case))
            assert in_run is not None, "the stage before saved it"
            own = {name.removeprefix(f"{case.name}-"): arrays for name, arrays in done.items()}
            own |= {"crowd": crowd_arrays(case.crowd), "in_run": in_run, "played": {"dtype": np.array(engine.dtype)}}
            keep_adapters(run, parts / "adapters", case)
            save_arrays(
                saved(run, case), {f"{of}/{name}": a for of, arrays in own.items() for name, a in arrays.items()}
            )
            for owner in plays:
                shutil.rmtree(scratch / owner, ignore_errors=True)
        bar.total = bar.n
        bar.refresh()


def keep_adapters(run: RunFolder, made: Path, case: Case) -> None:
    """Moves the case's last models to where the run keeps them, in place of any that a case cut off has left there."""
    kept = run.path / "adapters"
    for old in kept.glob(f"{case.name}-*"):
        shutil.rmtree(old)
    kept.mkdir(exist_ok=True)
    for own in made.glob(f"{case.name}-*"):
        own.rename(kept / own.name)
