"""Weights laid out once as a CPU's products want them, which else rearrange them at every call.

With a few rows at a time, as in sampling, that takes as long as the products themselves.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch

from point_in_space_sim.engine.base_model import BaseModel

ROWS = 24  # that the layout is chosen for; it serves any number of them


@lru_cache
def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN's products on packed weights, which torch's own compiler uses, are here and right."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    weight = (torch.arange(96 * 64) % 7 - 3).to(dtype).view(96, 64)
    x = (torch.arange(3 * 64) % 5 - 2).to(dtype).view(1, 3, 64)
    try:
        return torch.equal(_product(_packed(weight), None, x), torch.nn.functional.linear(x, weight))
    except (RuntimeError, AttributeError):
        return False


@contextmanager
def packed(base: BaseModel, changed: Collection[str]) -> Iterator[None]:
    """Has the base model's linear maps compute with packed weights for a while.

    changed: parameters, by their names, that are not the base model's own now; all others stay packed for the next
    time.
    """
    linear = {name: module for name, module in base.model.named_modules() if type(module) is torch.nn.Linear}
    try:
        for name, module in linear.items():
            if f"{name}.weight" in changed:
                weight = _packed(module.weight)
            else:
                if name not in base.packed_weights:
                    base.packed_weights[name] = _packed(module.weight)
                weight = base.packed_weights[name]
            module.forward = partial(_product, weight, module.bias)  # type: ignore[method-assign]
        yield
    finally:
        for module in linear.values():
            module.__dict__.pop("forward", None)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return found


def _product(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found
