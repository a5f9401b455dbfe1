"""The experiment: targets, games, tables, figures and the report."""

import json
import re
import time
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from experiment.command_line import NOT_IDENTITY
from experiment.files import ROOT
from experiment.report import finish_with_report
from experiment.run_folder import RunFolder, hash_of, open_run, shared_path
from point_in_space_sim import plots, results
from point_in_space_sim.corpus import EMOTIONS, Corpus, load_corpus
from point_in_space_sim.engine.assets import cache_folder
from point_in_space_sim.engine.base_model import pick_device
from point_in_space_sim.engine.fine_tuning import write_chat_jsonl
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.engine.variants import (
    Workshop,
    cached_base_model,
    discard_weights,
    fulfil_requests,
    planned_cost,
    return_memory,
)
from point_in_space_sim.mapper import ROBERTA, Mapper, load_mapper, map_texts
from point_in_space_sim.protocols import Averaged, Game, Tuned, play
from point_in_space_sim.report_page import report_page
from point_in_space_sim.results import DRAWS, MODEL, answer_in_words, read_csv
from point_in_space_sim.settings import Settings, check_settings, target_names
from point_in_space_sim.target import (
    Neighbourhood,
    Target,
    emotion_target,
    find_neighbourhood,
    mixture_target,
    parse_mixture,
    planned_work,
    text_target,
)

# SmolLM2-135M on one core that multiplies matrices at 100 GFLOP/s: seconds a comment and epoch, seconds a sample; and
# seconds to load the models, and to start other processes that do.
SECONDS_TUNED, SECONDS_SAMPLED, REFERENCE_RATE = 0.11, 0.09, 100e9
SECONDS_TO_START, SECONDS_TO_START_WORKERS = 12, 15


def estimated_seconds(settings: Settings) -> float:
    """From the number of comments tuned on and sampled, and a measurement of this machine's matrix products."""

    tuned, sampled = planned_work(settings.neighbours, settings.generations, settings.variants, settings.samples)
    matrix = np.ones((768, 768), dtype=np.float32)
    with threadpool_limits(1):
        rate = 0.0
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            rate = max(rate, 2 * 768**3 / (time.perf_counter() - start))
    work = (tuned * settings.epochs * SECONDS_TUNED + sampled * SECONDS_SAMPLED) * len(target_names(settings))
    work *= settings.num_seeds / min(settings.jobs, most_at_once(settings))
    start = SECONDS_TO_START + SECONDS_TO_START_WORKERS * (settings.jobs > 1)
    return (start + work) * REFERENCE_RATE / rate


def most_at_once(settings: Settings) -> int:
    """Models that a step has to tune: the competition's, those of the average, and the random pick's."""
    return 2 * settings.variants + 1


def in_words(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {max(5, round(seconds, -1)):.0f} seconds"


def plan(settings: Settings, targets: list[str]) -> str:
    """The first line of a run: what, on what, how long."""
    names = ", ".join(targets) if len(targets) <= 8 else f"{len(targets)} targets"
    return (
        f"{names}; {settings.num_seeds} seed{'s' * (settings.num_seeds > 1)}; single, multi "
        f"({settings.generations} x {settings.variants}), sequential, averaged; {settings.base_model} tuned by "
        f"{settings.tuning} on {settings.corpus} comments, mapper {settings.mapper}; {settings.jobs} at once on "
        f"{settings.device}; {in_words(estimated_seconds(settings))}"
    )


def tuned_settings(settings: Settings) -> tuple[TuningSettings, SamplingSettings]:
    def given(cls: Any) -> dict[str, Any]:
        return {field.name: getattr(settings, field.name) for field in fields(cls) if field.name != "method"}

    return TuningSettings(method=settings.tuning, **given(TuningSettings)), SamplingSettings(**given(SamplingSettings))


def main(settings: Settings) -> None:
    check_settings(settings)
    output_dir = settings.output_dir or ROOT / "results" / "point_in_space_sim" / settings.preset
    tuning, sampling = tuned_settings(settings)
    print(plan(settings, target_names(settings)), flush=True)
    if settings.dry_run:
        print(f"results would go to {output_dir}")
        return

    corpus = load_corpus(settings.corpus)
    device = str(pick_device(settings.device))
    mapper = load_mapper(settings.mapper, device)
    vectors = map_texts(mapper, corpus.texts, cache_folder() / "vectors")
    neighbourhoods = [
        find_neighbourhood(target, vectors, settings.neighbours)
        for target in targets(settings, corpus, mapper, vectors)
    ]
    base = cached_base_model(settings.base_model, device)
    identity = {
        # Targets are no part of it: other ones are added to the run that the folder holds.
        **{
            name: value
            for name, value in asdict(settings).items()
            if name not in (*NOT_IDENTITY, "preset", "emotions", "target_text", "target_emotions", "dry_run")
        },
        **asdict(tuning),
        **asdict(sampling),
        "tuning": tuning.method,
        "device": device.partition(":")[0],
        "dtype": str(base.dtype).removeprefix("torch."),
        "mapper": mapper.name,
        "mapper_sha256": mapper.sha256,
        "base_model_sha256": base.sha256,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
    }
    workshop = Workshop(
        base_model=settings.base_model,
        device=device,
        tuning=tuning,
        sampling=sampling,
        samples=settings.samples,
        parts=Path(),
        adapters=Path(),
        prefix="",
    )
    if settings.jobs > 1:
        # The workers load their own.
        cached_base_model.cache_clear()
    del base
    return_memory()
    with open_run(output_dir, identity, overwrite=settings.overwrite, resume=settings.resume) as run:
        summary = play_all(settings, run, workshop, neighbourhoods, corpus, vectors, mapper)
    print(f"results in {output_dir}: {answer_in_words(summary)}")


def targets(settings: Settings, corpus: "Corpus", mapper: "Mapper", vectors: Any) -> "list[Target]":

    if settings.target_text is not None:
        text = " ".join(settings.target_text.split())
        return [text_target(text, mapper([text])[0], corpus.texts)]
    if settings.target_emotions is not None:
        return [mixture_target(parse_mixture(settings.target_emotions))]
    return [emotion_target(emotion, vectors) for emotion in target_names(settings)]


def play_all(
    settings: Settings,
    run: "RunFolder",
    workshop: "Workshop",
    neighbourhoods: "list[Neighbourhood]",
    corpus: "Corpus",
    vectors: Any,
    mapper: "Mapper",
) -> "pd.DataFrame":
    """Plays every target and seed that the folder does not hold yet, and writes all files. Gives the summary."""

    tables, _ = held_tables(run.path) if run.finished else ({}, [])
    parts = [
        f"{slug(n.target.name)}-seed-{seed}"
        for n in neighbourhoods
        for seed in range(settings.seed, settings.seed + settings.num_seeds)
    ]
    held = list(tables["summary"]["emotion"]) if tables else []
    missing = [neighbourhood for neighbourhood in neighbourhoods if neighbourhood.target.name not in held]
    names = [neighbourhood.target.name for neighbourhood in missing]
    if not missing:
        print(f"{', '.join(n.target.name for n in neighbourhoods)}: finished before, nothing to do", flush=True)
        return tables["summary"]
    comments, draws = [tables["comments"]] if tables else [], [tables["draws"]] if tables else []
    nearby = [tables["neighbourhoods"]] if tables else []
    games = [
        Game(
            n.target.name,
            tuple(corpus.texts[i] for i in n.members),
            n.centroid,
            seed,
            settings.generations,
            settings.variants,
        )
        for n in missing
        for seed in range(settings.seed, settings.seed + settings.num_seeds)
    ]
    cost = planned_cost(games[0], workshop)
    with tqdm(total=round(cost * len(games)), unit=" comments", dynamic_ncols=True, smoothing=0.05) as progress:
        for done, game in enumerate(games, start=1):
            name = f"{slug(game.target)}-seed-{game.seed}"
            progress.set_description(f"{game.target}, seed {game.seed}")
            own = replace(workshop, parts=run.part_path(name), adapters=run.path / "adapters", prefix=name)
            # More workers than a step has models would only take memory.
            jobs = min(settings.jobs, most_at_once(settings))
            with run.stage("tuning and sampling"):
                drawn = play(game, partial(fulfil_requests, own, game, mapper, jobs, progress))
                write_training(drawn, run.path / "training", name)
                discard_weights(own)
            comments.append(results.comment_table(game.target, game.seed, drawn))
            draws.append(results.draw_table(game.target, game.seed, drawn))
            # What was done before, and what protocols happened to share.
            progress.update(cost * done - progress.n)
    nearby += [results.neighbourhood_table(n, corpus.texts, vectors) for n in missing]
    # What auto came to.
    own_mapper = {"auto": "roberta" if mapper.name == ROBERTA else "embedded"}.get(settings.mapper, settings.mapper)
    sources = {"base_model": workshop.base_model, "mapper": own_mapper, "corpus": settings.corpus}
    sources = {name: shared_path(Path(source)) if Path(source).exists() else source for name, source in sources.items()}
    facts = {"sources": sources}
    return write_results(run, workshop, [*held, *names], comments, draws, nearby, mapper.name, facts)


def held_tables(path: Path) -> "tuple[dict[str, pd.DataFrame], list[list[str]]]":
    """The tables of a finished run, without rows of a target whose addition was interrupted (run.json comes last),
    and the commands that made it."""

    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    complete = record["emotions"]
    tables = {name: read_csv(path / f"{name}.csv") for name in ("comments", "generations", "neighbourhoods", "summary")}
    tables = {name: table[table["emotion"].isin(complete)].reset_index(drop=True) for name, table in tables.items()}
    commands = [*record.get("earlier_commands", []), record["command"]]
    return {**tables, "draws": tables["generations"][MODEL + DRAWS]}, commands


def write_training(drawn: Any, folder: Path, prefix: str) -> None:
    """What each variant was tuned on, as chat messages: one file a variant."""

    for draw, _ in drawn:
        models = draw.model.models if isinstance(draw.model, Averaged) else (draw.model,)
        for variant, model in enumerate(models, start=1):
            if isinstance(model, Tuned):
                variant = variant if isinstance(draw.model, Averaged) else draw.variant
                name = f"{prefix}-{draw.protocol}-{draw.generation}-variant-{variant}.jsonl"
                write_chat_jsonl(model.texts, folder / name)


def write_results(
    run: "RunFolder",
    workshop: "Workshop",
    names: list[str],
    comment_tables: "list[pd.DataFrame]",
    draw_tables: "list[pd.DataFrame]",
    neighbourhood_tables: "list[pd.DataFrame]",
    mapper: str,
    facts: dict[str, Any],
) -> "pd.DataFrame":
    """All of the run's tables, figures and pages, and run.json last: the mark that they are complete."""

    names = [*(emotion for emotion in EMOTIONS if emotion in names), *sorted(set(names) - set(EMOTIONS))]

    def together(tables: "list[pd.DataFrame]") -> "pd.DataFrame":
        # In the emotions' order, in whatever order they were run.
        table = pd.concat(tables, ignore_index=True)
        order = table["emotion"].map(names.index).sort_values(kind="stable").index
        return table.loc[order].reset_index(drop=True)

    with run.stage("tables"):
        comments, draws, neighbourhoods = map(together, (comment_tables, draw_tables, neighbourhood_tables))
        generations = results.generation_table(comments, draws, neighbourhoods)
        summary = results.summary_table(comments, generations, neighbourhoods)
        for name, table in (
            ("comments", comments),
            ("generations", generations),
            ("neighbourhoods", neighbourhoods),
            ("summary", summary),
        ):
            results.write_csv(table, run.path / f"{name}.csv")
    with run.stage("figures"):
        seeds = comments["seed"].nunique()
        caption = f"base model {Path(workshop.base_model).name}, mapper {mapper}, {seeds} seed{'s' * (seeds > 1)}"
        plots.write_figures(run.path, comments, generations, neighbourhoods, summary, caption)
    page = report_page(comments, generations, neighbourhoods, summary, Path(workshop.base_model).name, mapper)
    answer = results.overall(summary)
    finish_with_report(run, page, emotions=names, answer=answer, **facts)
    return summary


def slug(name: str) -> str:
    """The target's name as a file name."""

    words = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    return name if name in EMOTIONS else f"{words}-{hash_of(name)[:6]}"
