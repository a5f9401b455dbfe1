"""Models by recipe: which texts, from which model, which seed. Equal recipes are one model, which is made once.

Nothing here imports torch: who decides which models are wanted need not load what makes them (variants.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiment.run_folder import hash_of

Texts = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Tuned:
    """The model that results from tuning `start` on the texts.

    pool: texts, these among them, that go through the frozen layers together, once for all models of one pool. Which
    texts share a pass decides last bits, so the pool is part of the recipe; by default it is the texts alone.
    """

    texts: Texts
    start: "Model"
    seed: int
    pool: Texts = ()

    @cached_property
    def name(self) -> str:
        return hash_of(["tuned", self.texts, name_of(self.start), self.seed, self.pool])


@dataclass(frozen=True, eq=False)
class Averaged:
    """The model whose adapter is the mean of the models' adapters."""

    models: tuple[Tuned, ...]

    @cached_property
    def name(self) -> str:
        return hash_of(["averaged", [model.name for model in self.models]])


Model = Tuned | Averaged | None
"""A model by its recipe; None is the base model."""


def name_of(model: Model) -> str:
    """Equal for equal recipes."""
    return "base" if model is None else model.name


@dataclass(frozen=True)
class Request:
    """A model that is to be made, the seeds of the samples to draw from it, and under which names to keep it.

    discard: only its samples are wanted, its weights are not stored.
    """

    model: Model
    samples: tuple[int, ...] = ()
    keep_as: tuple[str, ...] = ()
    discard: bool = False


@dataclass(frozen=True)
class Sampled:
    """Comments sampled from a model: texts, vectors (n, 28), and the share of broken ones."""

    texts: Texts
    vectors: np.ndarray
    broken: float


Drawn = Mapping[tuple[str, int], Sampled]
"""Samples by their model's name and their seed."""


Order = tuple[str, Request]
"""A request and whose it is, by name: an owner's models are shared among its own requests."""
Finished = tuple[Order, Drawn]


def merge_requests(requests: Sequence[Request]) -> list[Request]:
    """One request a model, in order of first mention."""
    merged: dict[str, Request] = {}
    for request in requests:
        known = merged.get(name_of(request.model), Request(request.model, discard=True))
        merged[name_of(request.model)] = Request(
            request.model,
            tuple(dict.fromkeys(known.samples + request.samples)),
            tuple(dict.fromkeys(known.keep_as + request.keep_as)),
            known.discard and request.discard,
        )
    return list(merged.values())
