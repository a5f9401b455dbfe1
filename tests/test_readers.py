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
from point_in_space_sim import corpus
from point_in_space_sim.corpus import EMOTIONS, load_corpus, read_comments, read_goemotions
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


# ------------------------------------------------------------------ corpora


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_shipped_comments():
    shipped = load_corpus()
    assert len(shipped) == 2900
    assert shipped.name == "comments"
    counts = {emotion: shipped.emotions.count((emotion,)) for emotion in EMOTIONS}
    assert counts == dict.fromkeys(EMOTIONS, 100) | {"neutral": 200}
    assert all(text == text.strip() and "\n" not in text for text in shipped.texts)
    assert len(set(shipped.texts)) == 2900


def test_goemotions_tsv_keeps_quotes_and_reads_several_labels(tmp_path):
    path = write(tmp_path / "train.tsv", 'He said "no\t2,27\teeb\n\u201cLove\x85it\u201d\t18\teec\n')
    loaded = load_corpus(path)
    assert loaded.texts == ('He said "no', "\u201cLove\x85it\u201d")
    assert loaded.emotions == (("anger", "neutral"), ("love",))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_with_byte_order_mark_and_either_line_end(tmp_path, line_end, mark):
    rows = ["id,text", '1,"Well, yes."', "2, No. "]
    loaded = load_corpus(write(tmp_path / "own.csv", mark + line_end.join(rows) + line_end))
    assert loaded.texts == ("Well, yes.", "No.")
    assert loaded.emotions == ((), ())


def test_duplicates_are_left_out_and_their_labels_joined(tmp_path):
    path = write(tmp_path / "train.tsv", "Same\t0\ta\nOther\t27\tb\nSame \t17,0\tc\n")
    loaded = load_corpus(path)
    assert loaded.texts == ("Same", "Other")
    assert loaded.emotions == (("admiration", "joy"), ("neutral",))
    assert len(read_goemotions(path)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "line 1: 1 tab-separated fields"),
        ("a.tsv", "Hi\t27\ta\nBye\t27\n", "line 2: 2 tab-separated fields"),
        ("a.tsv", "Hi\t27\ta\nBye\t28\tb\n", "line 2: label indices '28' are not within 0 to 27"),
        ("a.tsv", "Hi\tjoy\ta\n", "line 1: label indices 'joy' are not numbers"),
        ("a.tsv", "Hi\t27\ta\n \t27\tb\n", "line 2: no text"),
        ("a.tsv", "Hi\t27\ta\n", "1 distinct comments"),
        ("a.tsv", b"Hi\t27\ta\nCaf\xe9\t27\tb\n", "line 2: not UTF-8"),
        ("a.csv", "", "no column `text`"),
        ("a.csv", "text\n", "0 distinct comments"),
        ("a.csv", "text\nHi\n", "1 distinct comments"),
        ("a.csv", "text\nHi\nHi\n", "1 distinct comments"),
        ("a.csv", "comment,emotion\nHi,joy\n", "line 1: no column `text` (columns: comment, emotion)"),
        ("a.csv", "text,emotion\nHi,joy\n,joy\n", "line 3: no text"),
        ("a.csv", "text\nHi\n\u200b\n", "line 3: no text"),
        ("a.csv", "text\nHi\nA\0B\n", "line 3: no text"),
        ("a.csv", "text\nHi, there\n", "line 2: more fields"),
        ("a.csv", "text,text\nHi,there\nOh,no\n", "line 1: column `text` stands twice"),
        ("a.csv", "text,user, user\nHi,1,2\nOh,1,2\n", "line 1: column `user` stands twice"),
        ("a.csv", "emotion,text\njoy,Hi\njoy\n", "line 3: no `text`"),
        ("a.csv", 'text\nHi\n"open\n', "not valid CSV"),
        ("a.csv", b"text\nHi\n\xff\n", "line 3: not UTF-8"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_the_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        load_corpus(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for source in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_corpus(source)


def test_go_emotions_without_hub_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "hub_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"fetch train\.tsv from .*goemotions/data"):
        load_corpus("go_emotions")


def test_comments_rows_keep_duplicates(tmp_path):
    rows = read_comments(write(tmp_path / "own.csv", "emotion,text\njoy,Hi\n,Hi\n"))
    assert rows == [("Hi", ("joy",), ""), ("Hi", (), "")]


def test_labels_of_other_sets_are_none_and_owners_are_kept(tmp_path):
    rows = "user, text,emotion\n007,Hi,glee\nNA,Bye,joy\n7,Hi,joy\n007 ,Hi,\n,Well,\n"
    loaded = load_corpus(write(tmp_path / "own.csv", rows))
    assert loaded.texts == ("Hi", "Bye", "Well")
    assert loaded.emotions == (("joy",), ("joy",), ())
    assert loaded.owners == (("007", "7"), ("NA",), ())
