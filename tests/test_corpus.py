"""The corpus readers and what they refuse."""

import pytest

from experiment.errors import InputError
from point_in_space_sim import corpus
from point_in_space_sim.corpus import EMOTIONS, load_corpus, read_comments, read_goemotions


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
