"""How the protocols' models are made: tuned, sampled, mapped and kept, each on disk as soon as it is finished."""

import ctypes
import errno
import gc
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

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
from point_in_space_sim.engine.sampling import sample_comments
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.mapper import Mapper
from point_in_space_sim.protocols import Averaged, Batch, Drawn, Game, Model, Request, Texts, Tuned, name_of
from point_in_space_sim.target import distances_to, planned_work

if TYPE_CHECKING:
    from tqdm import tqdm

_glibc = ctypes.CDLL(None) if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim") else None


@dataclass(frozen=True)
class Workshop:
    """All that a worker process needs to make models and draw samples, and the folders where they go."""

    base_model: str
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
    workshop: Workshop, game: Game, mapper: Mapper, jobs: int, progress: "tqdm[None]", requests: list[Request]
) -> Drawn:
    """Makes what is not yet on disk, several models at once, and maps the samples.

    They are mapped here, so that no worker holds a mapper, and by one thread, as models are made (see carry_out).
    """
    costs = {
        name_of(request.model): request_cost(request, workshop)
        for request in requests
        if not _is_done(workshop, request)
    }
    missing = [request for request in requests if name_of(request.model) in costs]
    # The longest first, so that the workers end together.
    missing.sort(key=lambda request: -costs[name_of(request.model)])
    devices = _devices(workshop.device)
    tasks = [(devices[i % len(devices)], request) for i, request in enumerate(missing)]
    finished = parallel_map(partial(carry_out, workshop, game.texts), tasks, jobs=jobs)
    for request, _ in zip(missing, finished, strict=True):
        progress.update(costs[name_of(request.model)])
    drawn: dict[tuple[str, int], Batch] = {}
    torch.set_num_threads(1)
    for request in requests:
        for sample in request.samples:
            path = _sample_path(workshop, request.model, sample)
            arrays = load_arrays(path)
            assert arrays is not None, "a finished sample is on disk"
            texts = tuple(map(str, arrays["texts"]))
            if "vectors" not in arrays:
                arrays["vectors"] = mapper(texts)
                save_arrays(path, arrays)
            distances = distances_to(game.centroid, arrays["vectors"])
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
    """Makes one model, draws its samples and keeps it; each on disk as soon as it is finished.

    On a CPU a model is made by one thread: sums come in the same order whatever --jobs is, and several models at once
    use the cores better than one on all of them.
    """
    device, request = task
    torch.set_num_threads(1)
    return_large_memory_at_once()
    base = cached_base_model(workshop.base_model, device)
    adapter = _obtain(workshop, neighbourhood, base, request.model)
    for sample in request.samples:
        path = _sample_path(workshop, request.model, sample)
        if load_arrays(path) is None:
            samples = sample_comments(base, workshop.samples, sample, workshop.sampling, adapter)
            save_arrays(path, {"texts": np.array(samples.texts, dtype=str), "broken": np.array(samples.broken)})
    for name in request.keep_as:
        if not workshop.kept(name).exists():
            assert adapter is not None, "the base model is not kept"
            _save_folder(workshop.kept(name), workshop.parts, partial(save_adapter, adapter, base=base))
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
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(errno.EIO, f"cannot write ({error})", str(path)) from None
    except OSError:
        # Another worker was faster: the same recipe, the same weights.
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@lru_cache(maxsize=4)
def cached_base_model(name: str, device: str) -> BaseModel:
    return load_base_model(name, device)


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
