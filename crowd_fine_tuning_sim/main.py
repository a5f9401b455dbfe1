"""The experiment: crowds compete with language models and are paid; every coalition is retrained; then tables, figures
and the report."""

import importlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from crowd_fine_tuning_sim import results
from crowd_fine_tuning_sim.asking import Ask, play_together
from crowd_fine_tuning_sim.crowds import Crowd, Source, load_source, real_crowd, simulated_crowd
from crowd_fine_tuning_sim.in_run import tune_in_run
from crowd_fine_tuning_sim.plots import write_figures
from crowd_fine_tuning_sim.report_page import report_page
from crowd_fine_tuning_sim.retraining import (
    Retrained,
    all_coalitions,
    audited_coalitions,
    retrain,
    values_of,
)
from crowd_fine_tuning_sim.settings import Settings, check_settings, kinds_of, retrained_coalitions
from crowd_fine_tuning_sim.text_world import TextWorld
from experiment.command_line import NOT_IDENTITY, named_function, naming, tell
from experiment.files import ROOT, sha256_file
from experiment.parallel import parallel_map, reach_cluster
from experiment.report import finish_with_report
from experiment.run_folder import Arrays, RunFolder, load_arrays, open_run, save_arrays
from experiment.tables import LARGE, write_lines, write_table
from point_in_space_sim.engine.assets import cache_folder
from point_in_space_sim.engine.base_model import BaseModel, pick_device
from point_in_space_sim.engine.options import engine_settings
from point_in_space_sim.engine.recipes import Model, Request, Texts, name_of
from point_in_space_sim.engine.rehearsal import rehearse
from point_in_space_sim.engine.variants import (
    Engine,
    cached_base_model,
    engine_of,
    fulfilment,
    leave_models_to_workers,
)
from point_in_space_sim.main import estimated_seconds, in_words, models_identity
from point_in_space_sim.mapper import Mapper, load_mapper, map_texts
from point_in_space_sim.protocols import Work, derived_seed
from user_grouping_evaluation_sim.competition import Rules, compete
from user_grouping_evaluation_sim.ledger import ledger_lines, numbers_in, recorded
from user_grouping_evaluation_sim.settings import REGISTRIES

RESULTS = ROOT / "results" / "crowd_fine_tuning_sim"
VALIDATION_TEXTS = 16  # the nearest of the neighbourhood, whose loss values a step of tuning for the in-run values


def main(settings: Settings) -> None:
    check_settings(settings)
    folder = settings.output_dir or RESULTS / settings.preset
    with naming("--device"):
        device = str(pick_device(settings.device))
    tell(describe(settings, device))
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
    tuning, sampling = engine_settings(settings)
    with naming(f"--base-model {settings.base_model}"):
        base = cached_base_model(settings.base_model, device, settings.prompt)
    held = (person.texts + person.later for crowd in crowds for person in crowd.people)
    texts = list(dict.fromkeys(text for own in held for text in own))
    if longer := rehearse(base, mapper, texts, tuning, sampling):
        tell(f"{longer} of {len(texts)} texts are longer than --max-new-tokens {sampling.max_new_tokens}")
    identity = identity_of(settings, base, mapper, source)
    seeds = range(settings.seed, settings.seed + settings.num_seeds)
    cases = [results.Case(crowd, i % settings.num_crowds + 1, seed) for seed in seeds for i, crowd in enumerate(crowds)]
    with open_run(folder, identity, overwrite=settings.overwrite, resume=settings.resume) as run:
        if run.finished:
            tell(f"already complete: {folder} (--overwrite runs it again)")
            return
        engine = engine_of(settings, device, tuning, sampling, settings.samples)
        del base
        leave_models_to_workers(settings)
        with run.stage("in-run values"):
            value_in_run(run, settings, engine, cases)
        with run.stage("competition and retraining"):
            play_cases(run, settings, engine, mapper, cases)
        with run.stage("tables"):
            played = results.with_other_seeds(
                [
                    results.played_case(
                        settings,
                        case,
                        load_arrays(part_of(run, case)) or {},
                        (load_arrays(in_run_part(run, case)) or {})["values"],
                    )
                    for case in cases
                ]
            )
            tables = results.run_tables(settings, played)
            for name, table in tables.items():
                write_table(table, run.path, name)
            if settings.reference != "none":
                accounts = [account for each in played for account in results.accounts_of(settings, each).values()]
                lines = ledger_lines(run.identity, accounts, results.LEDGER)
                write_lines(lines, run.path, "ledger", large=numbers_in(accounts) > LARGE)
        with run.stage("figures"):
            drawn = write_figures(run.path, tables, played)
        page = report_page(settings, tables, drawn, played)
        finish_with_report(run, page, targets=list(settings.target_emotion), answer=results.answer_of(tables))
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
    """All that decides the results: settings, models and texts by their content, the user's own code."""
    own = [name for option in REGISTRIES for name in getattr(settings, option) if ":" in name]
    modules = {name: importlib.import_module(name.partition(":")[0]).__file__ for name in own}
    return {
        **{name: value for name, value in asdict(settings).items() if name not in (*NOT_IDENTITY, "preset")},
        **models_identity(base, mapper),
        "crowd": source.name,
        "crowd_sha256": source.sha256,
        "code_sha256": {name: sha256_file(str(module)) for name, module in modules.items()},
    }


# ---------------------------------------------------------------- what a run takes


def work_of(settings: Settings) -> Work:
    """Of one case: texts tuned on in one epoch, texts sampled, models that can be made at once."""
    n, held = settings.num_users, settings.texts_per_user
    combinations = len(settings.grouping) * len(settings.metric) * len(settings.scoring)
    variants = combinations * settings.num_rounds * (settings.num_groups + 0.5)  # a merged one in some rounds
    tuned, sampled = variants * settings.budget, variants + combinations * (settings.num_rounds + 1)
    retrained = retrained_coalitions(settings)
    tuned += retrained * held * n / 2 + 4 * held * n
    audited = 0
    if retrained:
        left_out = n if settings.reference == "exact" else 0
        audited, tuned = n + 2 + left_out, tuned + (2 * n + left_out * (n - 1)) * held
    return Work(round(tuned), round((sampled + retrained + audited + 4) * settings.samples), 2**n)


def describe(settings: Settings, device: str) -> str:
    """The first line of a run: what, on what, how long."""
    cases = len(settings.target_emotion) * settings.num_crowds * settings.num_seeds
    seconds = estimated_seconds(work_of(settings), settings.epochs, cases, settings.jobs, device)
    how_many = {"exact": "all ", "sampled": "", "none": ""}[settings.reference] + str(retrained_coalitions(settings))
    combinations = len(settings.grouping) * len(settings.metric) * len(settings.scoring)
    return (
        f"{', '.join(settings.target_emotion)}: {cases} repetition{'s' * (cases > 1)} of {settings.num_users} people "
        f"with {settings.texts_per_user} texts each ({settings.crowd}); {combinations} combinations of "
        f"{settings.num_rounds} rounds in {settings.num_groups} groups; {how_many} coalitions "
        f"retrained; {settings.base_model} on {device}, {in_words(seconds)}"
    )


# ---------------------------------------------------------------- playing


def part_of(run: RunFolder, case: results.Case) -> Path:
    return run.part_path(f"{case.name}.npz")


def value_in_run(run: RunFolder, settings: Settings, engine: Engine, cases: Sequence[results.Case]) -> None:
    """In-run values of the people, a part a case, made where models are made."""
    missing = [case for case in cases if load_arrays(in_run_part(run, case)) is None]
    values = parallel_map(
        partial(in_run_values, engine),
        missing,
        jobs=settings.jobs if engine.device == "cpu" else 1,
        backend=settings.backend,
        scheduler=settings.scheduler,
        description="in-run values" if missing else "",
    )
    with closing(values):
        for case, found in zip(missing, values, strict=True):
            save_arrays(in_run_part(run, case), {"values": found})


def in_run_values(engine: Engine, case: results.Case) -> np.ndarray:
    """(n,), in a worker."""
    torch.set_num_threads(1)  # two on a busy machine wait for each other
    base = cached_base_model(engine.base_model, engine.device, engine.prompt)
    texts = [person.texts for person in case.crowd.people]
    validation = case.crowd.near_texts[:VALIDATION_TEXTS]
    return tune_in_run(base, texts, validation, engine.tuning, case.streams("retraining")).values


def in_run_part(run: RunFolder, case: results.Case) -> Path:
    return run.part_path(f"{case.name}-in-run.npz")


def play_cases(
    run: RunFolder, settings: Settings, engine: Engine, mapper: Mapper, cases: Sequence[results.Case]
) -> None:
    """Plays what is not saved yet, case by case; each case's competitions and retraining side by side."""
    missing = [case for case in cases if load_arrays(part_of(run, case)) is None]
    work = work_of(settings)
    total = len(missing) * (work.tuned * engine.tuning.epochs + work.sampled)
    scratch = run.part_path("models")
    with (
        tqdm(total=total, unit=" texts", dynamic_ncols=True, smoothing=0.05, disable=not missing) as bar,
        fulfilment(
            engine,
            mapper,
            scratch,
            run.path / "adapters",
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
            save_arrays(part_of(run, case), {f"{k}/{name}": a for k, own in done.items() for name, a in own.items()})
            for owner in plays:
                shutil.rmtree(scratch / owner, ignore_errors=True)
        bar.total = bar.n
        bar.refresh()


def plays_of(settings: Settings, case: results.Case) -> dict[str, Callable[[Ask], Arrays]]:
    """By the names under which their arrays are saved: the competitions by their numbers, then the retraining."""
    plays: dict[str, Callable[[Ask], Arrays]] = {
        f"{case.name}-{number}": partial(play_competition, settings, case, combination)
        for number, combination in enumerate(results.combinations_of(settings))
    }
    return plays | {f"{case.name}-retraining": partial(play_retraining, settings, case)}


def play_competition(settings: Settings, case: results.Case, combination: results.Combination, ask: Ask) -> Arrays:
    """One competition. points (n,); of the rounds what ledger.recorded gives, (T, ...);
    judged (T + 1, 28), the mean vector of a fresh sample of the model before each round and at the end; final
    (samples, 28), and its texts."""
    grouping, metric, scoring = (
        named_function(f"--{option}", name, registry)
        for (option, registry), name in zip(REGISTRIES.items(), combination, strict=True)
    )
    crowd, streams = case.crowd, case.streams
    pool = tuple(text for person in crowd.people for text in person.texts + person.later)

    def contributed(round_number: int) -> tuple[Texts, ...]:
        return crowd.texts_at(round_number / settings.num_rounds)

    world = TextWorld(contributed, pool, crowd.centroid, metric, settings.budget, streams, ask)
    rules = Rules(settings.num_groups, settings.num_rounds, settings.error_probability)
    rng = np.random.default_rng(streams("rounds"))
    steps = list(compete(world, [None], (1, len(crowd.people)), grouping, scoring, rules, rng))
    final: Model = steps[-1].model[0]
    report = streams("report")
    kept = () if final is None else (f"{case.name}-{'-'.join(combination)}".replace(":", "."),)
    drawn = ask([Request(final, (report,), kept)])[name_of(final), report]
    rows = [recorded(step) for step in steps]
    return {
        **{name: np.array([row[name] for row in rows]) for name in rows[0]},
        "points": steps[-1].standing.points[0],
        "judged": np.array([*world.judged, drawn.vectors.mean(axis=0)]),
        "final": drawn.vectors,
        "texts": np.array(drawn.texts, dtype=str),
    }


def play_retraining(settings: Settings, case: results.Case, ask: Ask) -> Arrays:
    """The coalitions' samples, and fresh ones of the models that the competitions are compared with.

    coalitions (m, n), vectors (m, samples, 28); audited (n + 2 or 2 n + 2, samples, 28), of audited_coalitions tuned
    and sampled anew, so that neither pay nor leaving one out is checked by what it was made of, but with --reference
    none; compared (k, n), the coalitions of `fresh` (k, samples, 28): nobody, everybody, and by each metric the best
    single person by the audits and the best retrained coalition.
    """
    texts = [person.texts for person in case.crowd.people]
    n, tuning, sample = len(texts), case.streams("retraining"), case.streams("valuation")
    everyone = np.ones((1, n), dtype=bool)
    audited = {}
    if settings.reference != "none":
        at_the_end, coalitions = case.crowd.texts_at(1.0), audited_coalitions(n, settings.reference == "exact")
        drawn = retrain(at_the_end, coalitions, case.streams("audit tuning"), case.streams("audit"), ask)
        audited = {"audited": drawn.vectors}
    if settings.reference == "exact":
        found = retrain(texts, all_coalitions(n), tuning, sample, ask)
    else:
        found = retrain(texts, np.zeros((1, n), dtype=bool), tuning, sample, ask)
        if settings.reference == "sampled":
            asked = [found]

            def vectors_of(coalitions: np.ndarray) -> np.ndarray:
                drawn = retrain(texts, coalitions, tuning, sample, ask)
                new = coalitions.any(axis=1)  # the empty one is there
                asked.append(Retrained(coalitions[new], drawn.vectors[new]))
                return drawn.vectors

            results.sampled_reference(settings, case, vectors_of, found.vectors[0])
            found = Retrained(
                np.concatenate([each.coalitions for each in asked]), np.concatenate([each.vectors for each in asked])
            )
    compared = [~everyone[0], everyone[0]]
    for name in settings.metric if audited else ():
        metric = named_function("--metric", name, REGISTRIES["metric"])
        values, _ = values_of(found.vectors, case.crowd.centroid, metric)
        alone, _ = values_of(audited["audited"][1 : n + 1], case.crowd.centroid, metric)
        compared += [np.arange(n) == alone.argmax(), found.coalitions[values.argmax()]]
    report = case.streams("report")
    fresh = retrain(texts, np.array(compared), tuning, report, ask)
    return {
        "coalitions": found.coalitions,
        "vectors": found.vectors,
        **audited,
        "compared": fresh.coalitions,
        "fresh": fresh.vectors,
    }
