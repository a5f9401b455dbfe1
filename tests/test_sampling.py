"""Draws against the exact distribution, the decode loop against the model's own forward, and what a seed fixes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from experiment.errors import InputError
from point_in_space_sim.engine.base_model import DEFAULT_BASE_MODEL, load_base_model
from point_in_space_sim.engine.decoding import can_pack, decode, head, lay_out
from point_in_space_sim.engine.fine_tuning import Adapter, merged, tune
from point_in_space_sim.engine.layers import KeyValueCache
from point_in_space_sim.engine.sampling import (
    ATTEMPTS,
    UniformStreams,
    distinct_2,
    draw_tokens,
    sample_comments,
    sample_tokens,
)
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from tests.tiny_models import save_tiny_gpt2, save_tiny_llama

SETTINGS = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base_model(str(save_tiny_llama(tmp_path_factory.mktemp("llama"))), "cpu", torch.float32)


@pytest.fixture(scope="module")
def adapter(base):
    return tune(base, ["what a day", "thank you so much"], TuningSettings(layers=2, rank=4, epochs=3), seed=0)


def one_token_each(logits, settings):
    streams = UniformStreams([0], len(logits), ATTEMPTS + 1)
    return draw_tokens(logits, settings, streams, torch.arange(len(logits))).numpy()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9), (30.0, 0.2), (30.0, 0.01)]
)
def test_draws_follow_the_tempered_nucleus(temperature, top_p):
    """Chi-squared of 20,000 draws of 8 tokens against softmax, cut to the nucleus by a sort; also where most draws
    fall outside it."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.5, 0.3, -3.0, 1.7, -torch.inf])
    expected = torch.softmax(logits.double() / temperature, 0).numpy()
    order = np.argsort(-expected)
    outside = np.cumsum(expected[order]) - expected[order] >= top_p
    expected[order[outside]] = 0
    expected /= expected.sum()
    count = 20_000
    settings = SamplingSettings(temperature=temperature, top_p=top_p)
    drawn = np.bincount(one_token_each(logits.expand(count, -1), settings), minlength=8)
    assert drawn[expected == 0].sum() == 0
    possible = expected > 0
    chi_squared = ((drawn - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    assert chi_squared < 30  # seven degrees of freedom: exceeded once in 10,000


def test_a_uniform_number_at_either_end_draws_a_possible_token():
    streams = UniformStreams([0], 2, 1)
    streams.numbers[:, 0] = torch.tensor([0.0, np.nextafter(1.0, 0.0)])
    logits = torch.full((2, 5000), -torch.inf)
    logits[:, [1000, 1001]] = 0.0
    assert draw_tokens(logits, SETTINGS, streams, torch.arange(2)).tolist() == [1000, 1001]


def test_decode_loop_equals_the_model_on_the_whole_prefix(base):
    """Every token again, from the logits that the model's own forward gives for prompt and comment so far."""
    count, ends = 6, {*base.end_tokens, *range(200, 240)}  # so many that rows end at different times
    with torch.inference_mode():
        comments = sample_tokens(base, count, [3], SETTINGS, ends)
        again = []
        streams = UniformStreams([3], count, SETTINGS.max_new_tokens)
        for comment in range(count):
            tokens = []
            while len(tokens) < SETTINGS.max_new_tokens and not (tokens and tokens[-1] in ends):
                logits = base.model(torch.tensor([[*base.prompt, *tokens]])).logits[:, -1]
                tokens += draw_tokens(logits, SETTINGS, streams, torch.tensor([comment])).tolist()
            again.append(tokens)
    assert comments == again
    assert len({len(tokens) for tokens in comments}) > 1  # some rows left the batch early


def test_a_comment_does_not_depend_on_the_others_in_the_batch(base, adapter):
    many = sample_comments(base, 8, 5, SETTINGS, adapter).texts
    assert sample_comments(base, 3, 5, SETTINGS, adapter).texts == many[:3]


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.skipif(not can_pack(dtype), reason="no packed products"))
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_the_laid_out_decoder_gives_the_models_own_hidden_states(base, adapter, dtype):
    """Of the base model, of an adapter after it, of another one after that: none is taken for another's."""
    own = replace(base, model=copy.deepcopy(base.model).to(dtype))
    twice = Adapter({name: 2 * weight for name, weight in adapter.weights.items()}, adapter.lora_config)
    ids = torch.tensor([own.prompt, own.prompt[::-1]])
    last = []
    with torch.inference_mode():
        for each in (None, adapter, twice, None):
            with merged(own, each) as replaced:
                expected = own.model.model(ids).last_hidden_state[:, -1]
                decoder, cache = lay_out(own.model, replaced, own.laid_out), KeyValueCache()
                for name, weight in replaced.items():
                    assert torch.equal(own.model.get_parameter(name), weight)  # not in memory twice
                for step in ids.T:
                    hidden = decode(decoder, own.model, own.model.model.embed_tokens(step), cache)
                    cache.length += 1
                hidden = own.model.model.norm(hidden)
                close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
                assert_close(hidden, expected, **close)
                assert_close(head(decoder, hidden), own.model.lm_head(hidden), **close)
            last.append(hidden)
    assert own.laid_out.keys() == {0, 1, "head"}  # two of four layers are tuned
    assert torch.equal(last[0], last[3]) and not torch.allclose(last[1], last[2], atol=0.1)


@pytest.mark.skipif(not can_pack(torch.float32), reason="no packed products")
def test_a_fully_tuned_model_is_sampled_as_it_is(base, monkeypatch):
    """Through the decoder and without it; also where an adapter's whole weights change the head."""
    tuned = tune(base, ["what a day", "no"], TuningSettings(method="full", layers=2, learning_rate=1e-2), seed=0)
    head = base.model.lm_head.weight.detach()
    other = Adapter({**tuned.weights, "lm_head.weight": head.flip(0)}, None)
    fast = [sample_comments(base, 6, 1, SETTINGS, each).texts for each in (None, tuned, other, None)]
    monkeypatch.setattr("point_in_space_sim.engine.base_model.can_lay_out", lambda model: False)
    plain = replace(base)  # knows nothing of the first
    assert fast == [sample_comments(plain, 6, 1, SETTINGS, each).texts for each in (None, tuned, other, None)]
    assert base.can_be_laid_out and not plain.can_be_laid_out and fast[0] != fast[1] != fast[2]


def test_seed_decides_the_texts(base, adapter):
    first, again, other = (sample_comments(base, 8, seed, SETTINGS, adapter) for seed in (1, 1, 2))
    assert first == again and first.texts != other.texts
    assert first.texts != sample_comments(base, 8, 1, SETTINGS).texts
    assert all("\n" not in text and text == text.strip() for text in first.texts)


def test_merged_sampling_equals_unmerged_logits(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from point_in_space_sim.engine.fine_tuning import save_adapter

    ids = torch.tensor([base.prompt])
    with merged(base, adapter), torch.no_grad():
        together = base.model(ids).logits
    folder = base.folder / "adapter"
    save_adapter(adapter, folder, base)
    attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), str(folder))
    with torch.no_grad():
        assert torch.allclose(attached(ids).logits, together, atol=1e-4)


def test_broken_comments_are_counted(base, monkeypatch):
    word, end = base.tokenizer("day")["input_ids"], base.tokenizer.eos_token_id
    space = base.tokenizer(" \n")["input_ids"]
    drawn = [[*word, end], [end], [*word, *word], [*space, end], [*space, *word, *space, *word, end]]
    monkeypatch.setattr("point_in_space_sim.engine.sampling.sample_tokens", lambda *_: drawn)
    samples = sample_comments(base, 5, 0, SETTINGS)
    assert samples.texts == ["day", "", "dayday", "", "day day"]
    assert samples.broken == 3 / 5


def test_other_architectures_sample_through_generate(tmp_path):
    gpt2 = load_base_model(str(save_tiny_gpt2(tmp_path)), "cpu", torch.float32)
    first, again, other = (sample_comments(gpt2, 4, seed, SETTINGS) for seed in (1, 1, 2))
    assert first == again and first.texts != other.texts


def test_distinct_2():
    assert distinct_2(["a b c", "a b"]) == pytest.approx(2 / 3)
    assert distinct_2(["so so so"]) == pytest.approx(1 / 2)
    assert distinct_2(["", "one"]) == 0


def test_bad_settings(base):
    for bad in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(InputError):
            sample_comments(base, 2, 0, replace(SETTINGS, **bad))
    with pytest.raises(InputError):
        sample_comments(base, 0, 0, SETTINGS)


def test_smollm2_writes_english():
    base = load_base_model(DEFAULT_BASE_MODEL, "cpu")
    samples = sample_comments(base, 4, 0, SamplingSettings(temperature=0.7, max_new_tokens=16))
    words = " ".join(samples.texts).lower().split()
    assert len(words) > 20 and {"the", "a", "i", "to", "and", "of"} & set(words)
