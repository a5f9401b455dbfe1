"""Users as vectors: mean ratings by genre from GroupLens files, or a ready matrix."""

import csv
import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from experiment.errors import InputError

NO_GENRES = "(no genres listed)"
LOWEST_RATING, HIGHEST_RATING = 0.5, 5.0
LARGEST = 1e100  # of a matrix's entries: sums of squares stay finite


@dataclass(frozen=True)
class Preferences:
    """user_ids: (n,), text. dimensions: d names. vectors: (n, d)."""

    user_ids: np.ndarray
    dimensions: tuple[str, ...]
    vectors: np.ndarray


@dataclass(frozen=True)
class Crowd:
    """What R runs start from. user_ids: (R, n). users: (R, n, d). experts: (R, d). models: (R, d)."""

    user_ids: np.ndarray
    users: np.ndarray
    experts: np.ndarray
    models: np.ndarray


def read_movielens(ratings: str | Path, movies: str | Path, *, keep_no_genres: bool = False) -> Preferences:
    """Each user's mean rating of each genre's movies, 0 where the user rated none; users by ascending id.

    ratings: columns userId, movieId, rating (0.5 to 5). movies: columns movieId, genres (separated by "|").
    Both .csv or .csv.gz, as GroupLens publishes them. keep_no_genres: count "(no genres listed)" as a genre, as the
    original study did. Raises InputError, naming the file and the line, for anything else.
    """
    genres = _read_columns(movies, {"movieId": "int64", "genres": "str"})
    table = _read_columns(ratings, {"userId": "str", "movieId": "int64", "rating": "float32"})
    indicator = genres["genres"].str.get_dummies("|")
    if not keep_no_genres:
        indicator = indicator.drop(columns=NO_GENRES, errors="ignore")
    if indicator.empty:
        raise InputError(f"{movies}: no movie has a genre; needs at least one")
    if (twice := genres["movieId"].duplicated()).any():
        raise _bad_row(movies, twice, f"movie {genres['movieId'][twice].iloc[0]} stands twice; remove one")
    if (missing := (table["userId"] == "")).any():
        raise _bad_row(ratings, missing, "userId is missing")
    rating = table["rating"].to_numpy()
    wrong = ~((rating >= LOWEST_RATING) & (rating <= HIGHEST_RATING))
    if wrong.any():
        raise _bad_row(ratings, wrong, f"rating {rating[wrong][0]:g} is not within 0.5 to 5")
    movie = pd.Index(genres["movieId"]).get_indexer(pd.Index(table["movieId"]))
    if (movie < 0).any():
        unknown = table["movieId"].to_numpy()[movie < 0][0]
        raise _bad_row(ratings, movie < 0, f"movie {unknown} is not in {movies}")
    codes, found = pd.factorize(table["userId"])
    names = np.array(found, dtype=object)
    order = sorted(range(len(names)), key=lambda i: _place(str(names[i])))
    user = np.argsort(order)[codes]
    pair = user * np.int64(len(genres)) + movie
    rows = np.argsort(pair, kind="stable")
    again = np.zeros(len(pair), dtype=bool)
    again[rows[1:]] = np.diff(pair[rows]) == 0
    if again.any():
        first = int(again.argmax())
        who, what = table["userId"].iloc[first], table["movieId"].iloc[first]
        what = f"user {who} rates movie {what} a second time; keep one of the two"
        raise _bad_row(ratings, again, what)
    shape = (len(names), len(genres))
    flags = indicator.to_numpy(dtype=np.float64)
    sums = scipy.sparse.csr_array((rating.astype(np.float64), (user, movie)), shape=shape) @ flags
    counts = scipy.sparse.csr_array((np.ones(len(rating)), (user, movie)), shape=shape) @ flags
    vectors = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return Preferences(names[order], tuple(indicator.columns), vectors)


def _place(user: str) -> tuple[bool, int, str]:
    """Where an id comes: whole numbers by size, then others as text."""
    number = user.isascii() and user.isdigit()
    return (not number, int(user) if number else 0, user)


def read_matrix(path: str | Path) -> Preferences:
    """A user x dimension matrix: a header, then one row a user, the user's id (text, as written) first. .csv, .csv.gz.

    A header that is one name shorter than the rows is R's: write.table gives the ids no name.
    Raises InputError, naming the file and the line, where ids repeat or an entry is not a finite number, or so large
    that distances would overflow.
    """
    table = _read_csv(path, str)
    if table.shape[1] < 2:
        raise InputError(f"{path}: needs the user id and at least one dimension as columns{_separator(table.columns)}")
    if table.empty:
        raise InputError(f"{path}: holds a header but no rows")
    ids = table.iloc[:, 0]
    for wrong, what in ((ids == "", "the user id is missing"), (ids.duplicated(), "the user id is a repeated one")):
        if wrong.any():
            raise _bad_row(path, wrong, f"{what} ({ids[wrong].iloc[0]})" if ids[wrong].iloc[0] else what)
    vectors = table.iloc[:, 1:].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    for wrong, what in ((~np.isfinite(vectors), "is not a finite number"), (np.abs(vectors) > LARGEST, "is too large")):
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            entry = table.iloc[row, 1 + column][:40]
            raise _bad_row(path, wrong.any(axis=1), f"column {table.columns[1 + column]}: {entry!r} {what}")
    return Preferences(ids.to_numpy(dtype=object), tuple(map(str, table.columns[1:])), vectors)


def draw_crowds(
    preferences: Preferences, num_users: int, seeds: Sequence[np.random.SeedSequence], *, first_users: bool = False
) -> Crowd:
    """Each run's own expert, crowd and model, from the run's seed, so that all that is compared starts from the same.

    The expert is one user at random and leaves the crowd; the model starts uniform in [0, 5]^d. The crowd is drawn
    from all users, or, with first_users (the original study), is what the expert leaves of the first num_users + 1.
    Raises InputError where there are too few users.
    """
    available, d = preferences.vectors.shape
    check_enough_users(preferences, num_users)
    members = np.empty((len(seeds), num_users + 1), dtype=int)
    models = np.empty((len(seeds), d))
    for run, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        pool = num_users + 1 if first_users else available
        members[run] = rng.permutation(pool)[: num_users + 1]
        models[run] = rng.uniform(0, 5, d)
    members[:, 1:].sort(axis=1)
    vectors = preferences.vectors[members]
    return Crowd(preferences.user_ids[members[:, 1:]], vectors[:, 1:], vectors[:, 0], models)


def check_enough_users(preferences: Preferences, num_users: int) -> None:
    """Raises InputError where a crowd and an expert are more than the data hold."""
    have = len(preferences.user_ids)
    if num_users >= have:
        raise InputError(f"{num_users} users: the data hold {have} users; at most {have - 1} and an expert")


def _read_csv(path: str | Path, kinds: Any, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """The file's columns (all, or the named ones) in the given kinds, empty cells as empty text."""
    names = _column_names(path)
    for name in columns or ():
        if name not in names:
            raise InputError(f"{path}: no column {name}; found {', '.join(names[:8])}{_separator(names)}")
    options: dict[str, Any] = {"usecols": columns, "dtype": kinds, "keep_default_na": False, "index_col": None}
    with _reading(path):
        table: pd.DataFrame = pd.read_csv(
            path, encoding="utf-8-sig", compression=_compression(path), header=0, names=names, **options
        )
    return table


def _column_names(path: str | Path) -> list[str]:
    """The header's names, and for R's write.table an empty one for the ids. Raises InputError where they are none."""
    with _reading(path):
        records = [fields for _, fields in islice(_records(path), 2)]
    if not records:
        raise InputError(f"{path}: the file is empty")
    names = records[0]
    fields = len(records[1]) if len(records) > 1 else len(names)
    if fields == len(names) + 1 and records[1][-1] != "":
        names = ["", *names]
    elif fields > len(names) or (len(names) > 1 and names[-1] == ""):
        raise InputError(f"{path}: has a delimiter at each line's end; remove it, or name the last column")
    if _is_number(records[0][0]):
        raise InputError(f"{path}: line 1 is no header: it begins with the number {records[0][0]}; add names")
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InputError(f"{path}: column {repeated[0]} stands twice; rename or remove one")
    return names


def _records(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """(line that a record begins on, as an editor counts; its fields) of the records that are not blank."""
    opened = gzip.open if _compression(path) else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        before = 0
        for fields in reader:
            if len(fields) > 1 or (fields and fields[0].strip()):
                yield before + 1, fields
            before = reader.line_num


def _bad_row(path: str | Path, wrong: Any, what: str) -> InputError:
    """The error that names the line of the first True among the rows."""
    row = int(np.asarray(wrong).argmax())
    line = next((line for line, _ in islice(_records(path), row + 1, None)), row + 2)  # the header is a record too
    return InputError(f"{path}: line {line}: {what}")


def _compression(path: str | Path) -> Any:
    # By name, and no other kind: pandas would unpack archives too.
    return "gzip" if str(path).lower().endswith(".gz") else None


def _separator(names: Iterable[str]) -> str:
    """What a header that holds other separators is told."""
    other = next((name for mark, name in ((";", "semicolons"), ("\t", "tabs")) if any(mark in n for n in names)), None)
    return f"; its columns are separated by {other}: save it with commas" if other else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """What reading raises becomes an InputError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pd.errors.ParserError, csv.Error, UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from None


def _read_columns(path: str | Path, kinds: dict[str, str]) -> pd.DataFrame:
    """The named columns in the given kinds; at least one row."""
    try:
        table = _read_csv(path, kinds, list(kinds))
    except (ValueError, OverflowError):
        table = _read_csv(path, dict.fromkeys(kinds, "str"), list(kinds))
        for name, kind in kinds.items():
            if not kind.startswith(("int", "float")):
                continue
            number = pd.to_numeric(table[name], errors="coerce")
            whole = kind.startswith("int")
            wrong = number.isna() | (whole & (number % 1 != 0))
            if wrong.any():
                what = "whole number" if whole else "number"
                raise _bad_row(path, wrong, f"{name} {table[name][wrong].iloc[0]!r} is not a {what}") from None
        raise InputError(f"{path}: a number is too large for its column") from None
    if table.empty:
        raise InputError(f"{path}: holds a header but no rows")
    return table
