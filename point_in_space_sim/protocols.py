"""The protocols: one model alone, variants in competition, and the two controls; and how their models are made.

A model is named by its recipe (which texts, from which model, which seed). A protocol is a generator: it yields what it
needs (models, and samples of them), is sent the samples, and decides. So each reads from top to bottom, several play
side by side, and what two protocols both need (their first generations coincide) is made once.

Randomness. Every seed derives from (the run's seed, the target, a purpose, a generation) and from nothing else:
- The protocols are paired: they deal the same parts as long as their pools are equal, and all their reported samples
  have one seed (common random numbers), so that differences between protocols are freed of noise that both share.
- A generation's variants share the seed that initialises their adapters and the seed of the sample that chooses among
  them: they differ by their comments only, and their adapters can be averaged (as in federated averaging).
- The sample that chooses and the sample that is reported never have the same seed.
"""

import ctypes
import gc
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from experiment.errors import InputError
from experiment.parallel import parallel_map
from experiment.run_folder import hash_of, load_arrays, save_arrays
from point_in_space_sim.base_model import BaseModel, load_base_model
from point_in_space_sim.fine_tuning import (
    Adapter,
    FrozenActivations,
    TuningSettings,
    average_adapters,
    frozen_activations,
    load_adapter,
    save_adapter,
    tune,
)
from point_in_space_sim.mapper import Mapper, load_mapper
from point_in_space_sim.sampling import SamplingSettings, sample_comments
from point_in_space_sim.target import distances_to, planned_work, single_sizes

if TYPE_CHECKING:
    from tqdm import tqdm

Texts = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Tuned:
    """The model that results from tuning `start` on the texts."""

    texts: Texts
    start: "Model"
    seed: int

    @cached_property
    def name(self) -> str:
        return hash_of(["tuned", self.texts, name_of(self.start), self.seed])


@dataclass(frozen=True, eq=False)
class Averaged:
    """The model whose adapter is the mean of the models' adapters."""

    models: tuple[Tuned, ...]

    @cached_property
    def name(self) -> str:
        return hash_of(["averaged", [model.name for model in self.models]])


Model = Tuned | Averaged | None
"""A model by its recipe; None is the base model."""


def name_of(model: Model) -> str:
    """Equal for equal recipes."""
    return "base" if model is None else model.name


@dataclass(frozen=True)
class Request:
    """A model that is to be made, the seeds of the samples to draw from it, and under which names to keep it."""

    model: Model
    samples: tuple[int, ...] = ()
    keep_as: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Comments sampled from a model: texts, vectors (n, 28), distances to the centroid (n,), share of broken ones."""

    texts: Texts
    vectors: np.ndarray
    distances: np.ndarray
    broken: float


@dataclass(frozen=True)
class Draw:
    """What a sample was drawn for. generation 0 is the base model; variant 0 is no variant of its own (an average)."""

    protocol: str
    generation: int
    variant: int
    role: str  # "selection" chose the kept variant; "report" is a fresh sample of it
    model: Model
    sample: int
    kept: bool = True


Drawn = Mapping[tuple[str, int], Batch]
"""Samples by their model's name and their seed."""
Protocol = Generator[list[Request], Drawn, list[Draw]]


@dataclass(frozen=True)
class Game:
    """What all protocols of one target and seed share."""

    target: str
    texts: Texts  # the neighbourhood, nearest to the target first
    centroid: np.ndarray  # (28,)
    seed: int
    generations: int
    variants: int

    def seed_of(self, purpose: str, generation: int = 0) -> int:
        return derived_seed(self.seed, self.target, purpose, generation)

    @property
    def report(self) -> int:
        return self.seed_of("report")

    def deal(self, pool: Texts, generation: int) -> list[Texts]:
        return deal(pool, self.variants, np.random.default_rng(self.seed_of("deal", generation)))

    def random_variant(self, generation: int) -> int:
        return int(np.random.default_rng(self.seed_of("pick", generation)).integers(self.variants))


def derived_seed(seed: int, *key: str | int) -> int:
    """A seed (32 bits) for one purpose, named by the key; it depends on nothing else."""
    words = np.frombuffer(hashlib.sha256(json.dumps(key).encode()).digest(), dtype="<u4")
    return int(np.random.SeedSequence([seed, *map(int, words)]).generate_state(1)[0])


def deal(pool: Texts, variants: int, generator: np.random.Generator) -> list[Texts]:
    """Shuffles the pool and deals it into equal disjoint parts; the remainder, fewer than `variants`, stays out."""
    shuffled = [pool[i] for i in generator.permutation(len(pool))]
    size = len(pool) // variants
    return [tuple(shuffled[i * size : (i + 1) * size]) for i in range(variants)]


def without(pool: Texts, part: Texts) -> Texts:
    gone = set(part)
    return tuple(text for text in pool if text not in gone)


def base(game: Game) -> Protocol:
    """The base model as it is."""
    yield [Request(None, (game.report,))]
    return [Draw("base", 0, 0, "report", None, game.report)]


def single(game: Game) -> Protocol:
    """Three independent models, tuned from the base on the nearest third, two thirds and all of the neighbourhood."""
    models = [Tuned(game.texts[:size], None, game.seed_of("tune", 1)) for size in single_sizes(len(game.texts))]
    yield [Request(model, (game.report,), (f"single-{i}",)) for i, model in enumerate(models, start=1)]
    return [Draw("single", i, 1, "report", model, game.report) for i, model in enumerate(models, start=1)]


def multi(game: Game) -> Protocol:
    """Competition: the variant with the least mean distance becomes the next base, its part leaves the pool."""
    pool, best = game.texts, None
    draws: list[Draw] = []
    report: list[Request] = []
    for generation in range(1, game.generations + 1):
        parts = game.deal(pool, generation)
        models = [Tuned(part, best, game.seed_of("tune", generation)) for part in parts]
        selection = game.seed_of("selection", generation)
        drawn = yield [*report, *(Request(model, (selection,)) for model in models)]
        winner = int(np.argmin([drawn[model.name, selection].distances.mean() for model in models]))
        draws += [Draw("multi", generation, i + 1, "selection", model, selection, i == winner)
                  for i, model in enumerate(models)]  # fmt: skip
        best, pool = models[winner], without(pool, parts[winner])
        draws.append(Draw("multi", generation, winner + 1, "report", best, game.report))
        report = [Request(best, (game.report,), (f"multi-{generation}",))]
    yield report
    return draws


def sequential(game: Game) -> Protocol:
    """Control without competition: one variant a generation on a random part, which is what a random pick comes to."""
    pool, model = game.texts, None
    draws: list[Draw] = []
    for generation in range(1, game.generations + 1):
        pick = game.random_variant(generation)
        part = game.deal(pool, generation)[pick]
        model = Tuned(part, model, game.seed_of("tune", generation))
        yield [Request(model, (game.report,), (f"sequential-{generation}",))]
        draws.append(Draw("sequential", generation, pick + 1, "report", model, game.report))
        pool = without(pool, part)
    return draws


def averaged(game: Game) -> Protocol:
    """Control that uses all variants: their average becomes the next base.

    A random part leaves the pool: all three went into the average alike, and with one gone the pool and so the
    comments a variant are as many as in competition.
    """
    pool, best = game.texts, None
    draws: list[Draw] = []
    report: list[Request] = []
    for generation in range(1, game.generations + 1):
        parts = game.deal(pool, generation)
        models = [Tuned(part, best, game.seed_of("tune", generation)) for part in parts]
        yield [*report, *map(Request, models)]
        best, pool = Averaged(tuple(models)), without(pool, parts[game.random_variant(generation)])
        draws.append(Draw("averaged", generation, 0, "report", best, game.report))
        report = [Request(best, (game.report,), (f"averaged-{generation}",))]
    yield report
    return draws


PROTOCOLS: dict[str, Callable[[Game], Protocol]] = {
    "base": base,
    "single": single,
    "multi": multi,
    "sequential": sequential,
    "averaged": averaged,
}


def play(
    game: Game, fulfil: Callable[[list[Request]], Drawn], protocols: Sequence[str] = tuple(PROTOCOLS)
) -> list[tuple[Draw, Batch]]:
    """Plays the protocols side by side, and gives every sample that they drew.

    fulfil: makes the models and draws the samples of one step's requests, each model once.
    """
    playing = {name: PROTOCOLS[name](game) for name in protocols}
    wanted = {name: next(protocol) for name, protocol in playing.items()}
    drawn: dict[tuple[str, int], Batch] = {}
    draws: dict[str, list[Draw]] = {}
    while wanted:
        drawn |= fulfil(merge_requests([request for requests in wanted.values() for request in requests]))
        for name in list(wanted):
            try:
                wanted[name] = playing[name].send(drawn)
            except StopIteration as end:
                draws[name] = end.value
                del wanted[name]
    return [(draw, drawn[name_of(draw.model), draw.sample]) for name in protocols for draw in draws[name]]


def merge_requests(requests: Sequence[Request]) -> list[Request]:
    """One request a model, in order of first mention."""
    merged: dict[str, Request] = {}
    for request in requests:
        known = merged.get(name_of(request.model), Request(request.model))
        merged[name_of(request.model)] = Request(
            request.model,
            tuple(dict.fromkeys(known.samples + request.samples)),
            tuple(dict.fromkeys(known.keep_as + request.keep_as)),
        )
    return list(merged.values())


@dataclass(frozen=True)
class Workshop:
    """All that a worker process needs to make models and draw samples, and the folders where they go."""

    base_model: str
    mapper: str
    device: str
    tuning: TuningSettings
    sampling: SamplingSettings
    samples: int
    parts: Path = field(repr=False)
    adapters: Path = field(repr=False)
    prefix: str = ""  # of the kept adapters' names

    def kept(self, name: str) -> Path:
        return self.adapters / f"{self.prefix}-{name}"


def fulfil_requests(
    workshop: Workshop, game: Game, jobs: int, progress: "tqdm[None]", requests: list[Request]
) -> Drawn:
    """Makes what is not yet on disk, several models at once, and reads the samples."""
    costs = {name_of(request.model): request_cost(request, workshop) for request in requests
             if not _is_done(workshop, request)}  # fmt: skip
    missing = [request for request in requests if name_of(request.model) in costs]
    # The longest first, so that the workers end together.
    missing.sort(key=lambda request: -costs[name_of(request.model)])
    devices = _devices(workshop.device)
    tasks = [(devices[i % len(devices)], request) for i, request in enumerate(missing)]
    finished = parallel_map(partial(carry_out, workshop, game.texts), tasks, jobs=jobs)
    for request, _ in zip(missing, finished, strict=True):
        progress.update(costs[name_of(request.model)])
    drawn: dict[tuple[str, int], Batch] = {}
    for request in requests:
        for sample in request.samples:
            arrays = load_arrays(_sample_path(workshop, request.model, sample))
            assert arrays is not None, "a finished sample is on disk"
            distances = distances_to(game.centroid, arrays["vectors"])
            texts = tuple(map(str, arrays["texts"]))
            drawn[name_of(request.model), sample] = Batch(texts, arrays["vectors"], distances, float(arrays["broken"]))
    return drawn


def request_cost(request: Request, workshop: Workshop) -> float:
    """What is left of the request's work, in comments that go through the model: epochs of tuning, and samples."""
    tuned = 0
    if isinstance(request.model, Tuned) and not _model_path(workshop, request.model).is_dir():
        tuned = len(request.model.texts) * workshop.tuning.epochs
    return tuned + workshop.samples * len(request.samples)


def planned_cost(game: Game, workshop: Workshop) -> float:
    """request_cost of a whole game, at most: protocols may happen to share a model."""
    tuned, sampled = planned_work(len(game.texts), game.generations, game.variants, workshop.samples)
    return tuned * workshop.tuning.epochs + sampled


def carry_out(workshop: Workshop, neighbourhood: Texts, task: tuple[str, Request]) -> None:
    """Makes one model, draws its samples, maps them and keeps it; each on disk as soon as it is finished.

    On a CPU a model is made by one thread: sums come in the same order whatever --jobs is, and several models at once
    use the cores better than one on all of them.
    """
    device, request = task
    torch.set_num_threads(1)
    base = cached_base_model(workshop.base_model, device)
    adapter = _obtain(workshop, neighbourhood, base, request.model)
    for sample in request.samples:
        path = _sample_path(workshop, request.model, sample)
        if load_arrays(path) is None:
            samples = sample_comments(base, workshop.samples, sample, workshop.sampling, adapter)
            vectors = cached_mapper(workshop.mapper, device)(samples.texts)
            save_arrays(path, {"texts": np.array(samples.texts, dtype=str), "vectors": vectors,
                               "broken": np.array(samples.broken)})  # fmt: skip
    for name in request.keep_as:
        if not workshop.kept(name).exists():
            assert adapter is not None, "the base model is not kept"
            _save_folder(workshop.kept(name), workshop.parts, partial(save_adapter, adapter, base=base))
    return_memory()


def return_memory() -> None:
    """Gives freed memory back to the system, which glibc does not do by itself: gigabytes over many models."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _obtain(workshop: Workshop, neighbourhood: Texts, base: BaseModel, model: Model) -> Adapter | None:
    """The model's adapter, from disk where it was finished before."""
    if model is None:
        return None
    path = _model_path(workshop, model)
    if (adapter := _load_weights(path)) is not None:
        return adapter
    if isinstance(model, Averaged):
        adapters = [_obtain(workshop, neighbourhood, base, part) for part in model.models]
        # Adapters from one start span nearly the same directions: the rank need not grow with every generation.
        adapter = average_adapters([part for part in adapters if part is not None], workshop.tuning.rank)[0]
    else:
        start = _obtain(workshop, neighbourhood, base, model.start)
        activations = _activations(base, neighbourhood, workshop.tuning) if base.has_plain_layers else None
        adapter = tune(base, model.texts, workshop.tuning, model.seed, start, activations)
    _save_folder(path, workshop.parts, partial(_save_weights, adapter, base=base))
    return adapter


def _save_weights(adapter: Adapter, folder: Path, base: BaseModel) -> None:
    """As float32 and exactly: a resumed run ends with the bytes of one that was not interrupted."""
    if adapter.lora_config is None:
        save_file(adapter.weights, folder / "weights.safetensors")
    else:
        save_adapter(adapter, folder, base)


def _load_weights(folder: Path) -> Adapter | None:
    """What _save_weights wrote; None where there is none, or it is damaged (it is removed then)."""
    try:
        if (folder / "weights.safetensors").exists():
            return Adapter(load_file(folder / "weights.safetensors"), None)
        if folder.is_dir():
            return load_adapter(folder)
    except (InputError, SafetensorError):
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _save_folder(path: Path, scratch: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder, which appears at `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=scratch))
    try:
        write(temporary)
        temporary.chmod(0o755)
        temporary.rename(path)
    except OSError:
        # Another worker was faster: the same recipe, the same weights.
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@lru_cache(maxsize=4)
def cached_base_model(name: str, device: str) -> BaseModel:
    return load_base_model(name, device)


@lru_cache(maxsize=4)
def cached_mapper(name: str, device: str) -> Mapper:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about renamed methods between peft and transformers
        return load_mapper(name, device)


@lru_cache(maxsize=1)
def _cached_activations(name: str, device: str, texts: Texts, settings: TuningSettings) -> FrozenActivations:
    return frozen_activations(cached_base_model(name, device), texts, settings)


def _activations(base: BaseModel, texts: Texts, settings: TuningSettings) -> FrozenActivations:
    return _cached_activations(base.name, str(base.device), texts, settings)


def _devices(device: str) -> list[str]:
    """The devices that models are dealt to: every CUDA device, or the one that was named."""
    if device == "cuda" and torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [device]


def _model_path(workshop: Workshop, model: Tuned | Averaged) -> Path:
    return workshop.parts / "models" / model.name


def _sample_path(workshop: Workshop, model: Model, sample: int) -> Path:
    return workshop.parts / "samples" / f"{name_of(model)}-{sample}.npz"


def _is_done(workshop: Workshop, request: Request) -> bool:
    return (
        (request.model is None or bool(request.samples) or _model_path(workshop, request.model).is_dir())
        and all(load_arrays(_sample_path(workshop, request.model, sample)) is not None for sample in request.samples)
        and all(workshop.kept(name).is_dir() for name in request.keep_as)
    )


def discard_weights(workshop: Workshop) -> None:
    """Empties the folders of a finished game's models; the samples stay, and say that it need not be played again."""
    for path in (workshop.parts / "models").glob("*/*"):
        path.unlink()
