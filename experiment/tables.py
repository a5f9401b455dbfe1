"""A run's tables as files: tidy CSV, compressed where large, equal bytes for equal tables."""

import csv
import gzip
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from experiment.files import replace_atomically

LARGE = 400_000  # entries of a table that is written as .csv.gz


def write_table(frame: pd.DataFrame, folder: Path, name: str, float_format: str | None = None) -> None:
    """Writes NAME.csv into the folder, or NAME.csv.gz for a large table."""
    # Readers end a line at a lone carriage return; unquoted, it would shift all that follows.
    texts = frame.select_dtypes(["object", "string"])
    returns = any(own.astype(str).str.contains("\r", regex=False).any() for _, own in texts.items())
    quoting: Any = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    text = frame.to_csv(index=False, float_format=float_format, lineterminator="\n", quoting=quoting).encode()
    with _table_file(folder, file_name(frame, name)) as temporary:
        # Without a time: equal tables give equal bytes.
        temporary.write_bytes(gzip.compress(text, mtime=0) if temporary.suffix == ".gz" else text)


def file_name(frame: pd.DataFrame, name: str) -> str:
    """What write_table calls the file of a table."""
    return f"{name}.csv{'.gz' if frame.size > LARGE else ''}"


def write_lines(lines: Iterable[str], folder: Path, name: str, *, large: bool) -> None:
    """Writes NAME.csv line by line, or NAME.csv.gz for a large table, which need not fit into memory."""
    with (
        _table_file(folder, f"{name}.csv{'.gz' if large else ''}") as temporary,
        open(temporary, "wb") as plain,
        gzip.GzipFile("", "wb", 6, plain, mtime=0) if large else plain as file,
    ):
        file.writelines(f"{line}\n".encode() for line in lines)


@contextmanager
def _table_file(folder: Path, file: str) -> Iterator[Path]:
    """A temporary file that becomes the table, plain or packed; an earlier one of the other kind does not stay."""
    packed = folder / f"{file.removesuffix('.gz')}.gz"
    with replace_atomically(folder / file) as temporary:
        yield temporary
        if packed.name != file:
            packed.unlink(missing_ok=True)  # before: the packed one would be read in place of the new one
    if packed.name == file:
        packed.with_suffix("").unlink(missing_ok=True)


def read_lines(folder: Path, name: str) -> Iterator[bytes]:
    """The lines of a table, each with its line feed."""
    path = table_path(folder, name)
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        yield from file


def table_path(folder: Path, name: str) -> Path:
    """NAME.csv.gz where the folder holds one, else NAME.csv."""
    packed = folder / f"{name}.csv.gz"
    return packed if packed.exists() else folder / f"{name}.csv"


def table_names(folder: Path) -> list[str]:
    """The names of a folder's tables."""
    return sorted({path.name.partition(".")[0] for path in [*folder.glob("*.csv"), *folder.glob("*.csv.gz")]})


def read_table(folder: Path, name: str, **options: Any) -> pd.DataFrame:
    """What write_table wrote, every number exactly. options: for pandas."""
    frame: pd.DataFrame = pd.read_csv(table_path(folder, name), float_precision="round_trip", **options)
    return frame
