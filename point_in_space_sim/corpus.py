"""Corpora: the comments that an experiment draws its targets and neighbourhoods from."""

import csv
import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from experiment.errors import InputError
from experiment.files import ROOT
from point_in_space_sim.engine.assets import hub_reachable

EMOTIONS = (
    "admiration",
    "amusement",
    "anger",
    "annoyance",
    "approval",
    "caring",
    "confusion",
    "curiosity",
    "desire",
    "disappointment",
    "disapproval",
    "disgust",
    "embarrassment",
    "excitement",
    "fear",
    "gratitude",
    "grief",
    "joy",
    "love",
    "nervousness",
    "optimism",
    "pride",
    "realization",
    "relief",
    "remorse",
    "sadness",
    "surprise",
    "neutral",
)
"""The 28 GoEmotions labels, in the order of the data set's label indices (Demszky et al., ACL 2020)."""

SHIPPED_COMMENTS = ROOT / "data" / "comments" / "comments.csv"
HUB_DATASET = "google-research-datasets/go_emotions"
HUB_FILE = "simplified/train-00000-of-00001.parquet"


class Row(NamedTuple):
    """A comment, the GoEmotions labels it has, and who wrote it ("" where unknown)."""

    text: str
    emotions: tuple[str, ...] = ()
    owner: str = ""


@dataclass(frozen=True)
class Corpus:
    """Distinct comments in file order. Of comment i, `emotions[i]` are its GoEmotions labels and `owners[i]` the ids
    (text, as written) of all who wrote it; both are empty where unknown."""

    name: str
    texts: tuple[str, ...]
    emotions: tuple[tuple[str, ...], ...]
    owners: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        return sha256("\n".join(self.texts).encode()).hexdigest()


def load_corpus(source: str | Path | None = None) -> Corpus:
    """
    Reads a corpus: the shipped comments (None or "shipped"), "go_emotions" (the train split, from the Hugging Face
    hub or its cache), a GoEmotions TSV (text, label indices, id; no header, no quoting) or a CSV with a `text` column
    and, if it has them, an `emotion` and a `user` column.

    A text that occurs again (after trimming white space) is left out: a neighbourhood that holds one comment many
    times would be tight for no good reason. Its labels and owners are joined to the first occurrence's.

    Raises InputError, naming file and line, for anything that is not such a file or holds fewer than two comments.
    """
    if source is None or str(source) == "shipped":
        source = SHIPPED_COMMENTS
    if str(source) == "go_emotions":
        return _without_duplicates("go_emotions", _hub_rows(), "go_emotions")
    path = Path(source)
    rows = read_goemotions(path) if path.suffix.lower() in (".tsv", ".txt") else read_comments(path)
    return _without_duplicates(path.stem, rows, str(path))


def read_goemotions(path: str | Path) -> list[Row]:
    """The rows of a GoEmotions TSV, duplicates included. Raises InputError with file and line."""
    rows = []
    # Split on line feeds only: a comment may hold other characters that str.splitlines takes for line ends.
    for number, line in enumerate(_read_text(Path(path)).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line and number > 1:
            continue
        fields = line.split("\t")
        if len(fields) != 3:
            raise InputError(
                f"{path}, line {number}: {len(fields)} tab-separated fields where GoEmotions has 3 "
                "(text, label indices, comment id)"
            )
        text, labels, _ = fields
        try:
            indices = [int(label) for label in labels.split(",")]
        except ValueError:
            raise InputError(f"{path}, line {number}: label indices {labels!r} are not numbers with commas") from None
        if not all(0 <= index < len(EMOTIONS) for index in indices):
            raise InputError(f"{path}, line {number}: label indices {labels!r} are not within 0 to {len(EMOTIONS) - 1}")
        rows.append(Row(_checked_text(text, path, number), tuple(EMOTIONS[index] for index in indices)))
    return rows


def read_comments(path: str | Path) -> list[Row]:
    """The rows of a CSV with a `text` column, and, if it has them, an `emotion` and a `user` column.

    An emotion that is none of the 28 labels counts as none. Raises InputError with file and line.
    """
    reader = csv.DictReader(io.StringIO(_read_text(Path(path)), newline=""), strict=True)
    rows: list[Row] = []
    try:
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        if "text" not in names:
            raise InputError(
                f"{path}, line 1: no column `text` (columns: {', '.join(names) or 'none'}); add a header with one"
            )
        if twice := [name for name in ("text", "emotion", "user") if names.count(name) > 1]:
            raise InputError(f"{path}, line 1: column `{twice[0]}` stands twice; rename or remove one")
        for row in reader:
            number = reader.line_num
            if None in row:
                raise InputError(f"{path}, line {number}: more fields than the header has; quote texts with commas")
            if row["text"] is None:
                raise InputError(f"{path}, line {number}: no `text`, the row has too few fields")
            emotion = (row.get("emotion") or "").strip()
            labels = (emotion,) if emotion in EMOTIONS else ()
            rows.append(Row(_checked_text(row["text"], path, number), labels, (row.get("user") or "").strip()))
    except csv.Error as error:
        # The DictReader's own count is of the last row that could be read.
        raise InputError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error})") from None
    return rows


def _hub_rows() -> list[Row]:
    """Rows of GoEmotions' train split in the Hugging Face hub's cache, fetched into it where the hub is reachable."""
    import pandas as pd  # like the hub's library slow to import, and only this source needs them
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        if not hub_reachable():
            raise InputError(
                f"corpus go_emotions: the hub is not within reach and its cache has no {HUB_DATASET}; fetch train.tsv "
                "from github.com/google-research/google-research, goemotions/data, and pass it as the corpus"
            ) from None
        try:
            path = hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset")
        except (HfHubHTTPError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"corpus go_emotions: cannot be fetched from the hub ({reason})") from error
    try:
        table = pd.read_parquet(path, columns=["text", "labels"])
        return [
            Row(str(text).strip(), tuple(EMOTIONS[index] for index in labels))
            for text, labels in zip(table["text"], table["labels"], strict=True)
        ]
    except ImportError:
        raise InputError("corpus go_emotions: the hub's copy is Parquet; `pip install pyarrow` to read it") from None
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path}: not GoEmotions' Parquet file ({type(error).__name__}); delete it") from error


def _read_text(path: Path) -> str:
    """The file's UTF-8 text without a byte-order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"corpus {path}: cannot be read ({error.strerror}); give a TSV or CSV file") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _checked_text(text: str, path: str | Path, number: int) -> str:
    text = text.strip()
    if not any(character.isprintable() and not character.isspace() for character in text) or "\0" in text:
        raise InputError(f"{path}, line {number}: no text in this row; remove the row or fill it in")
    return text


def _without_duplicates(name: str, rows: list[Row], where: str) -> Corpus:
    emotions: dict[str, dict[str, None]] = {}
    owners: dict[str, dict[str, None]] = {}
    for row in rows:
        emotions.setdefault(row.text, {}).update(dict.fromkeys(row.emotions))
        owners.setdefault(row.text, {}).update({row.owner: None} if row.owner else {})
    if len(emotions) < 2:
        raise InputError(f"{where}: {len(emotions)} distinct comments; a target and its neighbours need at least 2")
    return Corpus(name, tuple(emotions), tuple(map(tuple, emotions.values())), tuple(map(tuple, owners.values())))
