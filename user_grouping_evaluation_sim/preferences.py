"""Users as vectors: mean ratings by genre from GroupLens files, or a ready matrix."""

import contextlib
import csv
import gzip
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse

from experiment.errors import InputError

NO_GENRES = "(no genres listed)"
LOWEST_RATING, HIGHEST_RATING = 0.5, 5.0
LARGEST = 1e70  # of a matrix's entries: squares of sums of squares stay finite
WHOLE = re.compile(r"0*([0-9]+)(?:\.0+)?")  # 7, and as programs also write it, 7.0 or 007
MOST_DIGITS = 18  # of a movie's id: what fits into 64 bits
ID_NAMES = ("user", "users", "userid", "user_id", "user id", "id")
QUOTE = "; quote what holds a comma, write decimals with a point"


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
    movie_ids, indicator = _read_movies(movies)
    if not keep_no_genres:
        indicator = indicator.drop(columns=NO_GENRES, errors="ignore")
    if indicator.empty:
        raise InputError(f"{movies}: no movie has a genre; needs at least one")
    table = _read_ratings(ratings)
    rating = table["rating"].to_numpy()
    wrong = ~((rating >= LOWEST_RATING) & (rating <= HIGHEST_RATING))
    if wrong.any():
        raise _bad_row(ratings, wrong, f"rating {rating[wrong][0]:g} is not within 0.5 to 5")
    movie = movie_ids.get_indexer(pd.Index(table["movieId"]))
    if (movie < 0).any():
        unknown = table["movieId"].to_numpy()[movie < 0][0]
        raise _bad_row(ratings, movie < 0, f"movie {unknown} is not in {movies}")
    codes, found = pd.factorize(table.pop("userId").to_numpy(dtype=object))
    names = [str(name).strip() for name in found]
    if "" in names:
        raise _bad_row(ratings, np.array([not name for name in names])[codes], "userId is missing")
    user_ids = sorted(set(names), key=_place)
    _refuse_two_spellings(ratings, user_ids)
    number = {name: i for i, name in enumerate(user_ids)}
    user = np.array([number[name] for name in names])[codes]
    pair = user * np.int64(len(movie_ids)) + movie
    rows = np.argsort(pair, kind="stable")
    again = np.zeros(len(pair), dtype=bool)
    again[rows[1:]] = np.diff(pair[rows]) == 0
    if again.any():
        first = int(again.argmax())
        what = f"user {user_ids[user[first]]} rates movie {movie_ids[movie[first]]} a second time"
        raise _bad_row(ratings, again, f"{what}; keep one of the two")
    shape = (len(user_ids), len(movie_ids))
    flags = indicator.to_numpy(dtype=np.float64)
    sums = scipy.sparse.csr_array((rating.astype(np.float64), (user, movie)), shape=shape) @ flags
    counts = scipy.sparse.csr_array((np.ones(len(user)), (user, movie)), shape=shape) @ flags
    vectors = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return Preferences(np.array(user_ids, dtype=object), tuple(indicator.columns), vectors)


def _read_movies(path: str | Path) -> tuple[pd.Index, pd.DataFrame]:
    """The movies' ids, and which genres (columns, by name) each has: 0 or 1."""
    names, lines, rows = _read_rows(path)
    _check_columns(path, names, ("movieId", "genres"))
    id_at, genres_at = names.index("movieId"), names.index("genres")
    ids: dict[int, None] = {}
    for line, row in zip(lines, rows, strict=True):
        match = WHOLE.fullmatch(row[id_at].strip())
        if not match or len(match[1]) > MOST_DIGITS:
            raise InputError(f"{path}: line {line}: movieId {row[id_at][:40]!r} is not a whole number, or too large")
        if int(match[1]) in ids:
            raise InputError(f"{path}: line {line}: movie {match[1]} stands twice; remove one")
        ids[int(match[1])] = None
    genres = pd.Series(["|".join(name.strip() for name in row[genres_at].split("|")) for row in rows])
    return pd.Index(list(ids)), genres.str.get_dummies("|")


def _read_ratings(path: str | Path) -> pd.DataFrame:
    """Columns userId (text), movieId (whole numbers), rating (numbers)."""
    with contextlib.suppress(ValueError, OverflowError):
        return _read_columns(path, {"userId": "str", "movieId": "int64", "rating": "float32"})
    table = _read_columns(path, dict.fromkeys(("userId", "movieId", "rating"), "str")).fillna("")
    whole = table["movieId"].str.strip().str.fullmatch(WHOLE).to_numpy(dtype=bool)
    for name, wrong, what in (
        ("movieId", ~whole, "is not a whole number"),
        ("rating", np.isnan(_numbers(table["rating"])), "is not a number"),
        ("movieId", table["movieId"].str.len().to_numpy() > MOST_DIGITS, "is too large"),
    ):
        if wrong.any():
            raise _bad_row(path, wrong, f"{name} {table[name][wrong].iloc[0][:40]!r} {what}")
    raise InputError(f"{path}: cannot be read as CSV (its movieIds or ratings are numbers of an unknown form)")


def _numbers(entries: pd.Series) -> np.ndarray:
    """What the entries say, NaN where that is no number, True and False included. (n,) -> (n,)"""
    numbers = pd.to_numeric(entries, errors="coerce")
    return np.full(len(entries), np.nan) if numbers.dtype == bool else numbers.to_numpy(dtype=np.float64)


def _place(user: str) -> tuple[bool, int, str, str]:
    """Where an id comes: whole numbers by size, then others as text."""
    match = WHOLE.fullmatch(user)
    digits = match[1] if match else None
    return (digits is None, len(digits or ""), digits or "", user)


def _refuse_two_spellings(path: str | Path, user_ids: Sequence[str]) -> None:
    """7 and 7.0 in one file are one user whom some program has split in two."""
    known = set(user_ids)
    for user in user_ids:
        if WHOLE.fullmatch(user) and "." in user and (short := user.partition(".")[0]) in known:
            raise InputError(f"{path}: users {short} and {user} stand in one file; write an id in one way")


def read_matrix(path: str | Path) -> Preferences:
    """A user x dimension matrix: a header, then one row a user, the user's id (text, as written) first. .csv, .csv.gz.

    Raises InputError, naming the file and the line, where ids repeat or an entry is not a finite number, or so large
    that distances would overflow.
    """
    names, lines, rows = _read_rows(path)
    dimensions = names[1:]
    if not dimensions:
        raise InputError(f"{path}: needs the user id and at least one dimension as columns{_separator(names)}")
    counted = ([str(i + first) for i in range(len(dimensions))] for first in (0, 1))
    if names[0] and all(map(_is_number, dimensions)) and (len(dimensions) == 1 or dimensions not in counted):
        raise InputError(f"{path}: line 1 is no header: it holds the number {dimensions[0]}; add names")
    if ids_too := [name for name in dimensions if name.lower() in ID_NAMES]:
        raise InputError(f"{path}: column {ids_too[0]} is no dimension; make it the first column or remove it")
    ids = [row[0].strip() for row in rows]
    seen: set[str] = set()
    for line, user in zip(lines, ids, strict=True):
        if not user:
            raise InputError(f"{path}: line {line}: the user id is missing")
        if user in seen:
            raise InputError(f"{path}: line {line}: the user id is a repeated one ({user})")
        seen.add(user)
    _refuse_two_spellings(path, ids)
    entries = pd.DataFrame([row[1:] for row in rows], dtype=object)
    vectors = entries.apply(_numbers).to_numpy(dtype=np.float64)
    for wrong, what in ((~np.isfinite(vectors), "is not a finite number"), (np.abs(vectors) > LARGEST, "is too large")):
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            entry = entries.iloc[row, column][:40]
            raise InputError(f"{path}: line {lines[row]}: column {dimensions[column]}: {entry!r} {what}")
    return Preferences(np.array(ids, dtype=object), tuple(dimensions), vectors)


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


def _read_columns(path: str | Path, kinds: dict[str, str]) -> pd.DataFrame:
    """The named columns, in the given kinds, of a file of many rows. Raises ValueError where an entry is of another."""
    names = _column_names(path, [fields for _, fields in islice(_records(path), 2)])
    _check_columns(path, names, list(kinds))
    try:
        with _reading(path):
            table: pd.DataFrame = pd.read_csv(  # type: ignore[call-overload]
                path,
                encoding="utf-8-sig",
                compression="gzip" if _is_gzip(path) else None,  # by name: pandas would unpack archives too
                header=0,
                names=names,
                # All columns, as pandas is silent about rows that are too long where it is told to skip some.
                dtype={name: kinds.get(name, "S1") for name in names},
                index_col=None,
                keep_default_na=False,
            )
    except pd.errors.ParserError as error:
        for line, fields in _records(path):
            _check_length(path, line, fields, names)
        raise InputError(f"{path}: cannot be read as CSV ({str(error).strip()})") from None
    if table.empty:
        raise InputError(f"{path}: holds a header but no rows")
    return table[list(kinds)]


def _read_rows(path: str | Path) -> tuple[list[str], list[int], list[list[str]]]:
    """The columns' names, and for each row its line and its fields, as many as there are names; at least one row."""
    records = list(_records(path))
    names = _column_names(path, [fields for _, fields in records[:2]])
    for line, fields in records[1:]:
        _check_length(path, line, fields, names)
    if len(records) == 1:
        raise InputError(f"{path}: holds a header but no rows")
    lines, rows = zip(*records[1:], strict=True)
    return names, list(lines), list(rows)


def _column_names(path: str | Path, first_records: Sequence[list[str]]) -> list[str]:
    """The header's names. Raises InputError where they are none, or where the first row has more fields.

    R's write.table leaves such a header. It is refused: a decimal comma does the same to a row, and would be misread.
    """
    if not first_records:
        raise InputError(f"{path}: the file is empty")
    header, row = first_records[0], first_records[-1]
    names = [name.strip() for name in header]
    if (len(row) == len(names) + 1 and not row[-1].strip()) or (len(names) > 1 and not names[-1]):
        raise InputError(f"{path}: has a delimiter at each line's end; remove it, or name the last column")
    if _is_number(names[0]):
        raise InputError(f"{path}: line 1 is no header: it begins with the number {names[0]}; add names")
    if len(row) > len(names):
        hint = _separator(names) or f"{QUOTE}; give the column of ids a name too (R: col.names = NA)"
        raise InputError(f"{path}: the first row has {len(row)} fields where the header has {len(names)}{hint}")
    if repeated := [name for i, name in enumerate(names) if name in names[:i] or (i and not name)]:
        what = f"column {repeated[0]} stands twice" if repeated[0] else "a column has no name"
        raise InputError(f"{path}: {what}; rename or remove one")
    return names


def _check_length(path: str | Path, line: int, fields: Sequence[str], names: Sequence[str]) -> None:
    if len(fields) != len(names):
        hint = QUOTE if len(fields) > len(names) else ""
        raise InputError(f"{path}: line {line}: {len(fields)} fields where the header has {len(names)}{hint}")


def _check_columns(path: str | Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise InputError(f"{path}: no column {name}; found {', '.join(names[:8])}{_separator(names)}")


def _records(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """(line that a record begins on, as an editor counts; its fields) of the records that are not blank."""
    opened = gzip.open if _is_gzip(path) else open
    with _reading(path):
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe can be read only once
            raise InputError(f"{path}: cannot be read as CSV (a folder, pipe or device; give a file)")
    with _reading(path), opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        before = 0
        try:
            for fields in reader:
                if len(fields) > 1 or (fields and fields[0].strip()):
                    yield before + 1, fields
                before = reader.line_num
        except csv.Error as error:
            raise InputError(f"{path}: line {before + 1}: cannot be read as CSV ({error})") from None


def _bad_row(path: str | Path, wrong: np.ndarray, what: str) -> InputError:
    """The error that names the line of the first True among the rows (n,)."""
    row = int(wrong.argmax())
    line = next((line for line, _ in islice(_records(path), row + 1, None)), row + 2)  # the header is a record too
    return InputError(f"{path}: line {line}: {what}")


def _is_gzip(path: str | Path) -> bool:
    return str(path).lower().endswith(".gz")


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


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """What reading raises becomes an InputError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read as CSV (not UTF-8: save it as UTF-8)") from None
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({str(error).strip()})") from None
