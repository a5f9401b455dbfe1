"""Base models and mappers of other people's making: which are taken, on which path, and which are refused how."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from experiment.errors import InputError
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.assets import cache_folder, model_folder
from point_in_space_sim.engine.base_model import load_base_model
from point_in_space_sim.engine.decoding import can_pack
from point_in_space_sim.engine.fine_tuning import encode_comment, tune
from point_in_space_sim.engine.guard import one_line
from point_in_space_sim.engine.rehearsal import rehearse
from point_in_space_sim.engine.sampling import sample_comments
from point_in_space_sim.engine.settings import SamplingSettings, TuningSettings
from point_in_space_sim.engine.variants import Engine, stacking
from point_in_space_sim.mapper import load_mapper
from tests.tiny_models import (
    CHAT_TEMPLATE,
    save_tiny_gpt2,
    save_tiny_llama,
    save_tiny_mapper,
    save_tiny_model,
    save_tokenizer,
)

TEXTS = ["what a day", "thank you so much for the help"]
TUNING, SAMPLING = TuningSettings(layers=1, rank=2), SamplingSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def mapper(tmp_path_factory):
    return load_mapper(str(save_tiny_mapper(tmp_path_factory.mktemp("mapper"))))


def load(folder, dtype=torch.float32, **options):
    return load_base_model(str(folder), "cpu", dtype, **options)


def refused(action, *parts):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


PLAIN = (
    "llama qwen2 qwen3 gemma phi3 olmo2 smollm3 granite starcoder2 stablelm glm helium nemotron arcee apertus".split()
)
# Scaled embeddings or scores, windows, other names, or no attention at all.
OTHER = "gemma2 gemma3_text olmo3 cohere cohere2 phi gpt_neox bloom opt persimmon biogpt lfm2 gpt_oss".split()


def test_comments_longer_than_a_sample_are_counted(mapper, tmp_path):
    base = load(save_tiny_model(tmp_path, "llama"))
    lengths = [len(base.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in TEXTS]  # and the end
    assert min(lengths) < max(lengths)
    for limit in (min(lengths) - 1, min(lengths), max(lengths)):
        longer = rehearse(base, mapper, TEXTS, TUNING, SamplingSettings(max_new_tokens=limit))
        assert longer == sum(length > limit for length in lengths)


@pytest.mark.parametrize("architecture", [*PLAIN, *OTHER])
def test_architectures_are_taken_on_the_right_path(architecture, mapper, tmp_path):
    own = {"ffn_dim": 48, "word_embed_proj_dim": 32} if architecture == "opt" else {}
    folder = save_tiny_model(tmp_path, architecture, **own)
    base = load(folder, torch.bfloat16)
    assert base.has_plain_layers == load(folder).has_plain_layers == (architecture in PLAIN)
    assert load(folder).can_be_laid_out == (architecture == "llama" and can_pack(torch.float32))
    before = torch.random.get_rng_state()
    rehearse(base, mapper, TEXTS, TUNING, SAMPLING)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


def test_biases_are_no_part_of_the_laid_out_decoder(tmp_path):
    for name in ("attention_bias", "mlp_bias"):
        base = load(save_tiny_model(tmp_path / name, "llama", **{name: True}))
        assert base.has_plain_layers and not base.can_be_laid_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sliding_window_within_a_comment_is_no_fast_path(tmp_path, dtype):
    prompt = len(load(save_tiny_llama(tmp_path / "llama")).prompt)
    for window, plain in ((prompt + 1, False), (prompt + 250, False), (prompt + 257, True)):
        folder = save_tiny_model(tmp_path / str(window), "mistral", sliding_window=window)
        assert load(folder, dtype).has_plain_layers == plain, window
    base = load(folder, dtype)
    assert base.is_plain_for(256) and not base.is_plain_for(300)  # longer samples go through generate
    engine = Engine(
        str(folder), "Say it.", "cpu", "float32", TUNING, replace(SAMPLING, max_new_tokens=256), 2, stack=64
    )
    longer = replace(engine, sampling=replace(SAMPLING, max_new_tokens=300))
    whole = replace(engine, tuning=replace(TUNING, method="full"))
    assert [stacking(each, base).stack for each in (engine, longer, whole)] == [64, 1, 1]


def test_an_encoder_is_refused(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        refused(lambda dtype=dtype: load(save_tiny_model(tmp_path, "roberta"), dtype), "is an encoder")


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    save_tiny_llama(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(lambda: load(tmp_path), "holds an adapter", "merge")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    for path in save_tiny_llama(tmp_path).glob("*token*"):
        path.unlink()
    refused(lambda: load(tmp_path), "holds no tokenizer")


def test_weights_that_are_not_finite_or_overflow(tmp_path):
    path = save_tiny_llama(tmp_path) / "model.safetensors"
    weights, name = load_file(path), "model.layers.1.mlp.up_proj.weight"
    for value, message in ((float("nan"), "not finite"), (1e38, "logits are not finite")):
        save_file({**weights, name: torch.full_like(weights[name], value)}, path, {"format": "pt"})
        refused(lambda: load(tmp_path), message)


def test_mamba_and_too_few_positions_are_refused_in_one_line(mapper, tmp_path):
    mamba = load(save_tiny_model(tmp_path / "mamba", "mamba", state_size=8))
    refused(lambda: rehearse(mamba, mapper, TEXTS, TUNING, SAMPLING), "mamba", "cannot be used")
    own = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    refused(
        lambda: load(save_tiny_model(tmp_path / "a", "gpt2", max_position_embeddings=8, **own)),
        "cannot read its prompt",
    )
    few = load(save_tiny_model(tmp_path / "b", "gpt2", max_position_embeddings=48, **own))
    rehearse(few, mapper, TEXTS, TUNING, SAMPLING)
    refused(lambda: rehearse(few, mapper, [" ".join(TEXTS * 4)], TUNING, SAMPLING), "cannot be used")  # the comment
    refused(lambda: rehearse(few, mapper, TEXTS, TUNING, SamplingSettings()), "cannot be used")  # the sample


def test_tokens_that_the_model_lacks(mapper, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path / "comment"))
    tokenizer.add_tokens(["thank you"])
    tokenizer.save_pretrained(tmp_path / "comment")
    refused(lambda: rehearse(load(tmp_path / "comment"), mapper, TEXTS, TUNING, SAMPLING), "resize its embeddings")
    save_tiny_llama(tmp_path / "prompt")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = "<|user|>{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "prompt")
    refused(lambda: load(tmp_path / "prompt"), "resize its embeddings")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system prompt') }}", "its chat template fails: no system prompt"),
        ("{% if %}", "its chat template fails"),
        ("hello", "leaves the request out"),
        ("{{ messages[0]['content'] }}<|im_end|>", "ends with the end token"),
    ],
)
def test_chat_templates_that_are_refused(tmp_path, template, message):
    (save_tiny_llama(tmp_path) / "chat_template.jinja").write_text(template)
    refused(lambda: load(tmp_path), message)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        (CHAT_TEMPLATE, "<|im_start|>user\nBe kind.<|im_end|>\n<|im_start|>assistant\n"),
        ("{% for part in messages[0]['content'] %}{{ part.text }}{% endfor %}!", "Be kind.!"),
        ("{% if true %}\n{{ strftime_now('%Y') }}: {% endif %}{{ messages[0]['content'] }}", "26 Jul 2024: Be kind."),
        (None, "Be kind.\n"),
    ],
)
def test_the_prompt_is_rendered_alike_tomorrow(tmp_path, template, rendered):
    path = save_tiny_llama(tmp_path) / "chat_template.jinja"
    path.unlink() if template is None else path.write_text(template)
    base = load(tmp_path, prompt="Be kind.")
    assert base.rendered_prompt == rendered == base.tokenizer.decode(base.prompt)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
def test_a_tokenizer_that_ends_every_text(tmp_path, template):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path))
    ends = [("<|im_start|>", 0), ("<|im_end|>", 1)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=ends
    )
    tokenizer.save_pretrained(tmp_path)
    if template is None:
        (tmp_path / "chat_template.jinja").unlink()
    base = load(tmp_path)
    assert base.prompt[0] == 0 and base.prompt[-1] != 1
    assert encode_comment(base, "what a day").count(1) == 1


def test_control_tokens_in_a_comment_are_text(tmp_path):
    base = load(save_tiny_llama(tmp_path))
    for text in ("so <|im_end|> what", "<|im_end|>", "<|im_start|>user\nno<|im_end|>", "what a day"):
        tokens = encode_comment(base, text)
        assert tokens[-1] == 1 and not {0, 1} & set(tokens[:-1])
        assert base.tokenizer.decode(tokens[:-1]) == text
    ordinary = base.tokenizer("what a day", add_special_tokens=False)["input_ids"]
    assert encode_comment(base, "what a day") == [*ordinary, 1]


def test_control_tokens_in_a_text_are_text_for_the_mapper(mapper):
    (plain,), (odd,) = mapper.tokenize(["so what"]), mapper.tokenize(["so <|im_end|> what"])
    assert 1 not in odd and len(odd) > len(plain)


def test_sampling_settings_alone_decide(tmp_path):
    """Whatever a folder's generation config says, but for what ends a text."""
    for name, save in (("plain", save_tiny_llama), ("other", save_tiny_gpt2)):
        folder = save(tmp_path / name)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
        expected = sample_comments(load(folder), 4, 0, SAMPLING)
        wild = {"num_beams": 3, "repetition_penalty": 1.5, "min_length": 40, "no_repeat_ngram_size": 1, "max_time": 0.0}
        (folder / "generation_config.json").write_text(json.dumps({**wild, "eos_token_id": [1, 5]}))
        base = load(folder)
        assert base.end_tokens == {1, 5} and sample_comments(base, 4, 0, SAMPLING) == expected
        assert all(weight.isfinite().all() for weight in tune(base, TEXTS, TUNING, 0).weights.values())


@pytest.mark.parametrize(
    ("model", "config", "padding", "message"),
    [
        (GPT2ForSequenceClassification, GPT2Config(n_embd=32, n_layer=1, n_head=4), None, "no padding token"),
        (GPT2ForSequenceClassification, GPT2Config(n_embd=32, n_layer=1, n_head=4), "<|im_end|>", "no padding token"),
        (XLNetForSequenceClassification, XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=48), None, "no padding"),
        (
            XLNetForSequenceClassification,
            XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=48, initializer_range=1.0),
            "<|im_end|>",
            "depends on the texts beside it",
        ),
    ],
)
def test_classifiers_that_cannot_pad_are_refused(tmp_path, model, config, padding, message):
    config.vocab_size = save_tokenizer(tmp_path)
    config.id2label = dict(enumerate(EMOTIONS))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = padding
    tokenizer.save_pretrained(tmp_path)
    model(config).save_pretrained(tmp_path)
    refused(lambda: load_mapper(str(tmp_path)), message)


def test_too_little_memory_stays_what_it_is():
    huge = 1 << 60
    with pytest.raises(MemoryError), one_line("the model", "choose another"):
        torch.empty(huge)
    with (
        pytest.raises(InputError, match=r"the model \(ValueError\); choose another"),
        one_line("the model", "choose another"),
    ):
        raise ValueError


def test_no_home(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    refused(cache_folder, "XDG_CACHE_HOME")
    refused(lambda: model_folder("~no-such-user-here/model"), "there is no folder")
