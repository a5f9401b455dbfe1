"""Many models at once on one device: tuned in one loop and sampled in one batch, each with an adapter of its own.

One small model leaves a GPU idle between its many short kernels; a stack of them shares every kernel. The stack's
adapters are the rows of one matrix, (models, numbers), and a linear map adds every model's product with its own factors
in one batched product. What comes out is what tune and sample_comments give, up to rounding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from peft import LoraConfig

from point_in_space_sim.engine.base_model import MAX_TOKENS, BaseModel
from point_in_space_sim.engine.fine_tuning import (
    CLIP,
    Adapter,
    FrozenActivations,
    check_tuning,
    encode_comment,
    first_tuned_layer,
    head_gradient,
    lora_config,
    own_random_numbers,
    packs_of,
    plan_steps,
)
from point_in_space_sim.engine.layers import run_layers
from point_in_space_sim.engine.sampling import Samples, as_samples, sample_tokens
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings

BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's, as in torch
HEAD_ROWS = 8192  # hidden states that the output head reads at once: its logits are the widest array by far
PADDED_TO = 8  # tokens: attention's kernels read their mask in such steps


@dataclass(frozen=True)
class Task:
    """One model of a stack: what tune takes. activations: those of a collection that includes all texts."""

    texts: Sequence[str]
    seed: int
    start: Adapter | None
    activations: FrozenActivations


def can_stack(base: BaseModel, tuning: TuningSettings, sampling: SamplingSettings) -> bool:
    plain = base.has_plain_layers and (
        sampling.max_new_tokens <= MAX_TOKENS or base.is_plain_for(sampling.max_new_tokens)
    )
    return tuning.method == "lora" and plain


def tune_stacked(base: BaseModel, tasks: Sequence[Task], settings: TuningSettings) -> list[Adapter]:
    """The models' adapters, as tune makes them one by one. Raises InputError as tune does."""
    for task in tasks:
        check_tuning(task.texts, settings)
    modules, config = _tuned_modules(base, settings), lora_config(base, settings)
    plans = [plan_steps(len(task.texts), settings, task.seed) for task in tasks]
    steps = np.array([len(batches) for batches, _ in plans])
    order = np.argsort(-steps, kind="stable")  # the models that are still tuned are the first rows
    rows = [
        _initial(modules, settings.rank, plans[i][1]) if (start := tasks[i].start) is None else _as_row(modules, start)
        for i in order
    ]
    weights = torch.stack(rows).to(base.device)
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    texts = _Texts(base, [tasks[i] for i in order])
    until = torch.tensor(steps[order], device=base.device)[:, None]
    with _low_rank_products(modules, config) as attach:
        for step in range(steps.max()):
            k = int((steps > step).sum())
            batches = [[tasks[i].texts[j] for j in plans[i][0][step]] for i in order[:k]]
            tuned = weights[:k].detach().requires_grad_()
            _add_gradient(base, tuned, batches, texts, attach)
            assert tuned.grad is not None
            gradient = tuned.grad
            gradient *= (CLIP / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
            mean[:k].lerp_(gradient, 1 - BETAS[0])
            square[:k].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            rate = settings.learning_rate * (1 - step / until[:k]) / (1 - BETAS[0] ** (step + 1))
            scale = (square[:k] / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(EPSILON)
            weights[:k] -= rate * mean[:k] / scale
    adapters = {
        i: Adapter(_as_factors(modules, row, config.r), config) for i, row in zip(order, weights.cpu(), strict=True)
    }
    return [adapters[i] for i in range(len(tasks))]


def sample_stacked(
    base: BaseModel,
    draws: Sequence[tuple[Adapter | None, int]],
    count: int,
    tuning: TuningSettings,
    sampling: SamplingSettings,
) -> list[Samples]:
    """What sample_comments draws for each adapter and seed, from the adapters beside the base model's weights.

    tuning: which layers the adapters change, and their rank.
    """
    modules, config = _tuned_modules(base, tuning), lora_config(base, tuning)
    nothing = torch.zeros(sum(map(sum, _sizes(modules, config.r))))
    distinct = {id(adapter): adapter for adapter, _ in draws}
    rows = {key: nothing if adapter is None else _as_row(modules, adapter) for key, adapter in distinct.items()}
    weights = torch.stack([rows[id(adapter)] for adapter, _ in draws]).to(base.device, base.dtype)
    with torch.inference_mode(), _low_rank_products(modules, config) as attach:
        attach(weights)
        drawn = sample_tokens(base, count, [seed for _, seed in draws], sampling, base.end_tokens)
    return [as_samples(base, drawn[begin : begin + count]) for begin in range(0, len(drawn), count)]


class _Texts:
    """All texts' tokens and frozen activations of a stack, in one array each on the device."""

    def __init__(self, base: BaseModel, tasks: Sequence[Task]) -> None:
        held = {text: task.activations.comments[text] for task in tasks for text in task.texts}
        self.first_layer = tasks[0].activations.first_layer
        self.prompt = len(tasks[0].activations.prompt)
        self.tokens = {text: encode_comment(base, text) for text in held}
        self.states = torch.cat([tasks[0].activations.prompt, *held.values()])
        ends = np.cumsum([self.prompt, *map(len, held.values())])
        self.begin = dict(zip(held, ends[:-1].tolist(), strict=True))


def _add_gradient(
    base: BaseModel, weights: torch.Tensor, batches: Sequence[Sequence[str]], texts: _Texts, attach: "Attach"
) -> None:
    """Adds to weights.grad, (models, numbers), the gradient of each model's mean cross-entropy on its batch.

    A batch's packs (packs_of) are rows of one padded array, which carries its comments behind one prompt.
    """
    packs = [
        (model, [texts_of_model[i] for i in pack])
        for model, texts_of_model in enumerate(batches)
        for pack in packs_of([len(texts.tokens[text]) for text in texts_of_model])
    ]
    totals = [sum(len(texts.tokens[text]) for text in batch) for batch in batches]
    prompt = texts.prompt
    length = max(prompt + sum(len(texts.tokens[text]) - 1 for text in pack) for _, pack in packs)
    length = -(-length // PADDED_TO) * PADDED_TO
    source = np.zeros((len(packs), length), dtype=np.int64)  # of each token's state
    positions = np.zeros_like(source)
    comment = np.full_like(source, -1)  # 0 is the prompt, -1 is padding
    predicting: list[int] = []  # in the flattened array
    at_rows: list[int] = []
    at_tokens: list[int] = []
    of_model: list[int] = []
    for row, (model, pack) in enumerate(packs):
        source[row, :prompt] = positions[row, :prompt] = np.arange(prompt)
        comment[row, :prompt] = 0
        end, first = prompt, len(predicting)
        predicting.append(row * length + prompt - 1)  # the prompt's last token predicts the first of every comment
        for number, text in enumerate(pack, start=1):
            tokens, begin = texts.tokens[text], end
            end += len(tokens) - 1
            source[row, begin:end] = texts.begin[text] + np.arange(end - begin)
            positions[row, begin:end] = prompt + np.arange(end - begin)
            comment[row, begin:end] = number
            at_rows += [first, *range(len(predicting), len(predicting) + end - begin)]
            at_tokens += tokens
            predicting += range(row * length + begin, row * length + end)
        of_model += [totals[model]] * (len(predicting) - first)

    device = base.device
    owner = torch.tensor(comment, device=device)
    earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = earlier & ((owner[:, :, None] == owner[:, None]) | (owner[:, None] == 0))
    models = [model for model, _ in packs]
    attach(weights.to(base.dtype) if models == list(range(len(weights))) else weights.to(base.dtype)[models])
    hidden = run_layers(
        base.model,
        texts.states[torch.tensor(source, device=device)],
        torch.tensor(positions, device=device),
        first=texts.first_layer,
        mask=mask[:, None],
    )
    hidden = base.model.model.norm(hidden.flatten(0, 1)[torch.tensor(predicting, device=device)])
    order = np.argsort(at_rows, kind="stable")
    sorted_rows = np.array(at_rows)[order]
    at = (torch.tensor(sorted_rows, device=device), torch.tensor(np.array(at_tokens)[order], device=device))
    share = torch.tensor(of_model, dtype=torch.float32, device=device)[:, None]
    states, gradient = hidden.detach(), torch.empty_like(hidden)
    for begin in range(0, len(states), HEAD_ROWS):
        part = slice(begin, begin + HEAD_ROWS)
        first, last = np.searchsorted(sorted_rows, [begin, begin + HEAD_ROWS]).tolist()
        inside = (at[0][first:last] - begin, at[1][first:last])
        gradient[part] = head_gradient(base, states[part], inside, share[part])
    hidden.backward(gradient)


Modules = Sequence[tuple[str, torch.nn.Linear]]
Attach = Callable[[torch.Tensor], None]


def _tuned_modules(base: BaseModel, settings: TuningSettings) -> Modules:
    """The linear maps that LoRA changes, in the order in which PEFT comes across them."""
    first = first_tuned_layer(base, settings)
    return [
        (f"model.layers.{number}.{name}", module)
        for number, layer in enumerate(base.model.model.layers)
        for name, module in layer.named_modules()
        if number >= first and isinstance(module, torch.nn.Linear)
    ]


def _sizes(modules: Modules, rank: int) -> list[tuple[int, int]]:
    """How many numbers each map's factors A and B have."""
    return [(rank * module.in_features, module.out_features * rank) for _, module in modules]


def _names(module: str) -> list[str]:
    return [f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB"]


def _as_row(modules: Modules, adapter: Adapter) -> torch.Tensor:
    return torch.cat([adapter.weights[name].flatten() for module, _ in modules for name in _names(module)])


def _as_factors(modules: Modules, row: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    names = [name for module, _ in modules for name in _names(module)]
    parts = row.split([*chain(*_sizes(modules, rank))])
    shapes = [shape for _, m in modules for shape in ((rank, m.in_features), (m.out_features, rank))]
    return {name: part.view(shape).clone() for name, part, shape in zip(names, parts, shapes, strict=True)}


def _initial(modules: Modules, rank: int, seed: int) -> torch.Tensor:
    """The factors that PEFT begins with for a seed: it makes two linear maps, and then draws A once more; B is 0."""
    rows = []
    with own_random_numbers(torch.device("cpu")):
        torch.manual_seed(seed)
        for _, module in modules:
            a = torch.nn.Linear(module.in_features, rank, bias=False).weight
            b = torch.nn.Linear(rank, module.out_features, bias=False).weight
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            rows += [a.detach().flatten(), torch.zeros(b.numel())]
    return torch.cat(rows)


@contextmanager
def _low_rank_products(modules: Modules, config: LoraConfig) -> Iterator[Attach]:
    """Has each map add its rows' own low-rank products; yields what attaches factors: a row (numbers,) for each of the
    equal parts that a map's input has along its first axis."""
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    sizes, rank = _sizes(modules, config.r), config.r

    def attach(weights: torch.Tensor) -> None:
        parts = iter(weights.split([*chain(*sizes)], dim=1))
        for (name, module), a, b in zip(modules, parts, parts, strict=True):
            factors[name] = (a.view(-1, rank, module.in_features), b.view(-1, module.out_features, rank))

    def forward(name: str, module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        a, b = factors[name]
        rows = x.reshape(len(a), -1, module.in_features)
        found = torch.nn.functional.linear(rows, module.weight, module.bias)
        return torch.baddbmm(found, rows @ a.mT, b.mT, alpha=config.lora_alpha / rank).view(*x.shape[:-1], -1)

    try:
        for name, module in modules:
            module.forward = partial(forward, name, module)  # type: ignore[method-assign]
        yield attach
    finally:
        for _, module in modules:
            module.__dict__.pop("forward", None)
