"""In-run values against finite differences along a slow replay of the tuning, and what they must satisfy."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch

from crowd_fine_tuning_sim.in_run import gradients_of_shares, in_run_values, tune_in_run
from experiment.errors import InputError
from point_in_space_sim.engine.base_model import load_base_model
from point_in_space_sim.engine.fine_tuning import (
    _trainable,
    add_gradient,
    encode_comment,
    frozen_activations,
    padded_loss,
    plan_steps,
    tune,
)
from point_in_space_sim.engine.settings import PROMPT, SamplingSettings, TuningSettings
from point_in_space_sim.engine.variants import Engine
from tests.tiny_models import save_tiny_gpt2, save_tiny_llama

PEOPLE = [
    ["what a day", "no"],
    ["thank you so much for all the help"],
    ["the day is a wonderful day, thank you", "rain", "what a wonderful cat"],
]
TEXTS = [*chain(*PEOPLE)]
VALIDATION = ["what a wonderful day", "thank you, thank you"]
SETTINGS = TuningSettings(layers=2, rank=4, learning_rate=5e-3, epochs=2, batch_size=4)
ONE_STEP = replace(SETTINGS, epochs=1, batch_size=99)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_base_model(str(save_tiny_llama(tmp_path_factory.mktemp("llama"))), "cpu", torch.float32)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return load_base_model(str(save_tiny_gpt2(tmp_path_factory.mktemp("gpt2"))), "cpu", torch.float32)


@pytest.fixture(params=["llama", "gpt2"])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other take longer than models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def replayed_values(base, people, settings, seed):
    """(people,). AdamW written out, through the whole model; each person's gradient tried out on the validation."""
    texts = [*chain(*people)]
    owners = [number for number, own in enumerate(people) for _ in own]
    steps, init_seed = plan_steps(len(texts), settings, seed)
    values = np.zeros(len(people))
    with _trainable(base, settings, None, init_seed) as (parameters, _):
        nothing = m = v = [torch.zeros_like(parameter) for parameter in parameters]
        for t, step in enumerate(steps, 1):
            rate = settings.learning_rate * (1 - (t - 1) / len(steps))
            tokens = [len(encode_comment(base, text)) for text in texts]
            share = {}
            for i in step:
                loss = padded_loss(base, [texts[i]]) * tokens[i] / sum(tokens[j] for j in step)
                gradient = torch.autograd.grad(loss, parameters)
                share[owners[i]] = [a + b for a, b in zip(share.get(owners[i], nothing), gradient, strict=True)]
            whole = [sum(parts) for parts in zip(*share.values(), strict=True)]
            clip = min(1.0, 1.0 / float(torch.cat([part.flatten() for part in whole]).norm()))
            m = [0.9 * a + 0.1 * clip * g for a, g in zip(m, whole, strict=True)]
            v = [0.999 * a + 0.001 * (clip * g) ** 2 for a, g in zip(v, whole, strict=True)]
            below = [(a / (1 - 0.999**t)).sqrt() + 1e-8 for a in v]
            for person, gradient in share.items():
                values[person] -= slope_along(base, parameters, [-rate * g for g in gradient])
            move(parameters, [-rate * a / (1 - 0.9**t) / b for a, b in zip(m, below, strict=True)], 1.0)
    return values


@torch.no_grad()
def move(parameters, direction, by):
    for parameter, part in zip(parameters, direction, strict=True):
        parameter.add_(part, alpha=by)


@torch.no_grad()
def slope_along(base, parameters, direction):
    """Central finite difference of the validation loss."""
    kept = [parameter.clone() for parameter in parameters]
    h = min(0.1, 1e-3 / max(float(part.abs().max()) for part in direction))
    losses = []
    for by in (h, -h):
        move(parameters, direction, by)
        losses.append(float(padded_loss(base, VALIDATION)))
        for parameter, old in zip(parameters, kept, strict=True):
            parameter.copy_(old)
    return (losses[0] - losses[1]) / (2 * h)


@pytest.mark.parametrize("settings", [ONE_STEP, SETTINGS, replace(SETTINGS, method="full", learning_rate=1e-3)])
def test_values_are_finite_differences_along_the_run(base, settings):
    for people in [PEOPLE, [TEXTS]]:
        got = tune_in_run(base, people, VALIDATION, settings, seed=3).values
        values = replayed_values(base, people, settings, seed=3)
        assert got == pytest.approx(values, rel=0.01, abs=0.01 * np.abs(values).max())
        assert np.abs(values).min() > 0


def test_shares_gradients_add_up_to_the_steps(base):
    activations = frozen_activations(base, TEXTS, SETTINGS) if base.has_plain_layers else None
    with _trainable(base, SETTINGS, None, 0) as (parameters, _):
        shares = gradients_of_shares(base, PEOPLE, parameters, activations)
        assert all(parameter.grad is None for parameter in parameters)
        add_gradient(base, TEXTS, activations)
        assert max(float(parameter.grad.abs().max()) for parameter in parameters) > 1e-3
        for parameter, *parts in zip(parameters, *shares, strict=True):
            assert torch.allclose(parameter.grad, sum(parts), atol=1e-6)


def test_a_person_split_in_two_is_worth_as_much(llama):
    whole = tune_in_run(llama, PEOPLE, VALIDATION, ONE_STEP, seed=0).values
    split = tune_in_run(llama, [*PEOPLE[:2], PEOPLE[2][:1], PEOPLE[2][1:]], VALIDATION, ONE_STEP, seed=0).values
    assert [*split[:2], split[2] + split[3]] == pytest.approx([*whole], rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_comes_to_the_adapter_that_tuning_comes_to(base, method):
    settings = replace(SETTINGS, method=method, learning_rate=5e-3 if method == "lora" else 1e-3)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    adapter = tune_in_run(base, PEOPLE, VALIDATION, settings, seed=1).adapter
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    tuned = tune(base, TEXTS, settings, seed=1)
    assert adapter.weights.keys() == tuned.weights.keys() and adapter.lora_config == tuned.lora_config
    for name, weight in tuned.weights.items():
        if name.endswith("c_attn.bias"):
            continue  # a bias of all keys changes nothing: AdamW follows the rounding errors of its gradient
        assert torch.allclose(adapter.weights[name], weight, atol=1e-4), name


def test_the_same_texts_are_worth_the_same(llama):
    first, *others, again = tune_in_run(llama, [*PEOPLE, PEOPLE[0]], VALIDATION, ONE_STEP, seed=0).values
    assert first == pytest.approx(again, rel=1e-6) and not np.isclose(first, others, rtol=0.05).any()


def test_in_a_long_run_the_same_texts_are_worth_nearly_the_same(llama):
    people = [PEOPLE[0] * 4, PEOPLE[1] * 4, PEOPLE[0] * 4]
    settings = replace(SETTINGS, epochs=8, learning_rate=1e-3)
    first, other, again = tune_in_run(llama, people, VALIDATION, settings, seed=0).values
    assert first == pytest.approx(again, rel=0.25) and abs(first - other) > 2 * abs(first - again)


def test_who_holds_the_validation_texts_is_worth_most(llama):
    values = tune_in_run(llama, [*PEOPLE, VALIDATION], VALIDATION, replace(SETTINGS, epochs=4), seed=0).values
    assert values.argmax() == 3 and values.sum() > 0


def test_threads_of_one_worker_do_not_mix_their_tunings(llama):
    engine = Engine(str(llama.folder), PROMPT, "cpu", "float32", replace(SETTINGS, epochs=4), SamplingSettings(), 2)
    tasks = [(PEOPLE, VALIDATION, seed) for seed in range(4)]
    alone = [in_run_values(engine, task) for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(partial(in_run_values, engine), tasks))
    assert np.array_equal(alone, together) and np.abs(np.diff(alone, axis=0)).min() > 0


@pytest.mark.parametrize(
    ("people", "validation", "message"),
    [([], VALIDATION, "no people"), ([["no"], []], VALIDATION, "person 1 has no texts"), (PEOPLE, [], "no validation")],
)
def test_nothing_to_value(llama, people, validation, message):
    with pytest.raises(InputError, match=message):
        tune_in_run(llama, people, validation, SETTINGS, seed=0)
