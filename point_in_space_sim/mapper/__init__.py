"""
The embedding mapper: comment -> vector of 28 emotion probabilities, in GoEmotions label order.

Two kinds of mapper are read: a transformers sequence classifier with the 28 GoEmotions labels, such as the study's
SamLowe/roberta-base-go_emotions, and the embedded mapper, all-MiniLM-L6-v2 with this repository's adapter and head.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tqdm import tqdm
from transformers.utils import logging

from experiment.errors import InputError
from experiment.files import ROOT, replace_atomically, sha256_file
from point_in_space_sim.corpus import EMOTIONS
from point_in_space_sim.engine.assets import MINILM_WHEEL, model_folder, wheel_folder
from point_in_space_sim.engine.guard import one_line

ROBERTA = "SamLowe/roberta-base-go_emotions"
ROBERTA_REVISION = "58b6c5b44a7a12093f782442969019c7e2982299"
EMBEDDED_FOLDER = ROOT / "data" / "mapper"
MAX_TOKENS = 256
"""Longer comments are cut (the length that all-MiniLM-L6-v2 was trained with)."""
BATCH_SIZE = 64
EMBEDDED_FILES = ("adapter_model.safetensors", "adapter_config.json", "head.safetensors")

TokenIds = list[list[int]]


@dataclass(frozen=True)
class Mapper:
    """
    Maps a list of texts to their emotion probabilities: float32 (texts, 28).

    A text's vector does not depend on the texts it is mapped with. `name` says which mapper it is, for figures;
    `sha256` stands for its weights, labels and tokenizer.
    """

    name: str
    sha256: str
    tokenize: Callable[[list[str]], TokenIds] = field(repr=False)
    logits: Callable[[TokenIds], torch.Tensor] = field(repr=False)
    device: str = "cpu"  # its kind: another one gives other last bits

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        advice = "restore its files or choose another"
        with torch.inference_mode(), one_line(f"mapper {self.name}: cannot map these texts", advice):
            tokens = self.tokenize(list(texts))
            vectors = in_batches_of_like_length(lambda batch: self.logits(batch).sigmoid(), tokens)
        if not np.isfinite(vectors).all():
            raise InputError(f"mapper {self.name}: gives numbers that are not finite; restore its files")
        return vectors


def load_mapper(name: str = "embedded", device: str = "cpu") -> Mapper:
    """
    Loads a mapper by name: "embedded", "roberta" (the study's, at its pinned revision), a hub id, or a folder (a
    transformers sequence classifier or what mapper/train.py writes).

    Raises InputError where the files are missing, damaged or not safetensors, where the labels are not the 28 of
    GoEmotions, where a text's vector depends on the texts beside it, and where there is neither network nor cache.
    """
    if name == "embedded":
        return _load_embedded(EMBEDDED_FOLDER, device)
    if (Path(name) / "adapter_config.json").is_file():
        return _load_embedded(Path(name), device)
    if name == "roberta":
        return _load_classifier(ROBERTA, model_folder(f"{ROBERTA}@{ROBERTA_REVISION}"), device)
    return _load_classifier(name, model_folder(name), device)


def map_texts(mapper: Mapper, texts: Sequence[str], cache_folder: str | Path) -> np.ndarray:
    """
    The texts' vectors, float32 (texts, 28), from the cache where it has them for these very texts, weights and kind of
    device.

    A damaged cache file is replaced.
    """
    key = hashlib.sha256((mapper.sha256 + mapper.device.removeprefix("cpu")).encode())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    path = Path(cache_folder) / f"{key.hexdigest()}.npy"
    try:
        vectors = np.load(path, allow_pickle=False)
        intact = vectors.shape == (len(texts), len(EMOTIONS)) and vectors.dtype == np.float32
        if intact and np.all((vectors >= 0) & (vectors <= 1)):
            return vectors
    except (OSError, ValueError, EOFError):
        pass
    vectors = mapper(texts)
    try:
        with replace_atomically(path) as temporary:
            np.save(temporary, vectors)
    except OSError as error:
        raise InputError(
            f"cannot write the cache {cache_folder}: {error.strerror or error}; free some space or set "
            "XDG_CACHE_HOME to another folder"
        ) from error
    return vectors


def load_encoder(folder: Path, **config: Any) -> tuple[transformers.BertModel, Callable[[list[str]], TokenIds]]:
    """(BertModel without its unused pooler, function texts -> token ids) of all-MiniLM-L6-v2 in a local folder."""
    with _loading(folder):
        model = transformers.BertModel.from_pretrained(
            folder, add_pooling_layer=False, local_files_only=True, use_safetensors=True, **config
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, lambda texts: _token_ids(tokenizer, texts, MAX_TOKENS)


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The mean of the hidden states (texts, tokens, width) over each text's own tokens, standardised: (texts, width).

    Float32. Without the standardising (a layer norm without parameters) the head gets numbers of size 0.2 and training
    stays on a plateau for hundreds of steps.
    """
    weights = mask[..., None].float()
    mean = (hidden.float() * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.layer_norm(mean, mean.shape[1:])


def pad(token_ids: TokenIds, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both integer tensors (texts, longest), filled up on the right."""
    ids = torch.full((len(token_ids), max(map(len, token_ids))), padding)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(token_ids):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def in_batches_of_like_length(function: Callable[[TokenIds], torch.Tensor], token_ids: TokenIds) -> np.ndarray:
    """The rows (28) that `function` gives for batches of texts, in the texts' order: float32 (texts, 28)."""
    rows = np.empty((len(token_ids), len(EMOTIONS)), dtype=np.float32)
    order = np.argsort([len(tokens) for tokens in token_ids], kind="stable")
    hidden = None if len(order) >= 1000 else True  # None: shown on a terminal only
    with tqdm(total=len(order), desc="mapping", unit=" texts", disable=hidden) as progress:
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            rows[batch] = function([token_ids[index] for index in batch]).float().cpu().numpy()
            progress.update(len(batch))
    return rows


def _token_ids(tokenizer: Any, texts: list[str], limit: int) -> TokenIds:
    if not texts:
        return []
    # Split: what reads like a control token in a text is text.
    encoded = tokenizer(texts, truncation=True, max_length=limit, split_special_tokens=True)["input_ids"]
    # A tokenizer without special tokens gives none at all for an empty text, which no model reads.
    return [tokens or [tokenizer.pad_token_id] for tokens in encoded]


def _load_embedded(folder: Path, device: str) -> Mapper:
    """all-MiniLM-L6-v2 with the adapter merged into it, pooling, and a linear head."""
    files = [folder / name for name in EMBEDDED_FILES]
    for path in files:
        if not path.is_file():
            raise InputError(f"mapper {folder}: {path.name} is missing; restore it or run mapper/train.py")
    encoder_folder = wheel_folder(MINILM_WHEEL)
    encoder, tokenize = load_encoder(encoder_folder)
    with _loading(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about renamed methods between peft and transformers
        saved = load_file(files[0])
        adapted = PeftModel.from_pretrained(encoder, str(folder))
        if saved.keys() != get_peft_model_state_dict(adapted, save_embedding_layers=False).keys():
            raise ValueError("the adapter does not fit all-MiniLM-L6-v2")
        head = torch.nn.Linear(encoder.config.hidden_size, len(EMOTIONS))
        head.load_state_dict(load_file(files[2]))
        encoder = adapted.merge_and_unload().eval().to(device)
    head = head.eval().to(device)

    def logits(token_ids: TokenIds) -> torch.Tensor:
        ids, mask = (tensor.to(device) for tensor in pad(token_ids))
        return head(pool(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask))

    name = "embedded (all-MiniLM-L6-v2, adapted)" if folder == EMBEDDED_FOLDER else folder.name
    return Mapper(name, embedded_hash(folder, encoder_folder), tokenize, logits, torch.device(device).type)


def _load_classifier(name: str, folder: Path, device: str) -> Mapper:
    """A transformers sequence classifier in a local folder; its columns are brought into GoEmotions order."""
    with _loading(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        columns = _columns(config.id2label, name)
        if config.problem_type == "single_label_classification":
            raise InputError(f"mapper {name}: it picks a single label; choose a multi-label classifier")
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(sorted(report['missing_keys'])[:3])}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.pad_token_id is None:
            raise ValueError("its tokenizer has no padding token")
    model = model.float().eval().to(device)
    # RoBERTa counts positions from 2, so it reads two tokens less than it has positions.
    positions = getattr(config, "max_position_embeddings", None) or 0  # XLNet says -1: as many as you like
    limit = min(MAX_TOKENS, tokenizer.model_max_length, positions - 2 if positions > 2 else MAX_TOKENS)

    def logits(token_ids: TokenIds) -> torch.Tensor:
        ids, mask = (tensor.to(device) for tensor in pad(token_ids, tokenizer.pad_token_id))
        return model(input_ids=ids, attention_mask=mask).logits[:, columns]

    mapper = Mapper(
        folder.resolve().name if Path(name).is_dir() else name,
        classifier_hash(folder),
        lambda texts: _token_ids(tokenizer, texts, limit),
        logits,
        torch.device(device).type,
    )
    texts = ["Thank you so much for all the help!", "no"]
    if not np.allclose(mapper(texts), np.concatenate([mapper([text]) for text in texts]), atol=1e-3):
        raise InputError(
            f"mapper {mapper.name}: a text's vector depends on the texts beside it (it reads padding); choose another"
        )
    return mapper


def _columns(id2label: dict[int, str], name: str) -> list[int]:
    """For each GoEmotions label the checkpoint's column that holds it."""
    column_of = {label.strip().lower(): int(column) for column, label in id2label.items()}
    missing = [emotion for emotion in EMOTIONS if emotion not in column_of]
    if missing or len(id2label) != len(EMOTIONS):
        raise InputError(
            f"mapper {name}: its {len(id2label)} labels are not the 28 of GoEmotions"
            + (f" (without {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})" if missing else "")
            + "; choose a classifier trained on GoEmotions"
        )
    return [column_of[emotion] for emotion in EMOTIONS]


def embedded_hash(folder: Path, encoder_folder: Path) -> str:
    """Stands for all that an embedded mapper's vectors depend on."""
    return _hash_of_files([encoder_folder / "model.safetensors", *(folder / name for name in EMBEDDED_FILES)])


def classifier_hash(folder: Path) -> str:
    """Stands for all that a classifier's vectors depend on: weights, labels, tokenizer."""
    patterns = ("*.safetensors", "*.json", "*.txt")
    return _hash_of_files(sorted(path for pattern in patterns for path in folder.glob(pattern)))


def _hash_of_files(paths: Sequence[Path]) -> str:
    """One SHA-256 of several files' names and contents."""
    return hashlib.sha256("".join(f"{path.name} {sha256_file(path)}\n" for path in paths).encode()).hexdigest()


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Silences transformers' progress bars and reports; what it raises becomes an InputError that names the folder."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with one_line(f"mapper {folder}: cannot be loaded", "restore its files"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
