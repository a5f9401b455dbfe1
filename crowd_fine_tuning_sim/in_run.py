"""What people's texts were worth during one tuning: first-order in-run data Shapley (Wang et al., ICLR 2025).

A step of plain SGD lowers the validation loss, to first order, by the learning rate times the product of its gradient
and the validation's. The step's gradient is a sum over the texts of its batch, so this fall is additive in them, and
the Shapley value of a text is its own term; a person's is the sum over steps and over their texts (arXiv 2406.11011,
equation 4).

The tuning here is AdamW's, whose own form of the step (momentum, division by the gradients' scale, clipping) the values
leave out: where gradients of a step nearly cancel out, its division makes parts of both signs thousands of times
larger, and the first steps would outweigh all others. They also leave out what a person's texts change in the gradients
of later steps: values are of this one run, in its order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from experiment.errors import InputError
from point_in_space_sim.engine.base_model import BaseModel
from point_in_space_sim.engine.fine_tuning import (
    CLIP,
    Adapter,
    FrozenActivations,
    _trainable,
    add_gradient,
    check_tuning,
    encode_comment,
    frozen_activations,
    plan_steps,
)
from point_in_space_sim.engine.settings import TuningSettings
from point_in_space_sim.engine.variants import Engine, base_in_use, base_of, return_large_memory_at_once, return_memory

Gradient = list[torch.Tensor | None]
"""A parameter's each, in the parameters' order; None where the loss does not reach it."""


@dataclass(frozen=True)
class InRun:
    """One tuning on everybody's texts, and what it gives each person."""

    values: np.ndarray  # (people,), in nats of validation loss: positive for who lowered it
    adapter: Adapter


Task = tuple[Sequence[Sequence[str]], Sequence[str], int]
"""People's texts, the validation texts, and the seed. No more: what a worker imports stays in its memory."""


def in_run_values(engine: Engine, task: Task) -> np.ndarray:
    """tune_in_run's values (people,), in a worker."""
    torch.set_num_threads(1)  # two on a busy machine wait for each other
    return_large_memory_at_once()
    people, validation, seed = task
    with base_in_use:
        values = tune_in_run(base_of(engine), people, validation, engine.tuning, seed).values
    return_memory()
    return values


def tune_in_run(
    base: BaseModel, people: Sequence[Sequence[str]], validation: Sequence[str], settings: TuningSettings, seed: int
) -> InRun:
    """Tunes as `tune` does on all texts in their order, with the same seed to the same adapter up to rounding.

    Each step goes through the validation texts too, and keeps a gradient for each person in it until it is taken.
    The base model is unchanged afterwards. Raises InputError for no people, a person without texts, or no validation
    texts.
    """
    _check(people, validation)
    texts = [*chain(*people)]
    owners = np.repeat(np.arange(len(people)), [len(own) for own in people])
    check_tuning(texts, settings)
    activations = frozen_activations(base, [*texts, *validation], settings) if base.has_plain_layers else None
    steps, init_seed = plan_steps(len(texts), settings, seed)
    values = np.zeros(len(people))
    with _trainable(base, settings, None, init_seed) as (parameters, learnt):
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
        for step in steps:
            slope = gradient_of(base, validation, parameters, activations)
            present = np.unique(owners[step])
            shares = [[texts[i] for i in step if owners[i] == person] for person in present]
            gradients = gradients_of_shares(base, shares, parameters, activations)
            for parameter, parts in zip(parameters, zip(*gradients, strict=True), strict=True):
                known = [part for part in parts if part is not None]
                parameter.grad = torch.stack(known).sum(0) if known else None
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            values[present] += [schedule.get_last_lr()[0] * product(slope, gradient) for gradient in gradients]
            schedule.step()
        return InRun(values, learnt())


def _check(people: Sequence[Sequence[str]], validation: Sequence[str]) -> None:
    if not people:
        raise InputError("there are no people whose texts to tune on")
    without = next((number for number, own in enumerate(people) if not own), None)
    if without is not None:
        raise InputError(f"person {without} has no texts: leave them out, or give them some")
    if not validation:
        raise InputError("there are no validation texts to value people's texts with")


def gradient_of(
    base: BaseModel,
    texts: Sequence[str],
    parameters: Sequence[torch.nn.Parameter],
    activations: FrozenActivations | None,
) -> Gradient:
    """That of the texts' mean cross-entropy; the parameters hold none before and none afterwards."""
    add_gradient(base, texts, activations)
    gradient = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradient


def gradients_of_shares(
    base: BaseModel,
    shares: Sequence[Sequence[str]],
    parameters: Sequence[torch.nn.Parameter],
    activations: FrozenActivations | None,
) -> list[Gradient]:
    """Of a step's mean cross-entropy over all tokens, that of each share of its texts; they add up to the step's."""
    tokens = [sum(len(encode_comment(base, text)) for text in share) for share in shares]
    gradients = []
    for share, own in zip(shares, tokens, strict=True):
        gradient = gradient_of(base, share, parameters, activations)
        for part in gradient:
            if part is not None:
                part.mul_(own / sum(tokens))
        gradients.append(gradient)
    return gradients


def product(a: Gradient, b: Gradient) -> float:
    """The dot product of two gradients."""
    pairs = [(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return float(torch.stack([x @ y for x, y in pairs]).double().sum()) if pairs else 0.0
