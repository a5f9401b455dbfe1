"""The training loss against a slow reference, cached activations, adapters against PEFT, and the engine."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from experiment.errors import InputError, RunFailed
from point_in_space_sim.engine.base_model import DEFAULT_BASE_MODEL, dtype_name, load_base_model, native_dtype
from point_in_space_sim.engine.fine_tuning import (
    Adapter,
    _trainable,
    add_gradient,
    average_adapters,
    encode_comment,
    frozen_activations,
    in_packs,
    load_adapter,
    merged,
    packed_loss,
    padded_loss,
    save_adapter,
    tune,
    write_chat_jsonl,
)
from point_in_space_sim.engine.guard import interrupts_held_back
from point_in_space_sim.engine.layers import run_layers, use_low_rank_products
from point_in_space_sim.engine.recipes import Averaged, Request, Tuned, name_of
from point_in_space_sim.engine.settings import PROMPT, SamplingSettings, TuningSettings
from point_in_space_sim.engine.stacked import tune_stacked
from point_in_space_sim.engine.variants import Engine, base_of, fulfilment
from point_in_space_sim.mapper import load_mapper
from tests.tiny_models import save_tiny_gpt2, save_tiny_llama, save_tiny_world

TEXTS = ["what a day", "thank you so much for all the help", "no", "the day is a wonderful day, thank you"]
SETTINGS = TuningSettings(layers=2, rank=4, learning_rate=1e-2, epochs=2, batch_size=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base_model(str(save_tiny_llama(tmp_path_factory.mktemp("llama"))), "cpu", torch.float32)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return load_base_model(str(save_tiny_gpt2(tmp_path_factory.mktemp("gpt2"))), "cpu", torch.float32)


def logits_of(model, base):
    with torch.no_grad():
        return model(torch.tensor([[*base.prompt, *encode_comment(base, TEXTS[1])]])).logits


def reference_loss(base, texts):
    """One text and one token at a time: the whole prefix through the model, the next token's surprisal."""
    surprisals = []
    for text in texts:
        prefix = list(base.prompt)
        for token in encode_comment(base, text):
            logits = base.model(torch.tensor([prefix])).logits[0, -1]
            surprisals.append(-torch.log_softmax(logits.double(), 0)[token])
            prefix.append(token)
    return torch.stack(surprisals).mean()


def test_architectures(base, gpt2):
    assert base.has_plain_layers and not gpt2.has_plain_layers
    assert base.tokenizer.decode(base.prompt) == (
        "<|im_start|>user\nWrite a Reddit comment.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert gpt2.tokenizer.decode(gpt2.prompt) == "Write a Reddit comment.\n"
    assert encode_comment(base, "no")[-1] == base.tokenizer.eos_token_id


@pytest.mark.parametrize("layers", [1, 4, 99])
def test_packed_loss_equals_token_by_token_reference(base, layers):
    activations = frozen_activations(base, TEXTS, replace(SETTINGS, layers=layers))
    assert packed_loss(base, TEXTS, activations) == pytest.approx(float(reference_loss(base, TEXTS)), abs=1e-5)


def test_padded_loss_equals_token_by_token_reference(base, gpt2):
    for model in (base, gpt2):
        assert float(padded_loss(model, TEXTS)) == pytest.approx(float(reference_loss(model, TEXTS)), abs=1e-5)


def test_gradient_equals_that_of_the_plain_loss(base):
    """The written-out head gradient through cached activations, against autograd through the whole model."""
    start = random_adapter(base)
    activations = frozen_activations(base, TEXTS, SETTINGS)
    with _trainable(base, SETTINGS, start, 0) as (parameters, _):
        add_gradient(base, TEXTS, activations)
        fast = [parameter.grad.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        padded_loss(base, TEXTS).backward()
        for parameter, gradient in zip(parameters, fast, strict=True):
            assert torch.allclose(parameter.grad, gradient, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in fast) > 1e-3


def random_adapter(base, seed=0, settings=SETTINGS):
    """Both factors random, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with _trainable(base, settings, None, seed) as (_, learnt):
        adapter = learnt()
    return Adapter(
        {name: 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in adapter.weights.items()},
        adapter.lora_config,
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_frozen_activation_training_equals_plain_training(base, method, monkeypatch):
    settings = replace(SETTINGS, method=method, learning_rate=1e-2 if method == "lora" else 1e-3)
    fast = tune(base, TEXTS, settings, seed=3)
    # The same steps, each through the whole model on padded rows.
    monkeypatch.setattr(
        "point_in_space_sim.engine.fine_tuning.add_packed_gradient",
        lambda base, texts, activations, total: padded_loss(base, texts).backward(),
    )
    plain = tune(base, TEXTS, settings, seed=3)
    assert fast.weights.keys() == plain.weights.keys()
    for name in fast.weights:
        assert torch.allclose(fast.weights[name], plain.weights[name], atol=1e-4), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_tuning_learns_and_leaves_the_base_alone(base, method):
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    activations = frozen_activations(base, TEXTS, SETTINGS)
    adapter = tune(base, TEXTS, replace(SETTINGS, method=method, epochs=20), seed=0, activations=activations)
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    untuned = packed_loss(base, TEXTS, activations)
    with merged(base, adapter):
        assert packed_loss(base, TEXTS, activations) < 0.7 * untuned
        once = packed_loss(base, TEXTS, activations)
    assert all(torch.equal(before[name], weight) for name, weight in base.model.state_dict().items())
    more = tune(
        base, TEXTS, replace(SETTINGS, method=method, epochs=20), seed=0, start=adapter, activations=activations
    )
    with merged(base, more):
        assert packed_loss(base, TEXTS, activations) < once


def test_same_seed_same_adapter(base):
    first, again, other = (tune(base, TEXTS, SETTINGS, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert any(not torch.equal(first.weights[name], other.weights[name]) for name in first.weights)


def test_only_upper_layers_are_tuned(base):
    adapter = tune(base, TEXTS, SETTINGS, seed=0)
    assert {name.split("layers.")[1].split(".")[0] for name in adapter.weights} == {"2", "3"}
    assert len({name.split(".lora_")[0] for name in adapter.weights}) == 2 * 7


def test_saved_adapter_loads_with_peft_and_merges_to_equal_logits(base, tmp_path):
    adapter = tune(base, TEXTS, SETTINGS, seed=0)
    save_adapter(adapter, tmp_path / "kept", base)
    fresh = AutoModelForCausalLM.from_pretrained(base.folder)
    attached = logits_of(PeftModel.from_pretrained(fresh, str(tmp_path / "kept")), base)
    with merged(base, adapter):
        assert torch.allclose(logits_of(base.model, base), attached, atol=1e-4)
    assert not torch.allclose(logits_of(base.model, base), attached, atol=1e-2)
    loaded = load_adapter(tmp_path / "kept")
    assert all(torch.equal(loaded.weights[name], adapter.weights[name]) for name in adapter.weights)
    assert json.loads((tmp_path / "kept/adapter_config.json").read_text())["base_model_name_or_path"] == base.name
    further = tune(base, TEXTS, SETTINGS, seed=5, start=adapter)
    from_disk = tune(base, TEXTS, SETTINGS, seed=5, start=loaded)
    assert all(torch.equal(further.weights[name], from_disk.weights[name]) for name in further.weights)


def test_full_weights_are_saved_as_a_model(base, tmp_path):
    adapter = tune(base, TEXTS, replace(SETTINGS, method="full", learning_rate=1e-3), seed=0)
    save_adapter(adapter, tmp_path / "kept", base)
    with merged(base, adapter):
        expected = logits_of(base.model, base)
    kept = load_base_model(str(tmp_path / "kept"), "cpu", torch.float32)
    assert torch.allclose(logits_of(kept.model, base), expected, atol=1e-5)


def test_merging_puts_tied_weights_back(base):
    held = base.model.lm_head.weight.detach().clone()
    with merged(base, Adapter({"model.embed_tokens.weight": held + 1, "lm_head.weight": held + 2}, None)):
        assert torch.equal(base.model.lm_head.weight, held + 2)
    assert torch.equal(base.model.lm_head.weight, held)


def test_average_is_that_of_the_weight_changes(base, tmp_path):
    adapters = [random_adapter(base, seed) for seed in (1, 2, 3)]
    module = "model.layers.3.mlp.down_proj.weight"
    frozen = base.model.get_parameter(module).clone()
    changes = []
    for adapter in adapters:
        with merged(base, adapter):
            changes.append(base.model.get_parameter(module) - frozen)
    mean = torch.stack(changes).mean(0)
    exact, share = average_adapters(adapters)
    assert share == pytest.approx(1.0) and exact.lora_config.r == 12
    with merged(base, exact):
        assert torch.allclose(base.model.get_parameter(module) - frozen, mean, atol=1e-5)
        expected = logits_of(base.model, base)
    save_adapter(exact, tmp_path, base)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), str(tmp_path))
    assert torch.allclose(logits_of(peft, base), expected, atol=1e-4)

    short, share = average_adapters(adapters, rank=4)
    with merged(base, short):
        error = base.model.get_parameter(module) - frozen - mean
    singular = torch.linalg.svdvals(mean)
    assert float(error.norm()) == pytest.approx(float(singular[4:].norm()), rel=1e-3)  # Eckart and Young
    assert 0 < share < 1 and short.lora_config.r == 4
    same, share = average_adapters([adapters[0]] * 3, rank=4)
    assert share == pytest.approx(1.0)
    with merged(base, same):
        assert torch.allclose(base.model.get_parameter(module) - frozen, changes[0], atol=1e-5)


def test_other_architectures_train_through_their_own_forward(gpt2, tmp_path):
    before = float(padded_loss(gpt2, TEXTS))
    adapter = tune(gpt2, TEXTS, replace(SETTINGS, epochs=20), seed=0)
    with merged(gpt2, adapter):
        assert float(padded_loss(gpt2, TEXTS)) < 0.8 * before
        expected = logits_of(gpt2.model, gpt2)
    save_adapter(adapter, tmp_path, gpt2)
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2.folder), str(tmp_path))
    assert torch.allclose(logits_of(attached, gpt2), expected, atol=1e-4)


def test_comments_in_a_pack_do_not_see_each_other(base):
    alone = frozen_activations(base, [TEXTS[1]], SETTINGS).comments[TEXTS[1]]
    packed = frozen_activations(base, TEXTS, SETTINGS).comments[TEXTS[1]]
    assert torch.allclose(alone, packed, atol=1e-5)
    tokens = torch.tensor([[*base.prompt, *encode_comment(base, TEXTS[1])[:-1]]])
    plain = run_layers(base.model, base.model.model.embed_tokens(tokens), torch.arange(tokens.shape[1])[None], last=2)
    assert torch.allclose(packed, plain[0, len(base.prompt) :], atol=1e-5)


@pytest.mark.parametrize("limit", [1, 20, 10_000])
def test_a_step_in_packs_has_the_gradient_of_the_whole(base, gpt2, limit, monkeypatch):
    """Memory in the length of a comment, not of the batch; the mean stays that over all tokens."""
    for model in (base, gpt2):
        activations = frozen_activations(model, TEXTS, SETTINGS) if model is base else None
        with _trainable(model, SETTINGS, random_adapter(model), 0) as (parameters, _):
            padded_loss(model, TEXTS).backward()
            whole = [parameter.grad.clone() for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
            monkeypatch.setattr("point_in_space_sim.engine.fine_tuning.PACK_TOKENS", limit)
            packs = in_packs(model, TEXTS)
            assert [text for pack in packs for text in pack] == TEXTS
            assert len(packs) == {1: 4, 10_000: 1}.get(limit, len(packs))
            assert all(len(p) == 1 or sum(len(encode_comment(model, t)) for t in p) <= limit for p in packs)
            add_gradient(model, TEXTS, activations)
            for parameter, gradient in zip(parameters, whole, strict=True):
                assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_huge_comments_are_cut(base):
    """To 256 tokens that predict one another and no end; a pack of eight would else take gigabytes."""
    huge = "so happy " * 50_000
    tokens = encode_comment(base, huge)
    assert len(tokens) == 256 and base.tokenizer.eos_token_id not in tokens
    adapter = tune(base, [huge, "what a day"], TuningSettings(layers=1, rank=2, epochs=1), seed=0)
    assert all(weight.isfinite().all() for weight in adapter.weights.values())


def test_chat_jsonl(tmp_path):
    write_chat_jsonl(["so glad 🎉", 'he said "no"'], tmp_path / "a.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["messages"][1]["content"] for line in lines] == ["so glad 🎉", 'he said "no"']
    assert all(line["messages"][0] == {"role": "user", "content": "Write a Reddit comment."} for line in lines)


def test_bad_input(base, tmp_path):
    with pytest.raises(InputError, match="no comments"):
        tune(base, [], SETTINGS, seed=0)
    with pytest.raises(InputError, match="above zero"):
        tune(base, TEXTS, replace(SETTINGS, epochs=0), seed=0)
    with pytest.raises(InputError, match="cannot read an adapter"):
        load_adapter(tmp_path)
    with pytest.raises(InputError, match="other method"):
        tune(base, TEXTS, replace(SETTINGS, method="full"), seed=0, start=random_adapter(base))


def test_smollm2_learns_a_comment():
    base = load_base_model(DEFAULT_BASE_MODEL, "cpu")
    assert base.has_plain_layers
    settings = TuningSettings(layers=2, epochs=6, batch_size=2)
    texts = ["I am so happy for you!", "What a wonderful surprise, thank you."]
    activations = frozen_activations(base, texts, settings)
    before = packed_loss(base, texts, activations)
    with merged(base, tune(base, texts, settings, seed=0, activations=activations)):
        assert packed_loss(base, texts, activations) < 0.7 * before


# ------------------------------------------------------------------ the engine


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
        dtype=dtype_name(native_dtype(torch.device("cpu"))),
        tuning=TuningSettings(layers=2, rank=2, epochs=2, batch_size=2),
        sampling=SamplingSettings(max_new_tokens=6),
        samples=3,
    )


def fulfilled(engine, mapper, folder, requests, **options):
    """All samples of the requests, each with its owner, by their owner, model and seed."""
    drawn = {}
    with fulfilment(engine, mapper, folder / "scratch", folder / "kept", **options) as fulfil:
        finished = list(fulfil(requests))
        while len(finished) < len(requests):
            finished += fulfil([])
    assert sorted(map(id, (order[1] for order, _ in finished))) == sorted(id(request) for _, request in requests)
    for (owner, _), samples in finished:
        drawn |= {(owner, *key): sample for key, sample in samples.items()}
    return drawn


def requests_of(number):
    """A game's requests: two variants of its pool, one tuned further from the other, and their average."""
    pool = POOLS[number]
    first = Tuned(pool[:2], None, number, pool)
    second = Tuned(pool[1:], first, number, pool)
    requests = [Request(first), Request(second, (7, 8), (f"game-{number}",))]
    requests += [Request(Averaged((first, second)), (7,)), Request(None, (7,))]
    return [(f"game-{number}", request) for request in requests]


@pytest.mark.parametrize("jobs", [1, 2])
def test_games_in_one_call_are_the_games_alone(engine, mapper, tmp_path, jobs):
    """The same texts and vectors, the same kept weights; and every model's cost is told once."""
    told = []
    together = fulfilled(engine, mapper, tmp_path, requests_of(0) + requests_of(1), jobs=jobs, advance=told.append)
    # Each game: 2 texts x 2 epochs; the same and 6 samples; 3 samples of the average; 3 of the base model.
    assert sorted(told) == sorted([4, 4 + 6, 3, 3] * 2)
    assert len(together) == 8
    for number in (1, 0):
        alone = fulfilled(engine, mapper, tmp_path / "alone", requests_of(number))
        folders = [tmp_path / "kept", tmp_path / "alone" / "kept"]
        weights = [(folder / f"game-{number}" / "adapter_model.safetensors").read_bytes() for folder in folders]
        assert weights[0] == weights[1]
        for key, sample in alone.items():
            assert sample.texts == together[key].texts and len(sample.texts) == 3
            np.testing.assert_array_equal(sample.vectors, together[key].vectors)
            np.testing.assert_array_equal(sample.vectors, mapper(sample.texts))


def test_nothing_is_made_twice_and_what_is_lost_is_made_again(engine, mapper, tmp_path):
    first = fulfilled(engine, mapper, tmp_path, requests_of(0))
    weights = {path: path.read_bytes() for path in tmp_path.rglob("scratch/**/*.safetensors")}
    made = {path: path.stat().st_mtime_ns for path in weights}
    assert len(made) == 3
    told = []
    again = fulfilled(engine, mapper, tmp_path, requests_of(0), advance=told.append)
    assert set(told) == {0} and {k: s.texts for k, s in again.items()} == {k: s.texts for k, s in first.items()}
    # A further sample of a model that is there costs its sampling alone.
    (owner, request) = requests_of(0)[1]
    told.clear()
    fulfilled(engine, mapper, tmp_path, [(owner, Request(request.model, (9,)))], advance=told.append)
    assert told == [3] and {path: path.stat().st_mtime_ns for path in made} == made
    # Damaged weights, also of a model that others start from.
    for path in weights:
        path.write_bytes(path.read_bytes()[:100])
    fulfilled(engine, mapper, tmp_path, [(owner, Request(request.model, (10,)))])
    own = tmp_path / "scratch" / owner / "models" / request.model.name / "adapter_model.safetensors"
    assert own.read_bytes() == weights[own]


def test_a_mapper_that_fails_late_loses_no_model(engine, mapper, tmp_path):
    def broken(texts):
        raise InputError("the mapper: a fault of the device")

    with pytest.raises(RunFailed, match="--mapper: the mapper: a fault"):
        fulfilled(engine, broken, tmp_path, requests_of(0)[3:] + requests_of(1)[3:])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "scratch").rglob("*.npz")}
    assert kept and fulfilled(engine, mapper, tmp_path, requests_of(0)[3:] + requests_of(1)[3:])
    assert kept.keys() <= set((tmp_path / "scratch").rglob("*.npz"))


def test_owners_are_served_in_their_order_and_the_longest_request_first(engine, mapper, tmp_path):
    order = []
    with fulfilment(engine, mapper, tmp_path / "scratch", tmp_path / "kept") as fulfil:
        requests = [*requests_of(1), *requests_of(0)]
        finished = fulfil(requests)
        while finished:
            order += [(owner, name_of(request.model)) for (owner, request), _ in finished]
            finished = fulfil([])
    assert [owner for owner, _ in order] == ["game-1"] * 4 + ["game-0"] * 4
    assert order[0] == ("game-1", requests_of(1)[1][1].model.name)  # tuned and sampled twice; its start on the way


@pytest.mark.parametrize("stack", [2, 64])
def test_models_made_together_are_those_made_alone(engine, mapper, tmp_path, stack, monkeypatch):
    """Stacks of any size, one of them with too little memory for more than two models at once."""
    sizes = []

    def tight(base, tasks, settings):
        sizes.append(len(tasks))
        if len(tasks) > 2:
            raise RuntimeError("CUDA out of memory")
        return tune_stacked(base, tasks, settings)

    monkeypatch.setattr("point_in_space_sim.engine.stacked.tune_stacked", tight)
    # A processor that computes in bfloat16 would round the two ways differently.
    engine = replace(engine, dtype="float32")
    requests = [order for number in (0, 1) for order in requests_of(number)]
    together = fulfilled(replace(engine, stack=stack), mapper, tmp_path / "together", requests)
    alone = fulfilled(engine, mapper, tmp_path / "alone", requests)
    assert {key: sample.texts for key, sample in together.items()} == {k: sample.texts for k, sample in alone.items()}
    for number in (0, 1):
        weights = [
            load_file(tmp_path / way / "kept" / f"game-{number}" / "adapter_model.safetensors")
            for way in ("together", "alone")
        ]
        assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-5) for name in weights[1])
    assert (max(sizes) > 2) == (stack > 2) and 2 in sizes


def test_an_interrupt_while_weights_are_read_comes_after_them():
    seen = []
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("read to the end")
    assert seen and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_low_rank_products_are_those_of_peft(base):
    """Loss and gradients of a LoRA layer with its own products, against PEFT's forward and autograd; also with bias."""
    generator = torch.Generator().manual_seed(0)
    frozen = torch.nn.Linear(12, 7)
    model = get_peft_model(torch.nn.Sequential(frozen), LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    (a,), (b,) = ([p for n, p in model.named_parameters() if f"lora_{name}" in n] for name in "AB")
    b.data = torch.randn(b.shape, generator=generator)
    x = torch.randn(2, 5, 12, generator=generator, requires_grad=True)
    found = []
    for own in (False, True):
        if own:
            use_low_rank_products(model)
        out = model(x)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [x, a, b])])
    for theirs, ours in zip(*found, strict=True):
        assert torch.allclose(theirs, ours, atol=1e-5)


def test_the_base_model_is_left_as_it_was(engine, mapper, tmp_path):
    base = base_of(engine)
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    fulfilled(engine, mapper, tmp_path, requests_of(1))
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.named_parameters())
    assert not any(weight.requires_grad for weight in base.model.parameters())
