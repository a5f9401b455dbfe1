"""Many models on one device: one at a time against stacks of several, in time a model and in memory.

A model is tuned on the 33 comments nearest to an emotion and writes 50, as in a run's first generation.

    python benchmarks/bench_stack.py                       on CUDA where it is available
    python benchmarks/bench_stack.py --device cpu --models 4 --stacks 1 4
"""

import sys
import time
from dataclasses import dataclass

import torch
import tyro

from experiment.errors import InputError
from point_in_space_sim.corpus import EMOTIONS, load_corpus
from point_in_space_sim.engine.assets import cache_folder
from point_in_space_sim.engine.base_model import DEFAULT_BASE_MODEL, dtype_name, native_dtype, pick_device
from point_in_space_sim.engine.recipes import Request, Tuned
from point_in_space_sim.engine.rehearsal import measured_rate
from point_in_space_sim.engine.settings import PROMPT, SamplingSettings, TuningSettings
from point_in_space_sim.engine.variants import Engine, base_of, make
from point_in_space_sim.mapper import load_mapper, map_texts
from point_in_space_sim.target import emotion_target, find_neighbourhood


@dataclass(frozen=True)
class Settings:
    device: str = "auto"
    """As for run.py."""
    models: int = 64
    """How many are made with each size of stack; of a stack of one, an eighth of them."""
    stacks: tuple[int, ...] = (1, 8, 32, 64)
    """Sizes of stacks; the first is the alternative."""
    comments: int = 33
    """That a model is tuned on."""
    samples: int = 50
    """That it writes."""


def main(settings: Settings) -> None:
    device = str(pick_device(settings.device))
    corpus, mapper = load_corpus(), load_mapper(device=device)
    vectors = map_texts(mapper, corpus.texts, cache_folder() / "vectors")
    pools = []
    for emotion in EMOTIONS:
        members = find_neighbourhood(emotion_target(emotion, vectors), vectors, settings.comments).members
        pools.append(tuple(corpus.texts[i] for i in members))
    tuning, sampling = TuningSettings(), SamplingSettings()
    dtype = dtype_name(native_dtype(torch.device(device)))
    engine = Engine(DEFAULT_BASE_MODEL, PROMPT, device, dtype, tuning, sampling, settings.samples)
    base = base_of(engine)
    print(
        f"{settings.comments} comments, {tuning.epochs} epochs, {settings.samples} samples a model; {device}, "
        f"{base.dtype}, products of matrices at {measured_rate(device) / 1e12:.2f} TFLOP/s"
    )
    print(f"{'models together':>16}{'s a model':>11}{'ratio':>8}{'peak GB':>9}")
    alone = 0.0
    for stack in settings.stacks:
        number = max(stack, settings.models // (8 if stack == 1 else 1))
        orders = [({}, Request(Tuned(pools[i % 28], None, i), (i,))) for i in range(number)]
        make(engine, orders[:stack])  # starts kernels, and fills the cache of activations
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        for first in range(0, number, stack):
            make(engine, orders[first : first + stack])
        seconds = (time.perf_counter() - begin) / number
        alone = alone or seconds
        peak = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else float("nan")
        print(f"{stack:16}{seconds:11.3f}{alone / seconds:8.1f}{peak:9.1f}", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
