"""What people's texts were worth during one tuning: first-order in-run data Shapley (Wang et al., 2024).

One step lowers the validation loss, to first order, by -<its gradient, the step>. The step is a sum over the texts of
its batch, so this fall is additive in them, and the Shapley value of a text is its own term; a person's is the sum over
steps and over their texts. Wang et al. (arXiv 2406.11011) take plain SGD, where the term is the learning rate times the
dot product of the validation gradient and the text's gradient; `sgd_values` are these, which leave the optimiser out.
Ours is AdamW with clipping:

    update = -rate * m_hat / (sqrt(v_hat) + eps),  m_hat = (beta1 * m_before + (1 - beta1) * clip * g) / (1 - beta1^t)

which is linear in the step's gradient g = sum of g_i where v and the clipping factor are held at the values they took.
A person's part of the update is that of their g_i; everybody's parts add up to that of the whole g.

What this leaves out:
- Momentum's later effects: g_i also moves the weights through m in the steps that follow. The steps' weight
  (1 - beta1) / (1 - beta1^t) is 1 in the first step, 0.15 in the tenth and 0.1 far on, so early steps count most, and
  the values add up to less than the fall of the validation loss.
- What a person changes in v and in the clipping factor. Where the g_i of the first steps nearly cancel out, v is
  small, and the parts that cancel are thousands of times the learning rate, of both signs: the first step's part is
  g_i / |g|, with the heavy tails of such a quotient. With few steps it can outweigh all later ones.
- All that a person's texts change in the gradients of later steps: values are of this one run, in its order.
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

Gradient = list[torch.Tensor | None]
"""A parameter's each, in the parameters' order; None where the loss does not reach it."""


@dataclass(frozen=True)
class InRun:
    """One tuning on everybody's texts, and what it gives each person."""

    values: np.ndarray  # (people,), in nats of validation loss: positive for who lowered it
    sgd_values: np.ndarray  # (people,): the same as if each step were the learning rate times the gradient
    adapter: Adapter


def in_run_values(
    base: BaseModel, people: Sequence[Sequence[str]], validation: Sequence[str], settings: TuningSettings, seed: int
) -> np.ndarray:
    """(people,): how far each person's texts lowered the validation loss in one tuning on all texts, to first order.

    Raises InputError for no people, a person without texts, or no validation texts.
    """
    return tune_in_run(base, people, validation, settings, seed).values


def tune_in_run(
    base: BaseModel, people: Sequence[Sequence[str]], validation: Sequence[str], settings: TuningSettings, seed: int
) -> InRun:
    """Tunes as `tune` does on all texts in their order, with the same seed to the same adapter up to rounding.

    Each step goes through the validation texts too, and keeps a gradient for each person in it until it is taken.
    The base model is unchanged afterwards. Raises as in_run_values does.
    """
    _check(people, validation)
    texts = [*chain(*people)]
    owners = np.repeat(np.arange(len(people)), [len(own) for own in people])
    check_tuning(texts, settings)
    activations = frozen_activations(base, [*texts, *validation], settings) if base.has_plain_layers else None
    steps, init_seed = plan_steps(len(texts), settings, seed)
    values = torch.zeros(2, len(people), dtype=torch.float64, device=base.device)
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
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            values[:, torch.from_numpy(present).to(base.device)] += falls(optimizer, parameters, norm, slope, gradients)
            schedule.step()
        preconditioned, sgd = values.cpu().numpy()
        return InRun(preconditioned, sgd, learnt())


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


def update_per_gradient(
    optimizer: torch.optim.AdamW, parameter: torch.nn.Parameter, norm: torch.Tensor
) -> torch.Tensor:
    """How far the step just taken moved against each unit of its own gradient before clipping, as the parameter.

    Read before the schedule moves on. norm: the whole gradient's, before clipping.
    """
    group, state = optimizer.param_groups[0], optimizer.state[parameter]
    beta1, beta2 = group["betas"]
    # Not float32: 1 - 0.999 would keep four digits.
    count = state["step"].double()
    clip = (CLIP / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
    rate = group["lr"] * clip * (1 - beta1) / (1 - beta1**count)
    return rate / ((state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"])


@torch.no_grad()
def falls(
    optimizer: torch.optim.AdamW,
    parameters: Sequence[torch.nn.Parameter],
    norm: torch.Tensor,
    slope: Gradient,
    gradients: Sequence[Gradient],
) -> torch.Tensor:
    """(2, shares): by how much the validation loss, of gradient `slope`, falls with each share's part of the step.

    First of the step that was taken, then of plain SGD's at the same learning rate.
    """
    total = torch.zeros(2, len(gradients), dtype=torch.float64, device=norm.device)
    for number, parameter in enumerate(parameters):
        parts, rise = [gradient[number] for gradient in gradients], slope[number]
        if rise is None or all(part is None for part in parts):
            continue
        rates = update_per_gradient(optimizer, parameter, norm), optimizer.param_groups[0]["lr"]
        directions = torch.stack([(rate * rise).flatten() for rate in rates])
        none = directions.new_zeros(2)
        total += torch.stack([none if part is None else directions @ part.flatten() for part in parts], dim=1)
    return total
