"""Small models and corpora for the tests, real files in the real formats."""

import csv
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from point_in_space_sim.corpus import EMOTIONS

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> int:
    """Trains a byte-level BPE on a few words, saves it, and returns its vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["what a wonderful day", "thank you so much for the help", "user assistant"] * 3, trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return len(fast)


def save_tiny_llama(folder: Path, seed: int = 0, layers: int = 4) -> Path:
    """A Llama of 4 layers, 32 wide, 4 query heads on 2 key heads; weights large enough that its logits differ."""
    vocabulary = save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_gpt2(folder: Path, seed: int = 0) -> Path:
    """A GPT-2, whose layers are not Llama's, with a tokenizer that has no chat template."""
    vocabulary = save_tokenizer(folder, chat_template=None)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_tiny_model(folder: Path, architecture: str, **config: Any) -> Path:
    """A causal language model of any of transformers' architectures, 32 wide."""
    common = {
        "vocab_size": save_tokenizer(folder),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**common | config)).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------ for experiments 1 and 3


WORDS = "what a wonderful day thank you so much for the help no yes sad joy fear love angry cat dog rain sun".split()


def save_tiny_mapper(folder: Path, seed: int = 0) -> Path:
    """A RoBERTa classifier whose weights are large enough that texts differ."""
    vocabulary = save_tokenizer(folder)
    config = RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,
        initializer_range=0.5,
        pad_token_id=1,
        id2label=dict(enumerate(EMOTIONS)),
        label2id={emotion: index for index, emotion in enumerate(EMOTIONS)},
    )
    torch.manual_seed(seed)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


def save_tiny_corpus(path: Path, count: int = 60) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "text"])
        for i in range(count):
            words = [WORDS[(i * step + step) % len(WORDS)] for step in range(1, 3 + i % 5)]
            writer.writerow([EMOTIONS[i % 28], f"{' '.join(words)} {i}"])
    return path


def save_tiny_people(path: Path, corpus: Path, count: int = 6) -> Path:
    """A crowd of a corpus's texts, dealt in turn, with columns who and said."""
    with open(corpus, newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["who", "said"])
        writer.writerows([f"p{i % count}", text] for i, text in enumerate(texts))
    return path


def save_tiny_world(folder: Path) -> Path:
    save_tiny_llama(folder / "llama")
    save_tiny_mapper(folder / "roberta")
    save_tiny_people(folder / "people.csv", save_tiny_corpus(folder / "corpus.csv"))
    return folder
