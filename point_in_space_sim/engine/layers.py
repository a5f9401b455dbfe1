"""The fast path: decoder layers of a Llama-like model run one by one, on packed rows and with a cache of our own.

`layers_are_plain` finds out whether that gives a model's own logits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from point_in_space_sim.engine.guard import is_out_of_memory


def run_layers(
    model: Any,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    *,
    first: int = 0,
    last: int | None = None,
    mask: torch.Tensor | None = None,
    cache: Any = None,
) -> torch.Tensor:
    """Decoder layers first..last of a Llama-like model: hidden states (rows, tokens, width) -> the same shape.

    positions: (rows or 1, tokens), each token's position for the rotary embedding. mask: None is causal attention;
    else bool (1, 1, tokens, keys), True where a token may look. cache: takes each layer's keys and values.
    """
    positions = positions.to(hidden.device)
    rotary = model.model.rotary_emb(hidden, positions)
    own_attention = model.config._attn_implementation
    model.config._attn_implementation = "grouped_query"
    try:
        for layer in model.model.layers[first:last]:
            hidden = layer(
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, past_key_values=cache
            )
    finally:
        model.config._attn_implementation = own_attention
    return hidden


def grouped_query_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling q k') v as plain products, without a copy of the keys for every query head.

    query (rows, heads, tokens, width), key and value (rows, key heads, keys, width), possibly of a wider type ->
    (rows, tokens, heads, width). On a CPU several times faster than torch's fused kernel: at one query a row, and
    in the backward pass. On CUDA that kernel is taken: it never writes the scores down.
    """
    rows, heads, tokens, width = query.shape
    key_heads, keys = key.shape[1:3]
    if query.device.type == "cuda":
        return _fused_attention(query, key, value, mask, scaling), None
    grouped = (query * scaling).to(key.dtype).reshape(rows, key_heads, heads // key_heads * tokens, width)
    scores = (grouped @ key.transpose(2, 3)).view(rows, heads, tokens, keys)
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype).view(rows, key_heads, -1, keys)
    return (shares @ value).view(rows, heads, tokens, width).transpose(1, 2).to(query.dtype), None


def _fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The same by torch's kernel. At one token, which sees all keys, the heads of a key head are its tokens."""
    rows, heads, tokens, width = query.shape
    key_heads, keys = key.shape[1:3]
    if mask is None and tokens == 1:
        query = query.reshape(rows, key_heads, heads // key_heads, width)
    else:
        key, value = (part.repeat_interleave(heads // key_heads, dim=1) for part in (key, value))
        if mask is None and keys > tokens:
            mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    causal = mask is None and tokens > 1
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling)
    return found.reshape(rows, heads, tokens, width).transpose(1, 2)


AttentionInterface.register("grouped_query", grouped_query_attention)


def packed_layout(
    prompt_length: int, lengths: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (1, tokens) and mask (1, 1, tokens, tokens) of one row that holds the prompt once and then comments.

    Every comment follows the prompt directly in position and sees the prompt and itself only, so a batch needs
    neither padding nor a prompt of its own for each comment.
    """
    owner = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([prompt_length, *lengths]))
    positions = torch.cat([torch.arange(prompt_length), *(prompt_length + torch.arange(n) for n in lengths)])
    order = torch.arange(len(owner))
    visible = (order[:, None] >= order) & ((owner[:, None] == owner) | (owner == 0))
    return positions[None].to(device), visible[None, None].to(device)


class KeyValueCache:
    """Keys and values of every layer, (rows, heads, capacity, width), filled up to `length` tokens.

    It stands in for transformers' own cache, which copies all keys at every token. `length` is advanced by the caller.
    It grows by GROWTH tokens at a time: by then many rows have left. On a CPU it holds float32: batches of small
    products, as attention needs, run twice as fast in it as in bfloat16.
    """

    GROWTH = 16

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key.shape[2]
        held = self.layers.get(layer)
        if held is None or held[0].shape[2] < end:
            self.layers[layer] = (self._wider(key, held and held[0], end), self._wider(value, held and held[1], end))
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            store[:, :, self.length : end] = new
        return self.layers[layer][0][:, :, :end], self.layers[layer][1][:, :, :end]

    def _wider(self, new: torch.Tensor, held: torch.Tensor | None, end: int) -> torch.Tensor:
        """A store like `new` for `end` tokens and some more, with what was held."""
        rows, heads, _, width = new.shape
        dtype = torch.float32 if new.device.type == "cpu" else new.dtype
        store = new.new_empty(rows, heads, end + self.GROWTH, width, dtype=dtype)
        if held is not None:
            store[:, :, : self.length] = held[:, :, : self.length]
        return store

    def repeat(self, times: int) -> None:
        """Turns every row into as many equal ones, one after another."""
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = (keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0))

    def move(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was; rows beyond them go. Only rows that move are copied."""
        to = [row for row, source in enumerate(sources) if row != source]
        for layer, stores in self.layers.items():
            for store in stores:
                if to:
                    store[to, :, : self.length] = store[[sources[row] for row in to], :, : self.length]
            self.layers[layer] = (stores[0][: len(sources)], stores[1][: len(sources)])


class _LowRank(torch.autograd.Function):
    """x W' + bias + scaling (x A') B' for a frozen W: all products in x's precision, A and B and their gradients in
    their own. PEFT casts x to A's float32 instead, and every step in between is a dispatch of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), (b * scaling).to(x.dtype)
        inner = rows @ a.T
        found = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.scaling = scaling
        return found.addmm_(inner, b.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, a, b, inner = ctx.saved_tensors
        outer = gradients[0].reshape(-1, gradients[0].shape[-1])
        through = outer @ b
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (outer @ weight).addmm_(through, a).view(*gradients[0].shape[:-1], -1)
        return of_x, None, None, (through.T @ rows).float(), (outer.T @ inner).float() * ctx.scaling, None


def use_low_rank_products(peft_model: torch.nn.Module) -> None:
    """Has PEFT's LoRA layers on plain linear maps compute by _LowRank; they are to have no dropout, and one adapter."""
    for module in peft_model.modules():
        if isinstance(module, LoraLinear) and isinstance(module.base_layer, torch.nn.Linear):
            module.forward = partial(_low_rank_forward, module)  # type: ignore[method-assign]


def _low_rank_forward(module: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    (name,) = module.active_adapters
    frozen, a, b = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
    return _LowRank.apply(x, frozen.weight, frozen.bias, a, b, module.scaling[name])


SHORT = 8  # tokens of the probe's second comment


@torch.no_grad()
def layers_are_plain(model: Any, prompt: list[int], length: int, vocabulary: int) -> bool:
    """Whether the fast path gives the model's own logits for a comment of `length` tokens after the prompt.

    Both ways run in float32, where a sliding window, a capped score or another mask cannot hide behind rounding: a
    pack of the long comment and a short one, and one more token on a cache that holds the rest, against the model's
    own decoder on each comment; and its own logits of the short one. The comments are random tokens below
    `vocabulary`.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (length, SHORT))
    long, short = (torch.tensor([[*prompt, *comment]], device=model.device) for comment in tokens)
    end = long.shape[1]
    try:
        with in_float32(model):
            positions, mask = packed_layout(len(prompt), [length, SHORT], model.device)
            hidden = model.model.embed_tokens(torch.cat([long, short[:, len(prompt) :]], dim=1))
            cache = KeyValueCache()
            hidden = run_layers(model, hidden, positions, mask=mask, cache=cache)
            cache.length = end - 1
            stepped = run_layers(model, model.model.embed_tokens(long[:, -1:]), torch.tensor([[end - 1]]), cache=cache)
            hidden = model.model.norm(torch.cat([hidden[:, end - SHORT :], stepped], dim=1))
            logits = model.lm_head(hidden[:, SHORT : 2 * SHORT])
            own = [model.model(ids).last_hidden_state[:, -SHORT:] for ids in (long, short)]
            own_logits = model(short).logits[:, -SHORT:].float()
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        return False
    expected = torch.cat([*own, own[0][:, -1:]], dim=1).float()
    return _near(hidden, expected) and _near(logits, own_logits)


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-4 * expected.norm())


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Has every module compute in float32. Its weights are widened while it runs only: no copy of the whole model."""
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    held: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                held[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = held.pop(parameter, parameter.data)

    hooks = [module.register_forward_pre_hook(widen) for module in owners]
    hooks += [module.register_forward_hook(restore, always_call=True) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in held.items():
            parameter.data = data
