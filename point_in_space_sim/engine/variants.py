"""The engine: makes models by their recipes, samples and maps them. It knows no centroid, no judge, no progress bar.

Several models are made at once, each is on disk as soon as it is finished, and none is made twice: a killed run goes on
from what is there.
"""

import ctypes
import errno
import gc
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from experiment.errors import InputError
from experiment.parallel import parallel_map
from experiment.run_folder import load_arrays, save_arrays
from point_in_space_sim.engine.base_model import BaseModel, load_base_model
from point_in_space_sim.engine.fine_tuning import (
    Adapter,
    FrozenActivations,
    average_adapters,
    frozen_activations,
    load_adapter,
    save_adapter,
    tune,
)
from point_in_space_sim.engine.recipes import (
    Averaged,
    Drawn,
    Model,
    Request,
    Sampled,
    Texts,
    Tuned,
    merge_requests,
    name_of,
)
from point_in_space_sim.engine.sampling import sample_comments
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.mapper import Mapper

_glibc = ctypes.CDLL(None) if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim") else None


@dataclass(frozen=True)
class Engine:
    """All that a worker process needs to make models and draw samples."""

    base_model: str
    prompt: str
    device: str
    tuning: TuningSettings
    sampling: SamplingSettings
    samples: int  # comments a sample
    scratch: Path  # the folder of what is finished, models and samples by their recipe's name; the caller's to remove
    kept: Path  # the folder of the models that are kept, by the names that requests give them


def fulfil(
    engine: Engine,
    mapper: Mapper,
    requests: Sequence[Request],
    *,
    jobs: int = 1,
    advance: Callable[[int], object] = lambda comments: None,
) -> Drawn:
    """Makes what is not yet on disk, several models at once; gives all the requests' samples.

    advance: told of every finished model its request's cost. Requests may belong to one game or to many. Samples are
    mapped here, so that no worker holds a mapper, and by one thread, as models are made (see carry_out).
    """
    requests = merge_requests(requests)
    costs = {
        name_of(request.model): cost_left(engine, request) for request in requests if not _is_done(engine, request)
    }
    missing = [request for request in requests if name_of(request.model) in costs]
    # The longest first, so that the workers end together.
    missing.sort(key=lambda request: -costs[name_of(request.model)])
    devices = _devices(engine.device)
    tasks = [(devices[i % len(devices)], request) for i, request in enumerate(missing)]
    finished = parallel_map(partial(carry_out, engine), tasks, jobs=jobs)
    for request, _ in zip(missing, finished, strict=True):
        advance(costs[name_of(request.model)])
    torch.set_num_threads(1)
    return {
        (name_of(request.model), sample): _mapped(_sample_path(engine, request.model, sample), mapper)
        for request in requests
        for sample in request.samples
    }


def request_cost(request: Request, epochs: int, samples: int) -> int:
    """The request's work in comments that go through the model: once an epoch of tuning, and once when sampled."""
    tuned = len(request.model.texts) if isinstance(request.model, Tuned) else 0
    return tuned * epochs + samples * len(request.samples)


def cost_left(engine: Engine, request: Request) -> int:
    """request_cost without the tuning of a model that is on disk."""
    made = request.model is not None and _model_path(engine, request.model).is_dir()
    return request_cost(request, 0 if made else engine.tuning.epochs, engine.samples)


def carry_out(engine: Engine, task: tuple[str, Request]) -> None:
    """Makes one model, draws its samples and keeps it; each on disk as soon as it is finished.

    On a CPU a model is made by one thread: sums come in the same order whatever --jobs is, and several models at once
    use the cores better than one on all of them.
    """
    device, request = task
    torch.set_num_threads(1)
    return_large_memory_at_once()
    base = cached_base_model(engine.base_model, device, engine.prompt)
    adapter = _obtain(engine, base, request.model)
    for sample in request.samples:
        path = _sample_path(engine, request.model, sample)
        if load_arrays(path) is None:
            samples = sample_comments(base, engine.samples, sample, engine.sampling, adapter)
            save_arrays(path, {"texts": np.array(samples.texts, dtype=str), "broken": np.array(samples.broken)})
    for name in request.keep_as:
        if not (engine.kept / name).exists():
            assert adapter is not None, "the base model is not kept"
            _save_folder(engine.kept / name, engine.scratch, partial(save_adapter, adapter, base=base))
    return_memory()


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


def return_memory() -> None:
    """Gives freed memory of any size back to the system."""
    gc.collect()
    if _glibc is not None:
        _glibc.malloc_trim(0)


def _mapped(path: Path, mapper: Mapper) -> Sampled:
    """A finished sample with its vectors, which are added to it on disk."""
    arrays = load_arrays(path)
    assert arrays is not None, "a finished sample is on disk"
    texts = tuple(map(str, arrays["texts"]))
    if "vectors" not in arrays:
        arrays["vectors"] = mapper(texts)
        save_arrays(path, arrays)
    return Sampled(texts, arrays["vectors"], float(arrays["broken"]))


def _obtain(engine: Engine, base: BaseModel, model: Model) -> Adapter | None:
    """The model's adapter, from disk where it was finished before."""
    if model is None:
        return None
    path = _model_path(engine, model)
    if (adapter := _load_weights(path)) is not None:
        return adapter
    if isinstance(model, Averaged):
        adapters = [_obtain(engine, base, part) for part in model.models]
        # Adapters from one start span nearly the same directions: the rank need not grow with every generation.
        adapter = average_adapters([part for part in adapters if part is not None], engine.tuning.rank)[0]
    else:
        start = _obtain(engine, base, model.start)
        activations = None
        if base.has_plain_layers:
            key = (engine.base_model, str(base.device), engine.prompt)
            activations = _cached_activations(*key, model.pool or model.texts, engine.tuning)
        adapter = tune(base, model.texts, engine.tuning, model.seed, start, activations)
    _save_folder(path, engine.scratch, partial(_save_weights, adapter, base=base))
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
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(errno.EIO, f"cannot write ({error})", str(path)) from None
    except OSError:
        # Another worker was faster: the same recipe, the same weights.
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@lru_cache(maxsize=4)
def cached_base_model(name: str, device: str, prompt: str) -> BaseModel:
    return load_base_model(name, device, prompt=prompt)


@lru_cache(maxsize=4)  # a few games side by side
def _cached_activations(
    name: str, device: str, prompt: str, pool: Texts, settings: TuningSettings
) -> FrozenActivations:
    return frozen_activations(cached_base_model(name, device, prompt), pool, settings)


def _devices(device: str) -> list[str]:
    """The devices that models are dealt to: every CUDA device, or the one that was named."""
    if device == "cuda" and torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [device]


def _model_path(engine: Engine, model: Tuned | Averaged) -> Path:
    return engine.scratch / "models" / model.name


def _sample_path(engine: Engine, model: Model, sample: int) -> Path:
    return engine.scratch / "samples" / f"{name_of(model)}-{sample}.npz"


def _is_done(engine: Engine, request: Request) -> bool:
    return (
        (request.model is None or bool(request.samples) or _model_path(engine, request.model).is_dir())
        and all(load_arrays(_sample_path(engine, request.model, sample)) is not None for sample in request.samples)
        and all((engine.kept / name).is_dir() for name in request.keep_as)
    )
