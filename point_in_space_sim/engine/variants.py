"""The engine: makes models by their recipes, samples and maps them. It knows no centroid, no judge, no progress bar.

Several models are made at once, each is on disk as soon as it is finished, and none is made twice: a killed run goes on
from what is there. A worker gets the adapters that a model starts from and gives back its adapter and its samples: it
needs no disk in common with the process that asks, only the base model by its name.
"""

import ctypes
import errno
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from experiment.errors import InputError, RunFailed
from experiment.parallel import workers
from experiment.run_folder import load_arrays, save_arrays
from point_in_space_sim.engine import stacked
from point_in_space_sim.engine.base_model import BaseModel, dtype_name, load_base_model, native_dtype
from point_in_space_sim.engine.fine_tuning import (
    Adapter,
    FrozenActivations,
    average_adapters,
    frozen_activations,
    load_adapter,
    save_adapter,
    tune,
)
from point_in_space_sim.engine.guard import interrupts_held_back, is_out_of_memory, reason
from point_in_space_sim.engine.options import EngineOptions
from point_in_space_sim.engine.recipes import (
    Averaged,
    Finished,
    Model,
    Order,
    Request,
    Sampled,
    Texts,
    Tuned,
    merge_requests,
    name_of,
)
from point_in_space_sim.engine.sampling import Samples, sample_comments
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.mapper import Mapper

_glibc = ctypes.CDLL(None) if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim") else None
base_in_use = Lock()  # a worker's base model is changed while it is tuned, and a cluster's worker may have threads
Fulfil = Callable[[Sequence[Order]], list[Finished]]

STACK = 64
"""Models that a GPU makes together: by then its kernels take longer than to start them."""


@dataclass(frozen=True)
class Engine:
    """How models are made and samples drawn: all that a worker needs to know."""

    base_model: str
    prompt: str
    device: str
    dtype: str  # of weights and activations, as torch names it
    tuning: TuningSettings
    sampling: SamplingSettings
    samples: int  # comments a sample
    stack: int = 1  # models that are made together


def engine_of(
    options: EngineOptions, device: str, tuning: TuningSettings, sampling: SamplingSettings, samples: int
) -> Engine:
    """The engine that a command line asks for, in this machine's dtype, whatever a worker's own is."""
    stack = STACK if device.startswith("cuda") else 1
    dtype = dtype_name(native_dtype(torch.device(device)))
    return Engine(options.base_model, options.prompt, device, dtype, tuning, sampling, samples, stack)


def stacking(engine: Engine, base: BaseModel) -> Engine:
    """The engine; with its models made one by one where this base model's cannot be made together."""
    return engine if stacked.can_stack(base, engine.tuning, engine.sampling) else replace(engine, stack=1)


@dataclass(frozen=True)
class Made:
    """What a worker gives back. adapter: None for the base model, and for a model that it was given."""

    adapter: Adapter | None
    samples: dict[int, Samples]


@contextmanager
def fulfilment(
    engine: Engine,
    mapper: Mapper,
    scratch: Path,
    kept: Path,
    *,
    jobs: int = 1,
    backend: str = "loky",
    scheduler: str | None = None,
    advance: Callable[[int], object] = lambda comments: None,
) -> Iterator[Fulfil]:
    """A function that takes orders and gives those that are finished, at least one while any is open.

    scratch: where what is finished lies, models and samples by their recipe's name, a folder an owner; the caller's to
    remove. kept: the folder of the models that are kept, by the names that requests give them. advance: told of every
    finished request's cost. Owners are served in the order in which they first came, of an owner the longest request
    first. Samples are mapped here, so that no worker holds a mapper, and by one thread, as models are made (see make).
    """
    devices = _devices(engine.device)
    if engine.device.startswith("cuda"):  # more than one process on a device would only share it
        jobs = min(jobs, max(len(devices), 1))
    owners: dict[str, int] = {}
    waiting: dict[tuple[str, str], list[Request]] = {}  # by owner and model
    running: dict[Future[list[Made]], list[tuple[str, list[Request]]]] = {}

    def finish(owner: str, requests: Sequence[Request], costs: int) -> list[Finished]:
        folder = scratch / owner
        for request in requests:
            for name in request.keep_as:
                if not (kept / name).exists():
                    assert request.model is not None, "the base model is not kept"
                    adapter = _load_weights(_model_path(folder, request.model))
                    assert adapter is not None, "a finished model is on disk"
                    _save_folder(kept / name, scratch, partial(_save_kept, adapter, engine))
        torch.set_num_threads(1)
        advance(costs)
        finished: list[Finished] = [
            (
                (owner, request),
                {
                    (name_of(request.model), sample): _mapped(_sample_path(folder, request.model, sample), mapper)
                    for sample in request.samples
                },
            )
            for request in requests
        ]
        return_memory(collect=False)
        return finished

    return_large_memory_at_once()
    with workers(jobs, backend, scheduler, devices[:jobs]) as (submit, at_once):

        def start_some() -> list[Finished]:
            """Has the workers, and one task a worker more, so that none waits, do what comes next."""
            found: list[Finished] = []
            busy = {(owner, name_of(requests[0].model)) for task in running.values() for owner, requests in task}
            costs = {key: _cost(engine, scratch / key[0], requests) for key, requests in waiting.items()}
            together: list[tuple[str, list[Request]]] = []
            stack = min(engine.stack, -(-len(waiting) // at_once))  # so that no worker gets them all
            for key in sorted(waiting, key=lambda key: (owners[key[0]], -costs[key])):
                if len(running) >= at_once + (at_once > 1):
                    break
                if key in busy:  # its model is being made
                    continue
                if costs[key] or _lacks_weights(scratch / key[0], waiting[key]):
                    together.append((key[0], waiting.pop(key)))
                else:
                    found += finish(key[0], waiting.pop(key), 0)
                if len(together) == stack:
                    start(together)
                    together = []
            if together:
                start(together)
            return found

        def start(together: list[tuple[str, list[Request]]]) -> None:
            orders = []
            for owner, requests in together:
                (request,) = merge_requests(requests)
                orders.append((_given(scratch / owner, request.model), _missing(scratch / owner, request)))
            running[submit(partial(make, engine), orders)] = together

        def fulfil(orders: Sequence[Order]) -> list[Finished]:
            for owner, request in orders:
                owners.setdefault(owner, len(owners))
                waiting.setdefault((owner, name_of(request.model)), []).append(request)
            found = start_some()
            while not found and running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                # What is finished is saved before another's error ends the run.
                made_now = []
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    for (owner, requests), made in zip(running.pop(future), future.result(), strict=True):
                        made_now.append((owner, requests, _cost(engine, scratch / owner, requests)))
                        _save_made(engine, scratch / owner, merge_requests(requests)[0], made)
                for each in made_now:
                    found += finish(*each)
            return found

        yield fulfil


Task = tuple[Mapping[str, Adapter], Request]
"""A request, and the adapters that its model starts from, by their models' names; or the model's own, if made."""


def make(engine: Engine, orders: Sequence[Task]) -> list[Made]:
    """Makes each model, unless it is among the given, and draws its samples.

    On a CPU a model is made by one thread: sums come in the same order whatever --jobs is, and several models at once
    use the cores better than one on all of them. Several orders are made together, as far as a device's memory goes.
    """
    torch.set_num_threads(1)
    return_large_memory_at_once()
    try:
        with base_in_use:
            base = base_of(engine)
            if len(orders) > 1 and stacked.can_stack(base, engine.tuning, engine.sampling):
                made = _make_stacked(engine, base, orders)
            else:
                made = [_make_one(engine, base, *order) for order in orders]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(orders) == 1:
            raise MemoryError(reason(error)) from error
        made = []
    if not made:  # too many at once
        return_memory()
        torch.cuda.empty_cache()
        half = len(orders) // 2
        return [*make(engine, orders[:half]), *make(engine, orders[half:])]
    return_memory(collect=len(made) > 1)
    return made


def _make_one(engine: Engine, base: BaseModel, given: Mapping[str, Adapter], request: Request) -> Made:
    adapter = None if request.model is None else _adapter(engine, base, given, request.model)
    own = None if name_of(request.model) in given else adapter
    if own is not None:
        return_memory()  # what tuning leaves behind refers to itself
    samples = {
        sample: sample_comments(base, engine.samples, sample, engine.sampling, adapter) for sample in request.samples
    }
    return Made(own, samples)


def _make_stacked(engine: Engine, base: BaseModel, orders: Sequence[Task]) -> list[Made]:
    """The same in two stacks, one of models to tune and one of samples to draw."""
    tasks: dict[int, stacked.Task] = {}
    adapters: dict[int, Adapter | None] = {}
    for i, (given, request) in enumerate(orders):
        model = request.model
        if isinstance(model, Tuned) and model.name not in given:
            start = None if model.start is None else _adapter(engine, base, given, model.start)
            tasks[i] = stacked.Task(model.texts, model.seed, start, _activations(engine, model))
        else:
            adapters[i] = None if model is None else _adapter(engine, base, given, model)
    if tasks:
        adapters |= dict(zip(tasks, stacked.tune_stacked(base, list(tasks.values()), engine.tuning), strict=True))
    draws = [(i, sample) for i, (_, request) in enumerate(orders) for sample in request.samples]
    drawn = (
        stacked.sample_stacked(
            base, [(adapters[i], sample) for i, sample in draws], engine.samples, engine.tuning, engine.sampling
        )
        if draws
        else []
    )
    samples: list[dict[int, Samples]] = [{} for _ in orders]
    for (i, sample), found in zip(draws, drawn, strict=True):
        samples[i][sample] = found
    return [
        Made(None if name_of(request.model) in given else adapters[i], samples[i])
        for i, (given, request) in enumerate(orders)
    ]


def _adapter(engine: Engine, base: BaseModel, given: Mapping[str, Adapter], model: Tuned | Averaged) -> Adapter:
    """The model's adapter: given, or made from those that are, and from what they lack."""
    if model.name in given:
        return given[model.name]
    if isinstance(model, Averaged):
        # Adapters from one start span nearly the same directions: the rank need not grow with every generation.
        parts = [_adapter(engine, base, given, part) for part in model.models]
        return average_adapters(parts, engine.tuning.rank)[0]
    start = None if model.start is None else _adapter(engine, base, given, model.start)
    activations = _activations(engine, model) if base.has_plain_layers else None
    return tune(base, model.texts, engine.tuning, model.seed, start, activations)


def _activations(engine: Engine, model: Tuned) -> FrozenActivations:
    return _cached_activations(engine, model.pool or model.texts)


def _given(folder: Path, model: Model) -> dict[str, Adapter]:
    """The model's adapter, where it is on disk, or those that it starts from; of a lost one, its own."""
    if model is None:
        return {}
    if (own := _load_weights(_model_path(folder, model))) is not None:
        return {model.name: own}
    parents = model.models if isinstance(model, Averaged) else (model.start,)
    return {name: adapter for parent in parents for name, adapter in _given(folder, parent).items()}


def _missing(folder: Path, request: Request) -> Request:
    """The request without the samples that are on disk."""
    left = [sample for sample in request.samples if load_arrays(_sample_path(folder, request.model, sample)) is None]
    return Request(request.model, tuple(left))


def _cost(engine: Engine, folder: Path, requests: Sequence[Request]) -> int:
    """What is left to do of one model's requests, in comments that go through the model: once an epoch of tuning, and
    once when sampled."""
    (request,) = merge_requests(requests)
    drawn = engine.samples * len(_missing(folder, request).samples)
    tuned = len(request.model.texts) if isinstance(request.model, Tuned) else 0
    if (not drawn and not _lacks_weights(folder, requests)) or _is_made(folder, request.model):
        tuned = 0
    return tuned * engine.tuning.epochs + drawn


def _lacks_weights(folder: Path, requests: Sequence[Request]) -> bool:
    """Whether the model's weights are wanted and not on disk."""
    (request,) = merge_requests(requests)
    return not request.discard and not _is_made(folder, request.model)


def _is_made(folder: Path, model: Model) -> bool:
    return model is None or _model_path(folder, model).is_dir()


def _save_made(engine: Engine, folder: Path, request: Request, made: Made) -> None:
    model = request.model
    if model is not None and made.adapter is not None and not request.discard:
        _save_folder(_model_path(folder, model), folder, partial(_save_weights, made.adapter, engine))
    for sample, drawn in made.samples.items():
        arrays = {"texts": np.array(drawn.texts, dtype=str), "broken": np.array(drawn.broken)}
        save_arrays(_sample_path(folder, model, sample), arrays)


M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h
LARGE = 2 << 20  # bytes


def return_large_memory_at_once() -> None:
    """Has glibc take large blocks from the system and give them back when they are freed.

    Left to itself it raises the size from which it does so to the largest block that was ever freed, and hundreds of
    megabytes stay in holes between smaller ones.
    """
    if _glibc is not None:
        _glibc.mallopt(M_MMAP_THRESHOLD, LARGE)
        _glibc.mallopt(M_TRIM_THRESHOLD, LARGE)


def leave_models_to_workers(options: EngineOptions) -> None:
    """Forgets this process's base model where workers load their own."""
    if options.jobs > 1 or options.backend in ("dask", "ray"):
        _cached_base_model.cache_clear()
    return_memory()


def return_memory(*, collect: bool = True) -> None:
    """Gives freed memory of any size back to the system; collect: also what only a search for cycles frees."""
    if collect:
        gc.collect()
    if _glibc is not None:
        _glibc.malloc_trim(0)


def _mapped(path: Path, mapper: Mapper) -> Sampled:
    """A finished sample with its vectors, which are added to it on disk."""
    arrays = load_arrays(path)
    assert arrays is not None, "a finished sample is on disk"
    texts = tuple(map(str, arrays["texts"]))
    if "vectors" not in arrays:
        try:
            arrays["vectors"] = mapper(texts)
        except InputError as error:  # it mapped others before: what is finished is kept
            raise RunFailed(f"--mapper: {error}") from error
        save_arrays(path, arrays)
    return Sampled(texts, arrays["vectors"], float(arrays["broken"]))


def _save_weights(adapter: Adapter, engine: Engine, folder: Path) -> None:
    """As float32 and exactly: a resumed run ends with the bytes of one that was not interrupted."""
    if adapter.lora_config is None:
        save_file(adapter.weights, folder / "weights.safetensors")
    else:
        save_adapter(adapter, folder, engine.base_model)


def _save_kept(adapter: Adapter, engine: Engine, folder: Path) -> None:
    if adapter.lora_config is not None:
        save_adapter(adapter, folder, engine.base_model)
        return
    with base_in_use:  # whole weights are saved with those that they leave alone
        save_adapter(adapter, folder, base_of(engine))


def _load_weights(folder: Path) -> Adapter | None:
    """What _save_weights wrote; None where there is none, or it is damaged (it is removed then)."""
    try:
        with interrupts_held_back():
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
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(errno.EIO, f"cannot write ({error})", str(path)) from None
    except OSError:
        # Another worker was faster: the same recipe, the same weights.
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def base_of(engine: Engine) -> BaseModel:
    """The engine's base model, loaded once a process."""
    return _cached_base_model(engine.base_model, engine.device, engine.prompt, engine.dtype)


@lru_cache(maxsize=4)
def _cached_base_model(name: str, device: str, prompt: str, dtype: str) -> BaseModel:
    gc.collect()
    gc.freeze()  # modules, most of all: the searches for cycles after each model need not go through them
    return load_base_model(name, device, getattr(torch, dtype), prompt)


@lru_cache(maxsize=16)  # a few games side by side
def _cached_activations(engine: Engine, pool: Texts) -> FrozenActivations:
    return frozen_activations(base_of(engine), pool, engine.tuning)


def _devices(device: str) -> list[str]:
    """The CUDA devices that models are dealt to, as CUDA_VISIBLE_DEVICES names them: all that are visible, where none
    is asked for."""
    if device != "cuda" or not torch.cuda.is_available():
        return []
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (visible or list(map(str, range(torch.cuda.device_count()))))[: torch.cuda.device_count()]


def _model_path(folder: Path, model: Tuned | Averaged) -> Path:
    return folder / "models" / model.name


def _sample_path(folder: Path, model: Model, sample: int) -> Path:
    return folder / "samples" / f"{name_of(model)}-{sample}.npz"
