"""Readers, given anything: they read it, or say in one line what is wrong; they never fail in another way."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment.errors import InputError
from experiment.run_folder import load_arrays, open_run
from experiment.verify import read_record
from point_in_space_sim.corpus import load_corpus
from point_in_space_sim.engine.fine_tuning import load_adapter
from point_in_space_sim.target import parse_mixture
from user_grouping_evaluation_sim.preferences import read_matrix, read_movielens

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Cells as people and programs write them, and worse.
CELLS = st.one_of(
    st.sampled_from(
        [
            "1",
            "2",
            "3.5",
            "-1",
            "0",
            "nan",
            "inf",
            "1e999",
            "",
            " ",
            "Drama|Comedy",
            "joy",
            '"',
            "\0",
            "é",
            "1,5",
            "a\nb",
            "a\r\nb",
            "\ufeff",
            "9" * 30,
            "None",
            "True",
            "0x1",
        ]
    ),
    st.text(max_size=6),
    st.integers(-3, 6).map(str),
    st.floats(allow_nan=False, width=16).map(repr),
)
HEADERS = st.permutations(["userId", "movieId", "rating", "genres", "text", "emotion"])
ROWS = st.lists(st.lists(CELLS, min_size=1, max_size=7), max_size=6)
BYTES = st.binary(max_size=300)


def as_csv(header, rows, line_end="\n"):
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=line_end)
    writer.writerows([header, *rows])
    return file.getvalue().encode("utf-8", errors="surrogatepass")


TABLES = st.builds(as_csv, HEADERS, ROWS, st.sampled_from(["\n", "\r\n", "\r"]))
CONTENTS = st.one_of(BYTES, TABLES, TABLES.map(lambda table: b"\xef\xbb\xbf" + table), TABLES.map(lambda t: t[:-3]))


def assert_one_line(error):
    text = " ".join(str(error).split())
    assert text and len(text) < 3000


@QUICK
@given(content=CONTENTS, name=st.sampled_from(["m.csv", "m.csv.gz", "m.zip"]))
def test_matrices(content, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    try:
        preferences = read_matrix(path)
    except InputError as error:
        assert str(path) in str(error)
        assert_one_line(error)
    else:
        assert preferences.vectors.shape == (len(preferences.user_ids), len(preferences.dimensions))
        assert np.isfinite(preferences.vectors).all()
        assert len(set(preferences.user_ids)) == len(preferences.user_ids) > 0


@QUICK
@given(ratings=CONTENTS, movies=CONTENTS)
def test_movielens(ratings, movies, tmp_path):
    paths = tmp_path / "ratings.csv", tmp_path / "movies.csv"
    for path, content in zip(paths, (ratings, movies), strict=True):
        path.write_bytes(content)
    try:
        preferences = read_movielens(*paths)
    except InputError as error:
        assert any(str(path) in str(error) for path in paths)
        assert_one_line(error)
    else:
        assert ((preferences.vectors >= 0) & (preferences.vectors <= 5)).all()


@QUICK
@given(
    rows=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.5, 5, 5.5])), max_size=8),
    genres=st.lists(st.sampled_from(["A", "A|B", "", "(no genres listed)"]), min_size=1, max_size=4),
)
def test_movielens_against_plain_means(rows, genres, tmp_path):
    """What is read is the mean by user and genre, computed the slow way; what is refused has a reason."""
    (tmp_path / "movies.csv").write_bytes(as_csv(["movieId", "genres"], [(i + 1, g) for i, g in enumerate(genres)]))
    (tmp_path / "ratings.csv").write_bytes(as_csv(["userId", "movieId", "rating"], rows))
    names = sorted({name for entry in genres for name in entry.split("|")} - {"", "(no genres listed)"})
    pairs = [row[:2] for row in rows]
    good = rows and names and len(set(pairs)) == len(pairs)
    good = good and all(0.5 <= rating <= 5 and movie <= len(genres) for _, movie, rating in rows)
    try:
        preferences = read_movielens(tmp_path / "ratings.csv", tmp_path / "movies.csv")
    except InputError:
        assert not good
        return
    assert good
    for user, vector in zip(preferences.user_ids, preferences.vectors, strict=True):
        for name, value in zip(preferences.dimensions, vector, strict=True):
            own = [rating for who, movie, rating in rows if str(who) == user and name in genres[movie - 1].split("|")]
            assert value == pytest.approx(np.mean(own) if own else 0)


@QUICK
@given(content=CONTENTS, name=st.sampled_from(["c.csv", "c.tsv"]))
def test_corpora(content, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    try:
        corpus = load_corpus(path)
    except InputError as error:
        assert str(path) in str(error)
        assert_one_line(error)
    else:
        assert len(set(corpus.texts)) == len(corpus.texts) >= 2
        assert all(text == text.strip() and text for text in corpus.texts)


@QUICK
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20), min_size=2))
def test_corpora_keep_every_text(texts, tmp_path):
    path = tmp_path / "c.csv"
    path.write_bytes(as_csv(["text"], [[text] for text in texts]))
    wanted = list(dict.fromkeys(text.strip() for text in texts))
    try:
        assert list(load_corpus(path).texts) == wanted
    except InputError:
        printable = [any(c.isprintable() and not c.isspace() for c in text) for text in wanted]
        assert len(wanted) < 2 or not all(printable)


@QUICK
@given(
    text=st.one_of(
        st.text(max_size=30),
        st.lists(st.tuples(st.sampled_from(["joy", "fear", "joi", ""]), CELLS)).map(
            lambda pairs: ",".join(f"{name}={value}" for name, value in pairs)
        ),
    )
)
def test_mixtures(text):
    try:
        weights = parse_mixture(text)
    except InputError as error:
        assert_one_line(error)
    else:
        assert weights and all(0 < weight <= 1 for weight in weights.values())


@QUICK
@given(content=BYTES)
def test_parts_and_records(content, tmp_path):
    (tmp_path / "part.npz").write_bytes(content)
    assert load_arrays(tmp_path / "part.npz") is None
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "part.npz").unlink()
    try:
        read_record(tmp_path)
    except InputError as error:
        assert_one_line(error)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError), open_run(tmp_path, {"seed": 1}, overwrite=False, resume=True):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@settings(QUICK, max_examples=15)
@given(config=st.one_of(BYTES, st.just(b'{"peft_type": "LORA"}'), st.just(b'{"peft_type": "NO"}')), weights=BYTES)
def test_adapters(config, weights, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(InputError) as caught:
        load_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


@QUICK
@given(
    record=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    )
)
def test_records_of_any_json(record, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(record))
    if isinstance(record, dict):
        assert read_record(tmp_path) == record
    else:
        with pytest.raises(InputError):
            read_record(tmp_path)
