"""Users as vectors: mean ratings by genre from GroupLens files, or a ready matrix."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse

from experiment.errors import InputError

NO_GENRES = "(no genres listed)"
LOWEST_RATING, HIGHEST_RATING = 0.5, 5.0


@dataclass(frozen=True)
class Preferences:
    """user_ids: (n,). dimensions: d names. vectors: (n, d)."""

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
    original study did. Raises InputError, naming the file and the row, for anything else.
    """
    genres = _read_columns(movies, {"movieId": "int64", "genres": "str"})
    table = _read_columns(ratings, {"userId": "int64", "movieId": "int64", "rating": "float32"})
    indicator = genres["genres"].str.get_dummies("|")
    if not keep_no_genres:
        indicator = indicator.drop(columns=NO_GENRES, errors="ignore")
    if indicator.empty:
        raise InputError(f"{movies}: no movie has a genre; needs at least one")
    if genres["movieId"].duplicated().any():
        twice = genres["movieId"][genres["movieId"].duplicated()].iloc[0]
        raise InputError(f"{movies}: movie {twice} stands twice; remove one")
    rating = table["rating"].to_numpy()
    wrong = ~((rating >= LOWEST_RATING) & (rating <= HIGHEST_RATING))
    if wrong.any():
        raise InputError(f"{ratings}: row {_row(wrong)}: rating {rating[wrong][0]:g} is not within 0.5 to 5")
    movie = pd.Index(genres["movieId"]).get_indexer(pd.Index(table["movieId"]))
    if (movie < 0).any():
        unknown = table["movieId"].to_numpy()[movie < 0][0]
        raise InputError(f"{ratings}: row {_row(movie < 0)}: movie {unknown} is not in {movies}")
    user_ids, user = np.unique(table["userId"].to_numpy(), return_inverse=True)
    pair = user * np.int64(len(genres)) + movie
    order = np.argsort(pair, kind="stable")
    again = np.flatnonzero(np.diff(pair[order]) == 0)
    if len(again):
        row = order[again + 1].min()
        raise InputError(
            f"{ratings}: row {row + 2}: user {table['userId'].iloc[row]} rates movie {table['movieId'].iloc[row]} "
            "a second time; keep one of the two"
        )
    shape = (len(user_ids), len(genres))
    flags = indicator.to_numpy(dtype=np.float64)
    sums = scipy.sparse.csr_array((rating.astype(np.float64), (user, movie)), shape=shape) @ flags
    counts = scipy.sparse.csr_array((np.ones(len(rating)), (user, movie)), shape=shape) @ flags
    vectors = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return Preferences(user_ids, tuple(indicator.columns), vectors)


def read_matrix(path: str | Path) -> Preferences:
    """A user x dimension matrix: a header, then one row a user, the user's id first. .csv or .csv.gz.

    Raises InputError, naming the file and the row, where ids repeat or an entry is not a finite number.
    """
    table = _read_csv(path)
    if table.shape[1] < 2:
        raise InputError(f"{path}: needs the user id and at least one dimension as columns")
    if table.empty:
        raise InputError(f"{path}: holds a header but no rows")
    ids = table.iloc[:, 0]
    if ids.duplicated().any() or ids.isna().any():
        raise InputError(f"{path}: row {_row((ids.duplicated() | ids.isna()).to_numpy())}: user id missing or repeated")
    columns = table.iloc[:, 1:].apply(pd.to_numeric, errors="coerce")
    vectors = columns.to_numpy(dtype=np.float64)
    wrong = ~np.isfinite(vectors)
    if wrong.any():
        column = table.columns[1 + int(wrong.any(axis=0).argmax())]
        first = wrong[:, list(table.columns).index(column) - 1]
        raise InputError(f"{path}: row {_row(first)}: column {column} is not a finite number")
    return Preferences(ids.to_numpy(), tuple(str(name) for name in columns.columns), vectors)


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
        raise InputError(f"--num-users {num_users}: the data hold {have} users; at most {have - 1} and an expert")


def _read_csv(path: str | Path, **options: object) -> pd.DataFrame:
    # By name, and no other kind: pandas would unpack archives too.
    compression = "gzip" if str(path).lower().endswith(".gz") else None
    try:
        return pd.read_csv(path, encoding="utf-8-sig", compression=compression, **options)  # type: ignore[call-overload, no-any-return]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: the file is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from None


def _read_columns(path: str | Path, types: dict[str, str]) -> pd.DataFrame:
    """The named columns in the given types; complete, at least one row."""
    header = _read_csv(path, nrows=0)
    for name in types:
        if name not in header.columns:
            raise InputError(f"{path}: no column {name}; found {', '.join(map(str, header.columns[:8]))}")
    try:
        table = _read_csv(path, usecols=list(types), dtype=types, keep_default_na=False)
    except (ValueError, OverflowError):
        table = _read_csv(path, usecols=list(types), dtype="str", keep_default_na=False)
        for name, kind in types.items():
            if kind == "str":
                continue
            number = pd.to_numeric(table[name], errors="coerce")
            whole = kind.startswith("int")
            wrong = number.isna() | (whole & (number % 1 != 0))
            if wrong.any():
                what = "whole number" if whole else "number"
                raise InputError(
                    f"{path}: row {_row(wrong.to_numpy())}: {name} {table[name][wrong].iloc[0]!r} is not a {what}"
                ) from None
        raise InputError(f"{path}: a number is too large for its column") from None
    if table.empty:
        raise InputError(f"{path}: holds a header but no rows")
    return table


def _row(wrong: np.ndarray) -> int:
    """The line in the file of the first True (the header is line 1)."""
    return int(wrong.argmax()) + 2
