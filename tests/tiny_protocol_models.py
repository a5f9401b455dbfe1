"""What a whole run needs, tiny: a random Llama, a random RoBERTa with the 28 labels, and a corpus, in one folder."""

import csv
from pathlib import Path

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from point_in_space_sim.corpus import EMOTIONS
from tests.tiny_models import save_tiny_llama, save_tokenizer

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


def save_tiny_world(folder: Path) -> Path:
    save_tiny_llama(folder / "llama")
    save_tiny_mapper(folder / "roberta")
    save_tiny_corpus(folder / "corpus.csv")
    return folder
