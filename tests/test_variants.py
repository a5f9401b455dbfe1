"""The engine's own promises, on tiny models: several games in one call, nothing made twice, nothing left changed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from point_in_space_sim.engine.recipes import Averaged, Request, Tuned
from point_in_space_sim.engine.settings import PROMPT, SamplingSettings, TuningSettings
from point_in_space_sim.engine.variants import Engine, cached_base_model, fulfil
from point_in_space_sim.mapper import load_mapper
from tests.tiny_protocol_models import save_tiny_world

POOLS = ("so glad you came", "thank you for it", "what a day it is"), ("no rain at all", "a sad cat", "I fear the dog")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def mapper(world):
    return load_mapper(str(world / "roberta"))


@pytest.fixture
def engine(world, tmp_path):
    return Engine(
        base_model=str(world / "llama"),
        prompt=PROMPT,
        device="cpu",
        tuning=TuningSettings(layers=2, rank=2, epochs=2, batch_size=2),
        sampling=SamplingSettings(max_new_tokens=6),
        samples=3,
        scratch=tmp_path / "scratch",
        kept=tmp_path / "kept",
    )


def requests_of(number):
    """A game's requests: two variants of its pool, one tuned further from the other, and their average."""
    pool = POOLS[number]
    first = Tuned(pool[:2], None, number, pool)
    second = Tuned(pool[1:], first, number, pool)
    return [Request(second, (7, 8), (f"game-{number}",)), Request(Averaged((first, second)), (7,)), Request(None, (7,))]


def test_games_in_one_call_are_the_games_alone(engine, mapper, tmp_path):
    """The same texts and vectors, the same kept weights; and every model's cost is told once."""
    told = []
    together = fulfil(engine, mapper, requests_of(0) + requests_of(1), advance=told.append)
    # 2 texts x 2 epochs and 6 samples; 3 samples of the average; the base model is one for both.
    assert sorted(told) == sorted([4 + 6, 3, 4 + 6, 3, 3])
    alone = {}
    for number in (1, 0):
        own = replace(engine, scratch=tmp_path / f"scratch-{number}", kept=tmp_path / f"kept-{number}")
        alone |= fulfil(own, mapper, requests_of(number))
        weights = [(folder / f"game-{number}" / "adapter_model.safetensors") for folder in (engine.kept, own.kept)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert together.keys() == alone.keys() and len(together) == 7
    for key, sample in together.items():
        assert sample.texts == alone[key].texts and len(sample.texts) == 3
        np.testing.assert_array_equal(sample.vectors, alone[key].vectors)
        np.testing.assert_array_equal(sample.vectors, mapper(sample.texts))


def test_nothing_is_made_twice(engine, mapper):
    first = fulfil(engine, mapper, requests_of(0))
    made = {path: path.stat().st_mtime_ns for path in engine.scratch.rglob("*.safetensors")}
    assert len(made) == 3
    told = []
    again = fulfil(engine, mapper, requests_of(0), advance=told.append)
    assert told == [] and {key: sample.texts for key, sample in again.items()} == {
        key: sample.texts for key, sample in first.items()
    }
    # A further sample of a model that is there costs its sampling alone.
    fulfil(engine, mapper, [Request(requests_of(0)[0].model, (9,))], advance=told.append)
    assert told == [3]
    assert {path: path.stat().st_mtime_ns for path in engine.scratch.rglob("*.safetensors")} == made


def test_the_base_model_is_left_as_it_was(engine, mapper):
    base = cached_base_model(engine.base_model, "cpu", PROMPT)
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    fulfil(engine, mapper, requests_of(1))
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.named_parameters())
    assert not any(weight.requires_grad for weight in base.model.parameters())
