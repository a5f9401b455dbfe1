"""The embedding mapper: label order, batching, cache, what it refuses, and the real embedded mapper."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from experiment.errors import InputError
from point_in_space_sim import mapper as mapper_module
from point_in_space_sim.corpus import EMOTIONS, SHIPPED_COMMENTS, read_comments
from point_in_space_sim.mapper import EMBEDDED_FOLDER, load_mapper, map_texts
from point_in_space_sim.mapper import train as train_mapper

TEXTS = [
    "thank you so much",
    "the cat sat on the mat and then it sat on the other mat again",
    "no",
    "",
    "what a day it was , so much to do and no time to do it",
    "wow",
] * 3


def save_classifier(folder, labels=EMOTIONS, seed=0, **config):
    """A tiny random RoBERTa classifier with its tokenizer."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=34,
            initializer_range=0.5,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            **config,
        )
    ).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def classifier(tmp_path):
    """(folder, model) of a tiny classifier in GoEmotions order."""
    return tmp_path / "tiny", save_classifier(tmp_path / "tiny")


def test_a_classifier_gives_its_own_sigmoid_probabilities(classifier):
    folder, model = classifier
    mapper = load_mapper(str(folder))
    assert mapper.name == "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits[0].sigmoid().numpy() for text in TEXTS]
    vectors = mapper(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.ptp(vectors) > 0.5, "a test whose vectors are all alike could not fail"
    assert mapper([]).shape == (0, 28)


def test_label_order_is_read_from_the_checkpoint(classifier, tmp_path):
    folder, model = classifier
    order = np.random.default_rng(0).permutation(28)
    shuffled = tmp_path / "shuffled"
    save_classifier(shuffled, labels=[EMOTIONS[index].title() for index in order])
    weights = model.state_dict()
    for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
        weights[name] = weights[name][order]
    save_file(weights, shuffled / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(load_mapper(str(folder))(TEXTS), load_mapper(str(shuffled))(TEXTS))
    assert load_mapper(str(folder)).sha256 != load_mapper(str(shuffled)).sha256


def test_vectors_do_not_depend_on_the_batch(classifier, monkeypatch):
    mapper = load_mapper(str(classifier[0]))
    together = mapper(TEXTS)
    np.testing.assert_allclose(mapper(TEXTS[::-1])[::-1], together, atol=1e-5)
    np.testing.assert_allclose(np.vstack([mapper([text]) for text in TEXTS]), together, atol=1e-5)
    monkeypatch.setattr(mapper_module, "BATCH_SIZE", 4)
    np.testing.assert_allclose(mapper(TEXTS), together, atol=1e-5)


def test_texts_longer_than_the_model_are_cut(classifier):
    mapper = load_mapper(str(classifier[0]))
    long = " ".join(["mat"] * 500)
    np.testing.assert_allclose(mapper([long]), mapper([long + " wow"]), atol=1e-5)


def test_cache_gives_the_same_bytes_without_the_model(classifier, tmp_path):
    mapper = load_mapper(str(classifier[0]))
    cache = tmp_path / "cache"
    first = map_texts(mapper, TEXTS, cache)
    without_model = replace(mapper, logits=None, tokenize=None)
    assert map_texts(without_model, TEXTS, cache).tobytes() == first.tobytes()
    assert len(list(cache.iterdir())) == 1
    for other in (replace(without_model, sha256="another"), replace(without_model, device="cuda"), without_model):
        with pytest.raises(InputError, match="cannot map"):
            map_texts(other, TEXTS[:-1] if other is without_model else TEXTS, cache)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other shape", "not probabilities", "not a number"])
def test_a_damaged_cache_file_is_replaced(classifier, tmp_path, damage):
    mapper = load_mapper(str(classifier[0]))
    expected = map_texts(mapper, TEXTS, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    if damage in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[: 200 if damage == "truncated" else 0])
    else:
        array = {"other shape": expected[:1], "not probabilities": expected + 1, "not a number": expected * np.nan}
        np.save(path, array[damage])
    np.testing.assert_array_equal(map_texts(mapper, TEXTS, tmp_path / "cache"), expected)
    np.testing.assert_array_equal(np.load(path), expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (EMOTIONS[:-1], "27 labels are not the 28 of GoEmotions (without neutral)"),
        (("positive", "negative"), "2 labels are not the 28"),
        ((*EMOTIONS[:-1], "LABEL_27"), "without neutral"),
        ((*EMOTIONS, "boredom"), "29 labels"),
    ],
)
def test_other_labels_are_refused(tmp_path, labels, message):
    save_classifier(tmp_path / "tiny", labels=labels)
    with pytest.raises(InputError) as error:
        load_mapper(str(tmp_path / "tiny"))
    assert message in str(error.value)


def test_a_single_label_classifier_is_refused(tmp_path):
    save_classifier(tmp_path / "tiny", problem_type="single_label_classification")
    with pytest.raises(InputError, match="multi-label"):
        load_mapper(str(tmp_path / "tiny"))


@pytest.mark.parametrize(
    "damage", ["truncated", "pickle only", "no head", "no tokenizer", "broken config", "no folder"]
)
def test_damaged_checkpoints_are_refused_in_one_line(classifier, damage):
    folder, model = classifier
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "pickle only":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        weights.unlink()
    elif damage == "no head":
        tensors = {name: value for name, value in load_file(weights).items() if not name.startswith("classifier")}
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    elif damage == "broken config":
        (folder / "config.json").write_text("{")
    else:
        shutil.rmtree(folder)
    with pytest.raises(InputError) as error:
        load_mapper(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_embedded_is_the_default_and_roberta_is_pinned(classifier, monkeypatch):
    folder, _ = classifier
    assert (load_mapper().name, load_mapper().sha256) == (load_mapper("embedded").name, load_mapper("embedded").sha256)
    asked = []
    monkeypatch.setattr(mapper_module, "model_folder", lambda name: asked.append(name) or folder)
    assert load_mapper("roberta").name == "SamLowe/roberta-base-go_emotions"
    assert asked == ["SamLowe/roberta-base-go_emotions@58b6c5b44a7a12093f782442969019c7e2982299"]


@pytest.fixture(scope="module")
def embedded():
    return load_mapper("embedded")


@pytest.mark.parametrize(
    ("text", "emotion"),
    [
        ("Thank you so much!", "gratitude"),
        ("I love you, you are my favourite person.", "love"),
        ("I'm so sorry, that was my fault and I apologise.", "remorse"),
        ("Haha that is hilarious, lol", "amusement"),
        ("Wow, I did not expect that at all!", "surprise"),
        ("How did you do that? What is it made of?", "curiosity"),
        ("I'm terrified of spiders", "fear"),
    ],
)
def test_the_embedded_mapper_on_obvious_sentences(embedded, text, emotion):
    (vector,) = embedded([text])
    assert EMOTIONS[int(vector.argmax())] == emotion
    assert vector[EMOTIONS.index(emotion)] > 0.5


def test_the_embedded_mapper_does_not_depend_on_the_batch(embedded):
    np.testing.assert_allclose(np.vstack([embedded([text]) for text in TEXTS]), embedded(TEXTS), atol=1e-5)


def test_the_embedded_mapper_fits_the_repository():
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) <= 6e6


@pytest.mark.parametrize("damage", ["truncated adapter", "truncated head", "missing head", "other adapter"])
def test_a_damaged_embedded_mapper_is_refused(tmp_path, damage):
    folder = tmp_path / "mapper"
    shutil.copytree(EMBEDDED_FOLDER, folder)
    path = folder / ("head.safetensors" if "head" in damage else "adapter_model.safetensors")
    if damage.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:-100])
    elif damage.startswith("missing"):
        path.unlink()
    else:
        tensors = load_file(path)
        save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(InputError) as error:
        load_mapper(str(folder))
    assert "\n" not in str(error.value)


def test_a_fifth_of_every_emotion_is_held_out_whatever_the_order():
    rows = read_comments(SHIPPED_COMMENTS)
    train, held_out = train_mapper.split_comments(rows)
    assert sorted(train + held_out) == sorted(rows)
    for emotion in EMOTIONS:
        assert 5 * sum(row[1] == (emotion,) for row in held_out) == sum(row[1] == (emotion,) for row in rows)
    assert train_mapper.split_comments(rows[::-1]) == (train, held_out)


def test_batches_cover_every_text_once_and_are_of_like_length():
    lengths = np.random.default_rng(1).integers(3, 40, size=1000)
    batches = train_mapper.batches_of_like_length(lengths, 16, np.random.default_rng(2))
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert max(map(len, batches)) == 16
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 3


def test_learning_rate_rises_over_a_tenth_and_falls_to_zero():
    rates = [train_mapper.one_cycle(progress, 2.0) for progress in (0, 0.05, 0.1, 0.55, 1)]
    np.testing.assert_allclose(rates, [0, 1, 2, 1, 0], atol=1e-12)


def test_shift_finds_the_threshold_of_best_f1():
    generator = np.random.default_rng(3)
    labels = (generator.random((4000, 28)) < np.linspace(0.02, 0.5, 28)).astype(np.float32)
    logits = (2 * labels - 3 + generator.normal(size=labels.shape)).astype(np.float32)
    shift = train_mapper.best_f1_shift(logits, labels, generator)
    reached = f1_score(labels, logits + shift > 0, average=None)
    of_thresholds = [f1_score(labels, logits > threshold, average=None) for threshold in np.linspace(-4, 2, 61)]
    assert np.all(reached > np.max(of_thresholds, axis=0) - 0.03)
    assert np.all(f1_score(labels, logits > 0, average=None)[:10] < reached[:10])


def test_radius_of_a_neighbourhood_by_hand():
    vectors = np.zeros((5, 28), dtype=np.float32)
    vectors[:, 3] = [0.9, 0.8, 0.6, 0.1, 0.0]
    # The two nearest to text 0 are texts 1 and 2; both lie 0.1 from their centroid.
    assert train_mapper.neighbourhood_radius(vectors, 3, neighbours=2) == pytest.approx(0.1)


def test_training_that_was_interrupted_gives_the_same_weights(tmp_path, monkeypatch):
    token_ids = [[1, 2 + index % 7, 3 + index % 5, 2] for index in range(24)]
    labels = np.eye(28, dtype=np.float32)[[index % 7 for index in range(24)]]

    def trained(checkpoint):
        settings = train_mapper.Settings(
            Path(), checkpoint=checkpoint, epochs=2, batch_size=8, bfloat16=False, learning_rate=0.01
        )
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=12,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
        encoder = get_peft_model(BertModel(config), LoraConfig(r=2, target_modules=["query", "value"]))
        head = torch.nn.Linear(16, 28)
        train_mapper.train(settings, encoder, head, token_ids, labels, token_ids, labels)
        return head.weight.detach().numpy().copy(), train_mapper.predict(encoder, head, token_ids)

    def scores_and_keep(predicted, truth):
        if not (tmp_path / "after one epoch").exists():
            shutil.copy(tmp_path / "checkpoint", tmp_path / "after one epoch")
        return {}

    monkeypatch.setattr(train_mapper, "scores", scores_and_keep)
    weight, predicted = trained(tmp_path / "checkpoint")
    resumed_weight, resumed_predicted = trained(tmp_path / "after one epoch")
    np.testing.assert_array_equal(resumed_weight, weight)
    np.testing.assert_array_equal(resumed_predicted, predicted)
    with pytest.raises(InputError, match="of another run"):
        labels[:] = labels[::-1].copy()
        trained(tmp_path / "checkpoint")
