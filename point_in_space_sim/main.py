"""The experiment: targets, games, tables, figures and the report."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from experiment.command_line import NOT_IDENTITY, naming, tell
from experiment.errors import InputError
from experiment.figures import no_figures
from experiment.files import ROOT, replace_atomically
from experiment.parallel import reach_cluster
from experiment.report import finish_with_report
from experiment.run_folder import RunFolder, open_run, read_record, shared_path
from experiment.tables import write_table
from point_in_space_sim import results
from point_in_space_sim.corpus import Corpus, load_corpus
from point_in_space_sim.engine.assets import cache_folder
from point_in_space_sim.engine.base_model import BaseModel, dtype_name, pick_device
from point_in_space_sim.engine.fine_tuning import write_chat_jsonl
from point_in_space_sim.engine.options import engine_settings
from point_in_space_sim.engine.recipes import Averaged, Sampled, Tuned
from point_in_space_sim.engine.rehearsal import measured_rate, rehearse
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.engine.variants import (
    STACK,
    Engine,
    base_of,
    engine_of,
    fulfilment,
    leave_models_to_workers,
    stacking,
)
from point_in_space_sim.mapper import Mapper, load_mapper, map_texts
from point_in_space_sim.plots import comments_page, write_figures
from point_in_space_sim.pool import Pool, find_users, neighbourhood_pool, users_pool
from point_in_space_sim.protocols import Draw, Game, Work, derived_seed, play, work_of
from point_in_space_sim.report_page import FIGURES, report_page
from point_in_space_sim.settings import Settings, check_settings, has_users, played, target_names
from point_in_space_sim.target import (
    Neighbourhood,
    Target,
    emotion_target,
    find_neighbourhood,
    mixture_target,
    parse_mixture,
    text_target,
)

RESULTS = ROOT / "results" / "point_in_space_sim"

# Of SmolLM2-135M on a device that multiplies matrices at REFERENCE_RATE (one core; a GPU). Those of CPUs are fitted to
# the default runs of experiments 1 and 3, the latter with bfloat16 and without.
REFERENCE_RATE = {"cpu": 100e9, "cuda": 700e12}
SECONDS_TUNED = {"cpu": 0.11, "cuda": 0.001}  # a comment and epoch
SECONDS_A_DRAW = {"cpu": 3.5, "cuda": 0}  # a sample and the model that it is of, however small
SECONDS_SAMPLED = {"cpu": 0.1, "cuda": 0.001}  # a comment of a sample, on top of that
# To load the models, and to start other processes that do.
SECONDS_TO_START, SECONDS_TO_START_WORKERS = 12, 15


def main(settings: Settings) -> None:
    check_settings(settings)
    folder = settings.output_dir or RESULTS / settings.preset
    seeds = range(settings.seed, settings.seed + settings.num_seeds)
    protocols = played(settings)
    work = work_of(protocols, planned_pool(settings), settings.generations, settings.variants, settings.samples)
    with naming("--device"):
        device = str(pick_device(settings.device))
    tell(plan(settings, work, device))
    if settings.dry_run:
        tell(f"results would go to {folder}")
        return

    with naming("--scheduler"):
        reach_cluster(settings.backend, settings.scheduler)
    with naming("--corpus"):
        corpus = load_corpus(settings.corpus)
    with naming(f"--mapper {settings.mapper}"):
        mapper = load_mapper(settings.mapper, device)
        vectors = map_texts(mapper, corpus.texts, cache_folder() / "vectors")
        targets = targets_of(settings, corpus, mapper, vectors)
    with naming(f"--neighbours {settings.neighbours}"):
        neighbourhoods = [find_neighbourhood(target, vectors, settings.neighbours) for target in targets]
    tuning, sampling = engine_settings(settings, settings.tuning)
    engine = engine_of(settings, device, tuning, sampling, settings.samples)
    with naming(f"--base-model {settings.base_model}"):
        base = base_of(engine)
    engine = stacking(engine, base)
    texts = list(dict.fromkeys(corpus.texts[i] for near in neighbourhoods for i in near.members))
    if longer := rehearse(base, mapper, texts, tuning, sampling):
        tell(
            f"{longer} of {len(texts)} comments are longer than --max-new-tokens {sampling.max_new_tokens}: what is "
            "written at such length is cut off, and counts as broken"
        )
    identity = identity_of(settings, tuning, sampling, base, mapper, corpus)
    del base
    leave_models_to_workers(settings)

    with naming("--contamination"):
        games = games_of(settings, neighbourhoods, corpus.texts, vectors, seeds)
    with open_run(folder, identity, overwrite=settings.overwrite, resume=settings.resume) as run:
        if run.finished and is_complete(run.path, [target.name for target in targets], seeds):
            tell(f"{', '.join(target_names(settings))}: finished before, nothing to do")
            summary = results.read_table(run.path, "summary")
        else:
            missing = [game for game in games if results.load_game(saved(run.path, game)) is None]
            for game, drawn in play_all(run, engine, mapper, missing, protocols, work, settings):
                write_training(drawn, run.path / "training", game.name, settings.prompt)
                tables = results.game_tables(games[game], game.pool, corpus.texts, vectors, game.seed, drawn)
                results.save_game(saved(run.path, game), tables)
                shutil.rmtree(run.part_path("games") / game.name, ignore_errors=True)
            summary = write_results(run, settings, seeds, mapper.name)
    tell(f"results in {folder}: {results.answer_in_words(summary)}")


def plan(settings: Settings, work: Work, device: str) -> str:
    """The first line of a run: what, on what, how long."""
    targets = target_names(settings)
    names = ", ".join(targets) if len(targets) <= 8 else f"{len(targets)} targets"
    seconds = estimated_seconds(work, settings.epochs, len(targets) * settings.num_seeds, settings.jobs, device)
    at_once = STACK * max(torch.cuda.device_count(), 1) if device.startswith("cuda") else settings.jobs
    protocols = ", ".join(
        f"multi ({settings.generations} x {settings.variants})" if name == "multi" else name
        for name in played(settings)
        if name != "base"
    )
    return (
        f"{names}; {settings.num_seeds} seed{'s' * (settings.num_seeds > 1)}; {protocols}; {settings.base_model} tuned "
        f"by {settings.tuning} on {settings.corpus} comments, mapper {settings.mapper}; {at_once} at once on "
        f"{device}; {in_words(seconds)}"
    )


def estimated_seconds(work: Work, epochs: int, games: int, jobs: int, device: str) -> float:
    """From what is tuned and sampled, and a measurement of the device's matrix products."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    slower = REFERENCE_RATE[kind] / measured_rate(device)
    at_once = min(jobs, max(torch.cuda.device_count(), 1) if kind == "cuda" else work.at_once)
    sampling = work.draws * SECONDS_A_DRAW[kind] + work.sampled * SECONDS_SAMPLED[kind]
    a_game = (work.tuned * epochs * SECONDS_TUNED[kind] + sampling) / at_once
    start = SECONDS_TO_START + SECONDS_TO_START_WORKERS * (at_once > 1)
    return (start + games * a_game) * slower


def in_words(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {max(5, round(seconds, -1)):.0f} seconds"


def targets_of(settings: Settings, corpus: Corpus, mapper: Mapper, vectors: np.ndarray) -> list[Target]:
    if settings.target_text is not None:
        text = " ".join(settings.target_text.split())
        return [text_target(text, mapper([text])[0], corpus.texts)]
    if settings.target_emotions is not None:
        return [mixture_target(parse_mixture(settings.target_emotions))]
    return [emotion_target(emotion, vectors) for emotion in target_names(settings)]


def planned_pool(settings: Settings) -> Pool:
    """A pool of the sizes that the run's pools will have, of numbers in place of comments."""
    if not has_users(settings):
        texts = tuple(map(str, range(settings.neighbours)))
        return Pool(texts, texts, tuple((text,) for text in texts))
    size = settings.neighbours // settings.num_users
    users = [tuple(f"{user}, {i}" for i in range(size)) for user in range(settings.num_users)]
    texts = tuple(text for user in users for text in user)
    on_target = texts[: size * (settings.num_users - round(settings.contamination * settings.num_users))]
    return Pool(texts, on_target, tuple(users) if settings.deal == "user" else tuple((text,) for text in texts))


def games_of(
    settings: Settings,
    neighbourhoods: Sequence[Neighbourhood],
    texts: Sequence[str],
    vectors: np.ndarray,
    seeds: Sequence[int],
) -> dict[Game, Neighbourhood]:
    """A game for each seed and target, all targets of a seed first. texts, vectors: the corpus's."""
    games = {}
    for seed in seeds:
        for near in neighbourhoods:
            pool = neighbourhood_pool(near, texts)
            if has_users(settings):
                rng = np.random.default_rng(derived_seed(seed, near.target.name, "users"))
                users = find_users(near, vectors, settings.num_users, settings.contamination, rng)
                pool = users_pool(near, vectors, texts, users, settings.deal)
            aim = near.centroid if settings.choose_by == "centroid" else near.target.vector
            games[Game(near.target.name, pool, aim, seed, settings.generations, settings.variants)] = near
    return games


def models_identity(base: BaseModel, mapper: Mapper) -> dict[str, Any]:
    """What decides a run's results of its models: by their content, and how they are used."""
    return {
        "device": base.device.type,
        "dtype": dtype_name(base.dtype),
        "rendered_prompt": base.rendered_prompt,
        "mapper": mapper.name,
        "mapper_sha256": mapper.sha256,
        "base_model_sha256": base.sha256,
    }


def identity_of(
    settings: Settings,
    tuning: TuningSettings,
    sampling: SamplingSettings,
    base: BaseModel,
    mapper: Mapper,
    corpus: Corpus,
) -> dict[str, Any]:
    """All that decides a game's results. Targets are no part of it: other ones are added to the folder's run."""
    skipped = (*NOT_IDENTITY, "emotions", "target_text", "target_emotions")
    return {
        **{name: value for name, value in asdict(settings).items() if name not in skipped},
        **asdict(tuning),
        **asdict(sampling),
        "tuning": tuning.method,
        "protocols": played(settings),
        **models_identity(base, mapper),
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
    }


def sources_of(settings: Settings) -> dict[str, str]:
    """Where models and corpus were read from, for run.json: a name, or a path."""
    sources = {"base_model": settings.base_model, "mapper": settings.mapper, "corpus": settings.corpus}
    return {name: shared_path(Path(source)) if Path(source).exists() else source for name, source in sources.items()}


def saved(folder: Path, game: Game) -> Path:
    """The file of a finished game, which is never played again."""
    return folder / "games" / f"{game.name}.npz"


def is_complete(folder: Path, targets: Sequence[str], seeds: Sequence[int]) -> bool:
    """Whether a finished run's tables hold all of the targets, and all that its games do.

    Raises InputError where they lack a target, and the folder was handed on without the games that they came from.
    """
    recorded = read_record(folder)["emotions"]
    games = results.finished_targets(folder / "games", seeds)
    if gone := [name for name in recorded if name not in games]:
        if set(targets) <= set(recorded):
            return True
        raise InputError(
            f"{folder}: holds a run whose games (games/) of {', '.join(gone)} are not here, so no target can be added; "
            "choose another folder"
        )
    return set(targets) <= set(recorded) and set(games) == set(recorded)


def play_all(
    run: RunFolder,
    engine: Engine,
    mapper: Mapper,
    games: Sequence[Game],
    protocols: Sequence[str],
    work: Work,
    settings: Settings,
) -> Iterator[tuple[Game, list[tuple[Draw, Sampled]]]]:
    """The games with the samples that were drawn in them, as they are finished; with a progress bar."""
    cost = work.tuned * engine.tuning.epochs + work.sampled
    # More workers than there are models to make at once would only take memory.
    jobs = min(settings.jobs, work.at_once * len(games))
    with (
        tqdm(total=cost * len(games), unit=" comments", dynamic_ncols=True, smoothing=0.05, disable=not games) as bar,
        run.stage("tuning and sampling"),
        fulfilment(
            engine,
            mapper,
            run.part_path("games"),
            run.path / "adapters",
            jobs=jobs,
            backend=settings.backend,
            scheduler=settings.scheduler,
            advance=bar.update,
        ) as fulfil,
    ):
        for done, (game, drawn) in enumerate(play(games, fulfil, protocols), start=1):
            bar.set_description(f"{done} of {len(games)} games")
            yield game, drawn
        bar.total = bar.n  # what was done before, and what protocols happened to share, was no work
        bar.refresh()


def write_training(drawn: Sequence[tuple[Draw, Sampled]], folder: Path, prefix: str, prompt: str) -> None:
    """What each variant was tuned on, as chat messages: one file a variant."""
    for draw, _ in drawn:
        models = draw.model.models if isinstance(draw.model, Averaged) else (draw.model,)
        for variant, model in enumerate(models, start=1):
            if isinstance(model, Tuned):
                variant = variant if isinstance(draw.model, Averaged) else draw.variant
                name = f"{prefix}-{draw.protocol}-{draw.generation}-variant-{variant}.jsonl"
                write_chat_jsonl(model.texts, folder / name, prompt)


def write_results(run: RunFolder, settings: Settings, seeds: Sequence[int], mapper: str) -> pd.DataFrame:
    """All of the run's tables, figures and pages from its finished games, and run.json last: they are complete.

    mapper: its name. Gives the summary.
    """
    base_model = Path(settings.base_model).name
    with run.stage("tables"):
        targets = results.finished_targets(run.path / "games", seeds)
        tables = results.run_tables(list(targets.values()))
        for name, table in tables.items():
            write_table(table, run.path, name)
    with run.stage("figures"):
        caption = f"base model {base_model}, mapper {mapper}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
        shown = {name: table for name, table in tables.items() if name != "users"}
        drawn = (
            write_figures(run.path, **shown, caption=caption)
            if settings.figures
            else no_figures(run.path, [figure.name for figure in FIGURES])
        )
        with replace_atomically(run.path / "comments.md") as temporary:
            page_of = comments_page(tables["comments"], tables["generations"], tables["neighbourhoods"], caption)
            temporary.write_text(page_of, encoding="utf-8")
    written = [path.name for path in run.path.iterdir()]
    page = report_page(**shown, drawn=drawn, base_model=base_model, mapper=mapper, written=written)
    answer = results.answer_of(tables["summary"])
    finish_with_report(run, page, emotions=list(targets), answer=answer, sources=sources_of(settings))
    return tables["summary"]
