"""A Llama's decoder laid out for one token a row: fewer, wider products, on weights that are rearranged once.

A CPU's products rearrange a weight at every call, which with few rows takes as long as the product itself; and with few
rows the number of calls counts. Layers of other classes, however alike, go through run_layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from point_in_space_sim.engine.layers import KeyValueCache, grouped_query_attention

ROWS = 24  # that the layout is chosen for; it serves any number of them


@dataclass(frozen=True)
class Layer:
    """module: the model's own, for its norms and its activation. The others: packed weights."""

    module: Any
    query_key_value: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Decoder:
    layers: Sequence[Layer]
    head: torch.Tensor


Kept = dict[int | str, Any]
"""Layers by their numbers, and the head, that are laid out for all adapters."""


def can_lay_out(model: Any) -> bool:
    """Whether it is on a CPU that has products with packed weights, and all its layers are Llama's, without biases."""
    return (
        model.device.type == "cpu"
        and all(type(layer) is LlamaDecoderLayer for layer in model.model.layers)
        and all(type(layer.self_attn) is LlamaAttention and type(layer.mlp) is LlamaMLP for layer in model.model.layers)
        and not (model.config.attention_bias or model.config.mlp_bias)
        and can_pack(model.dtype)
    )


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's products, as its compiler uses them, for this type and processor."""
    weight = (torch.arange(64 * 32) % 7 - 3).to(dtype).view(64, 32)
    x = (torch.arange(3 * 32) % 5 - 2).to(dtype).view(3, 32)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return torch.equal(_product(packed, x), x @ weight.T)  # whole numbers: without rounding
    except (RuntimeError, AttributeError):
        return False


def lay_out(
    model: Any, replaced: Mapping[str, torch.Tensor] = MappingProxyType({}), kept: Kept | None = None
) -> Decoder:
    """The decoder of a model with the weights that it has now.

    replaced: the base model's of all its parameters that are others now; the layers' matrices among them are put back
    as soon as they are laid out, so that a model is not in memory twice. What holds none of them is kept in `kept`, or
    taken from there. Without any, nothing is kept but the head, and all layers are laid out for this time only: a base
    model is sampled now and then.
    """
    kept = {} if kept is None else kept
    tuned = {int(name.split(".")[2]) for name in replaced if name.startswith("model.layers.")}
    layers = []
    for number, module in enumerate(model.model.layers):
        layer = None if number in tuned else kept.get(number)
        layers.append(layer or _layer(module))
        if replaced and number not in tuned:
            kept[number] = layers[-1]
        for name, parameter in module.named_parameters(prefix=f"model.layers.{number}"):
            if name in replaced and parameter.dim() == 2:  # norms are read where they are
                parameter.data = replaced[name]
    if any(name.startswith(("lm_head.", "model.embed_tokens.")) for name in replaced):  # the two may be tied
        return Decoder(layers, _linear(model.lm_head))
    if "head" not in kept:
        kept["head"] = _linear(model.lm_head)
    return Decoder(layers, kept["head"])


def decode(decoder: Decoder, model: Any, hidden: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """What run_layers gives for one more token a row: (rows, width) -> the same. cache: advanced by the caller."""
    rows = len(hidden)
    cos, sin = model.model.rotary_emb(hidden[:, None], torch.full((1, 1), cache.length))
    for number, layer in enumerate(decoder.layers):
        attention = layer.module.self_attn
        heads = _product(layer.query_key_value, layer.module.input_layernorm(hidden))
        heads = heads.view(rows, -1, attention.head_dim)
        queries = layer.output.shape[1] // attention.head_dim
        keys = (heads.shape[1] - queries) // 2
        turned = heads[:, : queries + keys]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
        key, value = cache.update(turned[:, queries:, None], heads[:, queries + keys :, None], number)
        found, _ = grouped_query_attention(attention, turned[:, :queries, None], key, value, None, attention.scaling)
        hidden = hidden + _product(layer.output, found.reshape(rows, -1))
        gate, up = _product(layer.gate_up, layer.module.post_attention_layernorm(hidden)).chunk(2, dim=-1)
        hidden = hidden + _product(layer.down, layer.module.mlp.act_fn(gate) * up)
    return hidden


def head(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """Logits: (rows, width) -> (rows, vocabulary)."""
    return _product(decoder.head, hidden)


def _layer(module: Any) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    return Layer(
        module,
        _linear(attention.q_proj, attention.k_proj, attention.v_proj),
        _linear(attention.o_proj),
        _linear(mlp.gate_proj, mlp.up_proj),
        _linear(mlp.down_proj),
    )


def _linear(*modules: torch.nn.Linear) -> torch.Tensor:
    """The packed weight of several maps of one input."""
    weight = torch.cat([module.weight.detach() for module in modules])
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def _product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found
