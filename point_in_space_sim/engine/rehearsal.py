"""A trial of all that a run will ask of its models, before anything is written; and how fast the device is."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from experiment.errors import InputError
from point_in_space_sim.engine.base_model import BaseModel, native_dtype
from point_in_space_sim.engine.fine_tuning import encode_comment, own_random_numbers, tune
from point_in_space_sim.engine.guard import one_line
from point_in_space_sim.engine.sampling import sample_comments
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.mapper import Mapper


def rehearse(
    base: BaseModel, mapper: Mapper, texts: Sequence[str], tuning: TuningSettings, sampling: SamplingSettings
) -> int:
    """Tunes a step on the longest text, samples a few tokens of two comments, and maps both.

    Gives how many of the texts are longer than any comment that is sampled. Raises InputError, in one line, where the
    base model or the mapper cannot do it. No random stream moves.
    """
    comments = [encode_comment(base, text) for text in texts]
    longest = max(range(len(texts)), key=lambda i: len(comments[i]))
    if (highest := max(map(max, comments))) >= base.vocabulary:
        raise InputError(
            f"the base model {base.name}: its tokenizer gives the token {highest} for a comment, the model only has "
            f"{base.vocabulary}; resize its embeddings to the tokenizer's and save it again"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the models of a run are made: two threads on a busy machine wait for each other
    try:
        # Every stream but torch's own generators is made from a seed.
        with own_random_numbers(base.device), one_line(f"the base model {base.name}: cannot be used", "choose another"):
            _read_longest_sample(base, comments[longest], sampling)
            adapter = tune(base, [texts[longest]], replace(tuning, epochs=1, batch_size=1), seed=0)
            few = replace(sampling, max_new_tokens=min(2, sampling.max_new_tokens))
            written = sample_comments(base, 2, 0, few, adapter)
    finally:
        torch.set_num_threads(threads)
    mapper(written.texts)
    return sum(len(comment) > sampling.max_new_tokens for comment in comments)


def _read_longest_sample(base: BaseModel, comment: list[int], sampling: SamplingSettings) -> None:
    """A model may have fewer positions than the longest sample takes; plain layers count them without end."""
    if not base.has_plain_layers:
        tokens = [*base.prompt, *comment * (1 + sampling.max_new_tokens // len(comment))]
        with torch.no_grad():
            base.model(torch.tensor([tokens[: len(base.prompt) + sampling.max_new_tokens]], device=base.device))


SIZES = {"cpu": 768, "cuda": 4096}


def measured_rate(device: str) -> float:
    """Floating-point operations a second of square matrices' products, on one thread of a CPU: the best of five."""
    target = torch.device(device)
    size = SIZES.get(target.type, SIZES["cpu"])
    dtype = native_dtype(target) if target.type == "cuda" else torch.float32
    matrix = torch.ones(size, size, device=target, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return best
