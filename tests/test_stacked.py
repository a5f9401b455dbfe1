"""Many models in one stack against the same models one by one."""

import numpy as np
import pytest
import torch

from point_in_space_sim.engine.base_model import load_base_model
from point_in_space_sim.engine.fine_tuning import (
    PACK_TOKENS,
    average_adapters,
    frozen_activations,
    merged,
    packed_loss,
    tune,
)
from point_in_space_sim.engine.sampling import sample_comments
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.engine.stacked import Task, sample_stacked, tune_stacked
from tests.tiny_models import WORDS, save_tiny_llama

TUNING = TuningSettings(layers=3, rank=4, epochs=2, batch_size=3, learning_rate=2e-3)
SAMPLING = SamplingSettings(temperature=1.0, top_p=0.9, max_new_tokens=12)


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module", params=["cpu", CUDA])
def base(folder, request):
    return load_base_model(folder, request.param, torch.float32)


def comments(number, seed, words=6):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, words + 1))) for _ in range(number)]


def config_of(adapter):
    return adapter.lora_config


def nearly_equal(one, other):
    configs = [(c.r, c.lora_alpha, set(c.target_modules), c.layers_to_transform) for c in map(config_of, (one, other))]
    assert configs[0] == configs[1] and one.weights.keys() == other.weights.keys()
    return all(torch.allclose(one.weights[name], other.weights[name], atol=2e-5) for name in one.weights)


@pytest.fixture(scope="module")
def tasks(base):
    """Models of different sizes: two fresh ones, one that goes on from another, one from an average, one comment."""
    pools = [comments(7, 1), comments(4, 2), comments(9, 3)]
    activations = [frozen_activations(base, pool, TUNING) for pool in pools]
    first = tune(base, pools[0][:3], TUNING, 5, None, activations[0])
    second = tune(base, pools[0][3:], TUNING, 6, None, activations[0])
    mean, _ = average_adapters([first, second], TUNING.rank)
    return [
        Task(pools[1], 11, None, activations[1]),
        Task(pools[0], 12, None, activations[0]),
        Task(pools[0][2:5], 13, first, activations[0]),
        Task(pools[2], 14, mean, activations[2]),
        Task(pools[2][:1], 15, None, activations[2]),
    ]


@pytest.mark.parametrize("pack_tokens", [PACK_TOKENS, 20])
def test_a_stack_is_tuned_as_its_models_alone(base, tasks, pack_tokens, monkeypatch):
    """Also with batches of several packs, which some models have and others do not, and a head read in parts."""
    monkeypatch.setattr("point_in_space_sim.engine.fine_tuning.PACK_TOKENS", pack_tokens)
    monkeypatch.setattr("point_in_space_sim.engine.stacked.HEAD_ROWS", pack_tokens)
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    alone = [tune(base, task.texts, TUNING, task.seed, task.start, task.activations) for task in tasks]
    stacked = tune_stacked(base, tasks, TUNING)
    assert all(map(nearly_equal, stacked, alone))
    start = tasks[2].start
    assert not nearly_equal(stacked[2], start)  # it has moved
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.named_parameters())


def test_a_stack_writes_what_its_models_write_alone(base, tasks):
    adapters = [*tune_stacked(base, tasks[:3], TUNING), None]
    draws = [(adapters[0], 1), (adapters[2], 1), (None, 7), (adapters[0], 2), (adapters[1], 3)]
    stacked = sample_stacked(base, draws, 6, TUNING, SAMPLING)
    alone = [sample_comments(base, 6, seed, SAMPLING, adapter) for adapter, seed in draws]
    assert stacked == alone
    assert len({tuple(samples.texts) for samples in stacked}) == len(draws)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_makes_what_the_cpu_makes(folder):
    """Activations, loss, adapter and comments, in float32; in bfloat16 the loss, roughly."""
    texts = comments(8, 4)
    found = []
    for device in ("cpu", "cuda"):
        base = load_base_model(folder, device, torch.float32)
        activations = frozen_activations(base, texts, TUNING)
        adapter = tune(base, texts, TUNING, 3, None, activations)
        with merged(base, adapter):
            loss = packed_loss(base, texts, activations)
        samples = sample_comments(base, 6, 5, SAMPLING, adapter)
        found.append((activations.comments[texts[0]].cpu(), adapter, loss, samples))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert nearly_equal(found[0][1], found[1][1])
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-4) and found[0][3] == found[1][3]
    base = load_base_model(folder, "cuda")
    assert base.dtype == torch.bfloat16
    with merged(base, found[0][1]):
        assert packed_loss(base, texts, frozen_activations(base, texts, TUNING)) == pytest.approx(found[0][2], abs=0.05)
