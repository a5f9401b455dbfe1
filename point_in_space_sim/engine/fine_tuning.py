"""Fine-tuning of the base model on comments: LoRA adapters (or full weights) on the upper decoder layers.

Why the upper layers: what lies below them never changes, so its activations are computed once for all the comments of
an experiment. A variant goes on from the kept one by training the same adapter further: the adapter stays relative to
the original base model, so it loads with PEFT as it is and the cached activations stay valid.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from experiment.errors import InputError
from experiment.files import replace_atomically
from point_in_space_sim.engine.base_model import MAX_TOKENS, BaseModel
from point_in_space_sim.engine.guard import one_line
from point_in_space_sim.engine.layers import packed_layout, run_layers, use_low_rank_products
from point_in_space_sim.engine.settings import PROMPT, TuningSettings


@dataclass(frozen=True)
class Adapter:
    """What tuning has learnt: LoRA factors under PEFT's names, or, without a LoRA config, whole weights."""

    weights: dict[str, torch.Tensor]
    lora_config: LoraConfig | None


@dataclass(frozen=True)
class FrozenActivations:
    """Hidden states at the input of the first tuned layer, of the prompt and of every comment after the prompt."""

    first_layer: int
    prompt: torch.Tensor  # (prompt tokens, width)
    comments: dict[str, torch.Tensor]  # text -> (tokens, width), the comment's own tokens without the end token


CLIP = 1.0
"""Of the gradient's norm, at most."""
PACK_TOKENS = 512
"""Of the comments that go through the layers together, unless one alone has more: attention's memory grows with the
square. Eight comments of the shipped corpus have 40 to 250."""


def encode_comment(base: BaseModel, text: str) -> list[int]:
    """The tokens the model is to write for a comment: its own and the end token, the first MAX_TOKENS of them."""
    # A character beyond this many a token would be cut anyway, and tokenizers take long over huge texts.
    tokens = base.encode(text[: 64 * MAX_TOKENS])
    return [*tokens, base.tokenizer.eos_token_id][:MAX_TOKENS]


def in_packs(base: BaseModel, texts: Sequence[str]) -> list[list[str]]:
    """The texts in their order, cut into packs of at most PACK_TOKENS tokens and at least one text."""
    return [[texts[i] for i in pack] for pack in packs_of([len(encode_comment(base, text)) for text in texts])]


def packs_of(lengths: Sequence[int]) -> list[list[int]]:
    """The same for texts of so many tokens: their numbers, a list a pack."""
    packs: list[list[int]] = []
    held = PACK_TOKENS
    for number, tokens in enumerate(lengths):
        if held + tokens > PACK_TOKENS:
            packs.append([])
            held = 0
        packs[-1].append(number)
        held += tokens
    return packs


def first_tuned_layer(base: BaseModel, settings: TuningSettings) -> int:
    return max(0, base.model.config.num_hidden_layers - settings.layers)


@torch.no_grad()
def frozen_activations(base: BaseModel, texts: Sequence[str], settings: TuningSettings) -> FrozenActivations:
    """Runs the layers below the tuned ones once over the prompt and all texts."""
    first = first_tuned_layer(base, settings)
    comments: dict[str, torch.Tensor] = {}
    prompt = torch.empty(0)
    texts = list(dict.fromkeys(texts))
    batches = [texts[begin : begin + 16] for begin in range(0, len(texts), 16)]
    for batch in chain(*(in_packs(base, batch) for batch in batches)):
        tokens = [encode_comment(base, text)[:-1] for text in batch]
        lengths = [len(t) for t in tokens]
        ids = torch.tensor([*base.prompt, *chain(*tokens)], device=base.device)
        positions, mask = packed_layout(len(base.prompt), lengths, base.device)
        hidden = run_layers(base.model, base.model.model.embed_tokens(ids)[None], positions, last=first, mask=mask)[0]
        prompt, *rest = hidden.split([len(base.prompt), *lengths])
        comments.update(zip(batch, rest, strict=True))
    return FrozenActivations(first, prompt, comments)


def tune(
    base: BaseModel,
    texts: Sequence[str],
    settings: TuningSettings,
    seed: int,
    start: Adapter | None = None,
    activations: FrozenActivations | None = None,
) -> Adapter:
    """Tunes the base model, or goes on from `start`, so that the prompt is answered with comments like the texts.

    The loss is the mean cross-entropy of the comment's tokens and its end token; AdamW, learning rate falling
    linearly to zero, comments shuffled every epoch. activations: those of a collection that includes all texts.
    The base model is unchanged afterwards. Raises InputError for no texts or settings below 1.
    """
    check_tuning(texts, settings)
    if base.has_plain_layers and activations is None:
        activations = frozen_activations(base, texts, settings)
    batches, init_seed = plan_steps(len(texts), settings, seed)
    with _trainable(base, settings, start, init_seed) as (parameters, learnt):
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
        for batch in batches:
            add_gradient(base, [texts[i] for i in batch], activations)
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return learnt()


def check_tuning(texts: Sequence[str], settings: TuningSettings) -> None:
    if not texts:
        raise InputError("there are no comments to tune on")
    if min(settings.layers, settings.rank, settings.epochs, settings.batch_size) < 1 or settings.learning_rate <= 0:
        raise InputError(f"tuning needs layers, rank, epochs, batch size and learning rate above zero: {settings}")


def plan_steps(texts: int, settings: TuningSettings, seed: int) -> tuple[list[np.ndarray], int]:
    """Which of so many texts each step takes, and the seed of the adapter's first factors."""
    order_seed, init_seed = np.random.SeedSequence(seed).spawn(2)
    generator = np.random.default_rng(order_seed)
    a_step = -(-texts // settings.batch_size)
    steps = [batch for _ in range(settings.epochs) for batch in np.array_split(generator.permutation(texts), a_step)]
    return steps, int(init_seed.generate_state(1)[0])


def add_gradient(base: BaseModel, texts: Sequence[str], activations: FrozenActivations | None) -> None:
    """Adds the gradient of the texts' mean cross-entropy to the trainable parameters, a pack of texts at a time."""
    total = sum(len(encode_comment(base, text)) for text in texts)
    for pack in in_packs(base, texts):
        if activations is not None:
            add_packed_gradient(base, pack, activations, total)
        else:
            share = sum(len(encode_comment(base, text)) for text in pack) / total
            (padded_loss(base, pack) * share).backward()


def packed_loss(base: BaseModel, texts: Sequence[str], activations: FrozenActivations) -> float:
    """Mean cross-entropy of the texts' completion tokens, through the layers from the first tuned one on."""
    with torch.no_grad():
        hidden, at = _packed_states(base, texts, activations)
        logits = base.model.lm_head(hidden).float()
        return float((logits.logsumexp(dim=1)[at[0]] - logits[at]).mean())


def add_packed_gradient(base: BaseModel, texts: Sequence[str], activations: FrozenActivations, total: int) -> None:
    """Adds to the trainable parameters the gradient of the texts' summed cross-entropy over `total`."""
    hidden, at = _packed_states(base, texts, activations)
    states, parts = hidden.detach(), []
    for begin in range(0, len(states), HEAD_ROWS):
        inside = (at[0] >= begin) & (at[0] < begin + HEAD_ROWS)
        part = (at[0][inside] - begin, at[1][inside])
        parts.append(head_gradient(base, states[begin : begin + HEAD_ROWS], part, total))
    hidden.backward(torch.cat(parts))


HEAD_ROWS = 64  # that go through the output head at once: its rows are as wide as the vocabulary

At = tuple[torch.Tensor, torch.Tensor]
"""Rows, and the tokens that they are to predict: (targets,) each. A row may have several."""


def _packed_states(base: BaseModel, texts: Sequence[str], activations: FrozenActivations) -> tuple[torch.Tensor, At]:
    """The output head's input at the tokens that predict something, (rows, width), and what they are to predict."""
    targets = [encode_comment(base, text) for text in texts]
    states = [activations.comments[text] for text in texts]
    prompt_length = len(activations.prompt)
    positions, mask = packed_layout(prompt_length, [len(state) for state in states], base.device)
    hidden = torch.cat([activations.prompt, *states])[None]
    hidden = run_layers(base.model, hidden, positions, first=activations.first_layer, mask=mask)[0]
    rows, row = [], 1
    for target in targets:
        # Row 0 is the prompt's last token, which predicts the first token of every comment.
        rows += [0, *range(row, row + len(target) - 1)]
        row += len(target) - 1
    at = (torch.tensor(rows, device=base.device), torch.tensor([*chain(*targets)], device=base.device))
    return base.model.model.norm(hidden[prompt_length - 1 :]), at


@torch.no_grad()
def head_gradient(base: BaseModel, hidden: torch.Tensor, at: At, total: int | torch.Tensor) -> torch.Tensor:
    """Gradient of the summed cross-entropy over `total` at the output head's input (rows, width), the same shape.

    The head is frozen, and by far the widest matrix: it reads the rows that predict something only, and its gradient
    is written out, softmax minus one at the target. total: of all rows, or (rows, 1), each row's.
    """
    logits = base.model.lm_head(hidden).float()
    weights = torch.bincount(at[0], minlength=len(logits))[:, None].float()
    gradient = torch.exp_(logits.sub_(logits.logsumexp(dim=1, keepdim=True))).mul_(weights)
    gradient.index_put_(at, torch.tensor(-1.0, device=base.device), accumulate=True)
    return gradient.div_(total).to(hidden.dtype) @ base.model.lm_head.weight.to(hidden.dtype)


def padded_loss(base: BaseModel, texts: Sequence[str]) -> torch.Tensor:
    """The same loss through the model's own forward on padded rows, for architectures without plain layers."""
    targets = [encode_comment(base, text) for text in texts]
    longest = max(map(len, targets))
    prompt_length = len(base.prompt)
    ids = torch.zeros(len(texts), prompt_length + longest, dtype=torch.long)
    attended = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, target in enumerate(targets):
        end = prompt_length + len(target)
        ids[row, :end] = torch.tensor([*base.prompt, *target])
        attended[row, :end] = 1
        labels[row, prompt_length:end] = torch.tensor(target)
    logits = base.model(ids.to(base.device), attention_mask=attended.to(base.device)).logits
    predictions = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(predictions, labels[:, 1:].flatten().to(base.device))


@contextmanager
def _trainable(base: BaseModel, settings: TuningSettings, start: Adapter | None, seed: int) -> Iterator[tuple]:
    """Makes the base model trainable for a while: yields its parameters and a function that returns what they learnt.

    The base model is put back exactly as it was.
    """
    if start and (settings.method == "lora") != (start.lora_config is not None):
        raise InputError(f"tuning with method {settings.method} cannot go on from weights of the other method")
    if settings.method == "full":
        names = _upper_weights(base, settings)
        parameters = {name: base.model.get_parameter(name) for name in names}
        frozen = {name: parameter.data for name, parameter in parameters.items()}
        # Steps are far smaller than bfloat16 resolves: the weights are float32 while they are trained.
        for name, parameter in parameters.items():
            parameter.data = (start.weights[name] if start else frozen[name]).to(base.device, torch.float32, copy=True)
            parameter.requires_grad_(True)
        try:
            with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
                yield (
                    list(parameters.values()),
                    lambda: Adapter({name: parameter.data.cpu() for name, parameter in parameters.items()}, None),
                )
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(False)
                parameter.grad = None
                parameter.data = frozen[name]
        return

    config = replace(start.lora_config) if start and start.lora_config else lora_config(base, settings)
    with own_random_numbers(base.device), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # about renamed methods between peft and transformers
        peft_model = get_peft_model(base.model, config)
    if config.lora_dropout == 0 and not config.use_dora:
        use_low_rank_products(peft_model)
    try:
        if start:
            set_peft_model_state_dict(peft_model, start.weights)
        yield (
            [parameter for parameter in peft_model.parameters() if parameter.requires_grad],
            lambda: Adapter(
                {name: weight.detach().cpu().clone() for name, weight in get_peft_model_state_dict(peft_model).items()},
                config,
            ),
        )
    finally:
        peft_model.unload()
        base.model.requires_grad_(False)


def own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Puts torch's generators back afterwards: the CPU's, and the device's own; no other device is woken."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def lora_config(base: BaseModel, settings: TuningSettings) -> LoraConfig:
    """LoRA (Hu et al., 2021) on every linear map of the tuned layers."""
    config = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, task_type="CAUSAL_LM", target_modules="all-linear"
    )
    if not base.has_plain_layers:
        return config
    layers = base.model.model.layers
    linear = sorted(
        {name.split(".")[-1] for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)}
    )
    return replace(
        config,
        target_modules=linear,
        layers_pattern="layers",
        layers_to_transform=list(range(first_tuned_layer(base, settings), len(layers))),
    )


def _upper_weights(base: BaseModel, settings: TuningSettings) -> list[str]:
    """Names of the weights that full tuning changes: of the upper layers and the last norm.

    The embedding table stays: it feeds the cached activations. Other architectures are tuned whole.
    """
    names = [name for name, _ in base.model.named_parameters()]
    if not base.has_plain_layers:
        return names
    last = base.model.config.num_hidden_layers
    prefixes = tuple(f"model.layers.{i}." for i in range(first_tuned_layer(base, settings), last))
    return [name for name in names if name.startswith((*prefixes, "model.norm."))]


@contextmanager
def merged(base: BaseModel, adapter: Adapter | None) -> Iterator[Mapping[str, torch.Tensor]]:
    """Adds the adapter to the base model's weights for a while, and puts exactly the old weights back. Yields these by
    their names."""
    replaced: dict[str, torch.Tensor] = {}
    try:
        for name, weight in () if adapter is None else _merged_weights(base, adapter):
            replaced[name] = base.model.get_parameter(name).data
            base.model.get_parameter(name).data = weight
        yield replaced
    finally:
        for name, weight in reversed(replaced.items()):  # two names may be one tied parameter's
            base.model.get_parameter(name).data = weight


def _merged_weights(base: BaseModel, adapter: Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    if adapter.lora_config is None:
        for name, weight in adapter.weights.items():
            yield name, weight.to(base.device, base.dtype)
        return
    for name, (a, b) in _factors(adapter).items():
        module = base.model.get_submodule(name)
        delta = b.to(base.device) @ a.to(base.device)
        # GPT-2's Conv1D holds its matrix the other way round.
        delta = delta if isinstance(module, torch.nn.Linear) else delta.T
        yield f"{name}.weight", (module.weight.data.float() + delta).to(base.dtype)


def _factors(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> its LoRA factors A (rank, in) and B (out, rank) in float32, the scaling multiplied into B."""
    assert adapter.lora_config is not None
    scaling = adapter.lora_config.lora_alpha / adapter.lora_config.r
    names = [name for name in adapter.weights if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            adapter.weights[name].float(),
            scaling * adapter.weights[name.replace(".lora_A.", ".lora_B.")].float(),
        )
        for name in names
    }


def average_adapters(adapters: Sequence[Adapter], rank: int | None = None) -> tuple[Adapter, float]:
    """The adapter whose change of the weights is the mean of the given adapters' changes, and the share of it kept.

    The mean of B_i A_i is not (mean B_i)(mean A_i). It is the product of the factors laid side by side,
    [B_1 ... B_n] / n times [A_1; ...; A_n], whose rank is the sum of the ranks: exact, share 1. With `rank`, its best
    approximation of that rank (truncated singular values; Eckart and Young, 1936), and the share of the squared
    Frobenius norm that it keeps. Whole weights are averaged as they are.
    """
    first = adapters[0]
    if first.lora_config is None:
        return Adapter(
            {name: torch.stack([adapter.weights[name] for adapter in adapters]).mean(0) for name in first.weights}, None
        ), 1.0
    factors = [_factors(adapter) for adapter in adapters]
    weights, kept, total = {}, 0.0, 0.0
    new_rank = rank or sum(adapter.lora_config.r for adapter in adapters if adapter.lora_config)
    scaling = first.lora_config.lora_alpha / first.lora_config.r
    for module in factors[0]:
        # Singular values of B A from those of the small triangular factors of both.
        q_b, r_b = torch.linalg.qr(torch.cat([f[module][1] for f in factors], dim=1).double() / len(adapters))
        q_a, r_a = torch.linalg.qr(torch.cat([f[module][0] for f in factors], dim=0).double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        total += float((s**2).sum())
        s, used = s[:new_rank], min(new_rank, len(s))
        kept += float((s**2).sum())
        a = torch.zeros(new_rank, q_a.shape[0])
        b = torch.zeros(q_b.shape[0], new_rank)
        a[:used] = (s.sqrt()[:, None] * (vh[:used] @ q_a.T)).float()
        b[:, :used] = (q_b @ u[:, :used] * s.sqrt() / scaling).float()
        weights[f"base_model.model.{module}.lora_A.weight"] = a
        weights[f"base_model.model.{module}.lora_B.weight"] = b
    config = replace(first.lora_config, r=new_rank, lora_alpha=round(scaling * new_rank))
    return Adapter(weights, config), kept / total if total else 1.0


def save_adapter(adapter: Adapter, folder: str | Path, base: BaseModel | str) -> None:
    """Writes the adapter as PEFT does (`PeftModel.from_pretrained` reads it), or full weights as a model folder.

    base: for a LoRA adapter, the base model's name is enough.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if adapter.lora_config is None:
        assert isinstance(base, BaseModel), "whole weights are saved with those that they leave alone"
        with merged(base, adapter):
            base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        return
    with replace_atomically(folder / "adapter_model.safetensors") as temporary:
        save_file(adapter.weights, temporary, metadata={"format": "pt"})
    # The name of the base model, not the folder that it was read from: adapters are shared between machines.
    name = base if isinstance(base, str) else base.name
    config = replace(adapter.lora_config, base_model_name_or_path=name, inference_mode=True)
    config.save_pretrained(str(folder))
    # peft keeps the modules' names as a set, whose order differs from process to process.
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content["target_modules"], list):
        content["target_modules"].sort()
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(folder: str | Path) -> Adapter:
    """Reads a LoRA adapter in PEFT's format. Raises InputError where there is none or it is damaged."""
    with one_line(f"cannot read an adapter from {folder}", "restore its files or leave it out"):
        config = LoraConfig.from_pretrained(str(folder))
        return Adapter(load_file(Path(folder) / "adapter_model.safetensors"), replace(config, inference_mode=False))


def write_chat_jsonl(texts: Sequence[str], path: str | Path, prompt: str = PROMPT) -> None:
    """Writes training comments as chat messages, one JSON object a line, which other trainers read."""
    with replace_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for text in texts:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
