"""Crowds: reading people and their texts, who holds what in real and simulated crowds, near-duplicates, refusals."""

import json
import re
import zipfile
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowd_fine_tuning_sim import crowds
from crowd_fine_tuning_sim.crowds import (
    KINDS,
    Person,
    Source,
    clean,
    cut,
    eligible,
    load_source,
    near_duplicates,
    read_chitchat,
    real_crowd,
    simulated_crowd,
    taken_for,
)
from experiment.errors import InputError
from point_in_space_sim.corpus import EMOTIONS, load_corpus
from point_in_space_sim.engine.assets import PinnedWheel

JOY = EMOTIONS.index("joy")


def map_texts(texts):
    """Vectors in which the word `emotion:strength` of a text stands for itself, and a hash for the rest."""
    vectors = []
    for text in texts:
        noise = np.frombuffer(sha256(text.encode()).digest()[:28], dtype=np.uint8) / 255 * 0.02
        for emotion, strength in re.findall(r"(\w+):([0-9]+)", text):
            noise[EMOTIONS.index(emotion)] += int(strength) / 100
        vectors.append(noise)
    return np.array(vectors, dtype=np.float32).reshape(len(texts), 28)


def corpus(each=60, emotions=EMOTIONS):
    """A source without people: as many texts near each emotion, of falling strength."""
    texts = tuple(f"{emotion}:{90 - i} comment {i}" for emotion in emotions for i in range(each))
    return Source("tiny", "0" * 64, (), texts)


def crowd_of(sizes, emotion="joy"):
    people = tuple(
        Person(f"p{i}", "real", tuple(f"{emotion}:{50 + k % 40} from {i} number {k}" for k in range(size)))
        for i, size in enumerate(sizes)
    )
    return Source("tiny", "0" * 64, people)


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refusal(call, *arguments, **named):
    with pytest.raises(InputError) as error:
        call(*arguments, **named)
    told = str(error.value)
    assert "\n" not in told
    return told


# Reading

ROWS = [("ann", "Good  day"), ("bob", "Hello, you"), ("ann", "Good day"), ("ann", " "), ("bob", "Good day")]
PEOPLE = (Person("ann", "real", ("Good day",)), Person("bob", "real", ("Hello, you", "Good day")))


def as_chat(user, text):
    turns = [{"role": "assistant", "content": "no"}, {"role": "user", "content": "and?"}]
    return {"user": user, "messages": [*turns, {"role": "assistant", "content": text}, {"role": "user", "content": ""}]}


FORMS = {
    "a.csv": "user,n,text\n" + "".join(f'{user},1,"{text}"\n' for user, text in ROWS),
    "b.TSV": "text\tuser\n" + "".join(f"{text}\t{user}\n" for user, text in ROWS),
    "c.jsonl": "".join(json.dumps({"user": user, "text": text}) + "\n" for user, text in ROWS),
    "d.jsonl": "\n\n".join(json.dumps(as_chat(user, text)) for user, text in ROWS),
}


@pytest.mark.parametrize("change", ["", "bom", "crlf", "no final newline", "blank lines"])
@pytest.mark.parametrize("name", FORMS)
def test_files_of_every_form_give_the_same_people(tmp_path, name, change):
    content = FORMS[name]
    content = {
        "bom": "\ufeff" + content,
        "crlf": content.replace("\n", "\r\n"),
        "no final newline": content.rstrip("\n"),
        "blank lines": content.replace("\n", "\n\n"),
    }.get(change, content)
    got = load_source(written(tmp_path, name, content))
    assert (got.name, got.people, got.texts) == (name, PEOPLE, ())
    assert got.sha256 == sha256(content.encode()).hexdigest()


def test_columns_have_other_names_and_ids_are_numbers(tmp_path):
    rows = '{"who": 7, "said": "one"}\n{"who": "8", "said": "two"}\n'
    got = load_source(written(tmp_path, "a.jsonl", rows), user_column="who", text_column="said")
    assert [(person.name, person.texts) for person in got.people] == [("7", ("one",)), ("8", ("two",))]
    got = load_source(written(tmp_path, "a.csv", " who ,said\n7,one\n8,two\n"), user_column="who", text_column="said")
    assert [(person.name, person.texts) for person in got.people] == [("7", ("one",)), ("8", ("two",))]


def test_people_whose_texts_are_all_empty_are_left_out(tmp_path):
    got = load_source(written(tmp_path, "a.csv", "user,text\na,x\nb,y\nc,\u200b\nd, \n,\n"))
    assert [person.name for person in got.people] == ["a", "b"]


def test_texts_lose_control_characters_and_line_breaks():
    assert clean(" a\0b \x1b[31m\n\tc\u202e d\ud800\ufeff \x07 e\u2028f\x85") == "ab [31m c d e f"
    assert clean("👩‍🚀 café") == "👩‍🚀 café"


def test_essays_are_cut_at_sentence_ends(tmp_path):
    sentences = [" ".join([letter] * n) + "." for letter, n in (("a", 15), ("b", 25), ("c", 39), ("d", 3), ("e", 50))]
    essay = " ".join([*sentences, "F" * 3 + ' f f f f." Last one.'])
    assert cut(essay) == [
        f"{sentences[0]} {sentences[1]}",
        sentences[2],
        sentences[4],
        'FFF f f f f." Last one.',
    ]  # d is too short
    assert cut("Only two. Words") == ["Only two. Words"]
    assert [len(piece.split()) for piece in cut("w " * 60)] == [60]
    assert [len(piece.split()) for piece in cut("w " * 85)] == [40, 40, 5]
    got = load_source(written(tmp_path, "a.csv", f"user,text\nann,{essay.replace(chr(34), '')}\nbob,x\n"))
    assert [len(person.texts) for person in got.people] == [4, 1]


@given(st.lists(st.tuples(st.integers(1, 90), st.sampled_from(["", ".", "!", '."', "?)"])), max_size=12))
def test_pieces_are_the_words_in_order(parts):
    words = [word for n, end in parts for word in ["w"] * (n - 1) + [f"w{end}"]]
    words = [f"{i}{word}" for i, word in enumerate(words)]
    pieces = [piece.split() for piece in cut(" ".join(words))]
    kept = [word for piece in pieces for word in piece]
    if len(words) <= 40:
        assert kept == words
    else:
        assert all(4 <= len(piece) <= 60 for piece in pieces)
        left = iter(words)
        assert all(word in left for word in kept)
        assert len(words) - len(kept) <= 3 * len(parts)


def chat(*turns):
    """A conversation; turns: (sender, message, ...)."""
    messages = [[{"sender": who, "text": text, "timestamp": ""} for text in texts] for who, *texts in turns]
    return {"messages": messages, "start": "2018"}


CHITCHAT = {
    "c1": chat(
        ("a", "Hello there", "how  are\nyou today?"),
        ("b", "too short this"),
        ("a", "Hello there how", "are you today?"),
        ("b", "four words are enough"),
        ("b", "and they join"),
    ),
    "c2": chat(("b", "I was born in 2018 I think"), ("c", "write to me at a@b.example please")),
    "c3": chat(("c", "see https://x.example for the rest"), ("a", "call me at 555 123-4567 tonight"), ("c", "w " * 41)),
    "c4": chat(("c", "look at example.com for the rest"), ("d",), ("c", "w " * 40)),
}


def test_chitchat_is_cut(tmp_path):
    path = written(tmp_path, "dataset.json", json.dumps(CHITCHAT))
    got = read_chitchat(path)
    assert got.name == "chitchat"
    assert {person.name: person.texts for person in got.people} == {
        "a": ("Hello there how are you today?",),
        "b": ("four words are enough and they join", "I was born in 2018 I think"),
    }
    assert {person.kind for person in got.people} == {"real"}
    assert got.sha256 == sha256(json.dumps(CHITCHAT).encode()).hexdigest()


def test_chitchat_comes_from_its_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = json.dumps(CHITCHAT).encode()
    (tmp_path / "crowd_sft").mkdir()
    archive = tmp_path / "crowd_sft" / crowds.CHITCHAT_WHEEL.file_name
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("chitchat_dataset/dataset.json", content)
    pins = {"chitchat_dataset/dataset.json": sha256(content).hexdigest()}
    wheel = PinnedWheel("chitchat-dataset", "0.9.0", sha256(archive.read_bytes()).hexdigest(), pins)
    monkeypatch.setattr(crowds, "CHITCHAT_WHEEL", wheel)
    assert (
        load_source("chitchat").people
        == read_chitchat(tmp_path / "crowd_sft/chitchat-dataset-0.9.0/dataset.json").people
    )


def test_the_shipped_corpus_has_no_people():
    got, shipped = load_source("shipped"), load_corpus("shipped")
    assert (got.name, got.sha256, got.people, got.texts) == ("shipped", shipped.sha256, (), shipped.texts)


def test_eligible_people_have_enough_texts():
    source = crowd_of([3, 1, 4])
    assert [len(eligible(source, n)) for n in (1, 3, 4, 5)] == [3, 2, 1, 0]


# Real crowds


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=4, max_size=12),
    st.integers(2, 4),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 99),
)
def test_real_crowds(sizes, num_users, texts_per_user, neighbours, seed):
    source = crowd_of(sizes)
    arguments = (source, "joy", num_users, texts_per_user, neighbours, map_texts)
    if len(eligible(source, texts_per_user)) < num_users or sum(sizes) - num_users * texts_per_user <= neighbours:
        refusal(real_crowd, *arguments, np.random.default_rng(seed))
        return
    got = real_crowd(*arguments, np.random.default_rng(seed))
    whole = {person.name: person for person in source.people}
    assert len({person.name for person in got.people}) == num_users
    for person, vectors in zip(got.people, got.vectors, strict=True):
        assert person.kind == "real" and len(set(person.texts)) == texts_per_user
        assert set(person.texts) <= set(whole[person.name].texts)
        np.testing.assert_array_equal(vectors, map_texts(person.texts))
    held = {text for person in got.people for text in person.texts}
    names = {person.name for person in got.people}
    outside = [text for person in source.people if person.name not in names for text in person.texts]
    if len(outside) <= neighbours:
        outside = [text for person in source.people for text in person.texts if text not in held]
    vectors = map_texts(outside)
    best = vectors[vectors[:, JOY].argmax()]
    order = np.argsort(np.linalg.norm(vectors.astype(float) - best, axis=1), kind="stable")
    assert set(got.near_texts) == {outside[i] for i in order[1 : neighbours + 1]}  # the target itself is left out
    np.testing.assert_array_equal(got.near, map_texts(got.near_texts))
    np.testing.assert_allclose(got.centroid, got.near.astype(float).mean(axis=0))
    assert got.centroid.shape == (28,) and got.target == "joy"
    again = real_crowd(*arguments, np.random.default_rng(seed))
    assert (again.people, again.near_texts) == (got.people, got.near_texts)


def test_what_the_crowd_holds_in_other_letter_case_is_not_held_out():
    texts = [f"joy:80 I am {i}" for i in range(3)]
    echo = Person("b", "real", tuple(text.replace("I am", "i AM!") for text in texts))
    others = tuple(f"joy:70 me too {i}" for i in range(4))
    source = Source("tiny", "", (Person("a", "real", tuple(texts)), echo, Person("c", "real", others)))
    for seed in range(9):
        try:
            got = real_crowd(source, "joy", 2, 3, 3, map_texts, np.random.default_rng(seed))
        except InputError as error:  # c is in the crowd, and what is not, says what a or b says
            assert "1 texts are held by nobody" in str(error)
        else:
            assert {person.name for person in got.people} == {"a", "b"}
            assert set(got.near_texts) < set(others)
            break
    else:
        pytest.fail("a and b never drawn")


def test_at_most_3000_texts_are_held_out():
    seen = []

    def counting(texts):
        seen.append(list(texts))
        return map_texts(texts)

    source = crowd_of([700] * 7)
    got = real_crowd(source, "joy", 2, 5, 3, counting, np.random.default_rng(1))
    assert [len(texts) for texts in seen] == [3010]
    assert len(set(seen[0])) == 3010
    names = {int(person.name[1:]) for person in got.people}
    assert not names & {int(text.split()[2]) for text in seen[0][:3000]}


# Simulated crowds


def test_kinds_hold_what_they_are_named_for():
    source = corpus()
    kinds = ("half", "on", "off", "random", "copyist", "spammer", "on", "off")
    got = simulated_crowd(source, "joy", kinds, 6, 10, map_texts, np.random.default_rng(5))
    assert [person.name for person in got.people] == [f"user {i}" for i in range(1, 9)]
    assert tuple(person.kind for person in got.people) == kinds
    emotions = [[text.partition(":")[0] for text in person.texts] for person in got.people]
    half, on, off, _, _, spam, also_on, also_off = (set(e) for e in emotions)
    assert on == also_on == {"joy"}
    assert len(off) == len(also_off) == len(spam) == 1 and len(off | also_off | spam | {"joy"}) == 4
    assert len(half) == 2 and emotions[0].count("joy") == 3
    assert got.people[4].texts == got.people[1].texts
    assert len(got.people[5].texts) == 6 and len(set(got.people[5].texts)) == 1
    assert all(text.startswith("joy") for text in got.near_texts)
    # of the 10 + 2 * 6 + 3 texts nearest to the target, itself left out
    from_pool = {text for i in (0, 1, 6) for text in got.people[i].texts if text.startswith("joy")}
    strengths = sorted(int(text[4:6]) for text in from_pool | set(got.near_texts))
    assert strengths[-1] == 89 and strengths[0] >= 90 - 26 - 6  # the random user may hold some of them


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=10),
    st.integers(1, 7),
    st.integers(1, 12),
    st.sampled_from(["joy", "neutral"]),
    st.integers(0, 99),
)
def test_only_copyists_hold_what_another_holds(kinds, texts_per_user, neighbours, target, seed):
    source = corpus(30)
    arguments = (source, target, kinds, texts_per_user, neighbours, map_texts)
    copied = next((k for k in kinds if k in ("on", "turncoat")), next((k for k in kinds if k != "copyist"), None))
    if copied is None or (len(kinds) > 1 and kinds.count("copyist") == len(kinds) - 1):
        refusal(simulated_crowd, *arguments, np.random.default_rng(seed))
        return
    got = simulated_crowd(*arguments, np.random.default_rng(seed))
    own = [(*person.texts, *person.later) for person in got.people if person.kind != "copyist"]
    held = [text for texts in own for text in sorted(set(texts))]
    assert len(held) == len(set(held))
    assert len(set(got.near_texts)) == neighbours and not set(got.near_texts) & set(held)
    original = next(person for person in got.people if person.kind == copied)
    for person, vectors in zip(got.people, got.vectors, strict=True):
        assert len(person.texts) == texts_per_user
        assert len(set(person.texts)) == texts_per_user or person.kind in ("spammer", "copyist")
        assert person.kind != "copyist" or person.texts == original.texts
        np.testing.assert_array_equal(vectors, map_texts(person.texts))
        assert len(person.later) == (texts_per_user if person.kind == "turncoat" else 0)
    vectors = map_texts(source.texts)
    best = vectors[:, EMOTIONS.index(target)].argmax()
    assert source.texts[best] not in held and source.texts[best] not in got.near_texts
    free = [i for i, text in enumerate(source.texts) if text not in held and i != best]
    distances = np.linalg.norm(vectors[free].astype(float) - vectors[best], axis=1)
    assert got.near_texts == tuple(source.texts[free[i]] for i in np.argsort(distances, kind="stable")[:neighbours])
    again = simulated_crowd(*arguments, np.random.default_rng(seed))
    assert (again.people, again.near_texts) == (got.people, got.near_texts)


def test_a_turncoat_is_an_honest_twin_who_later_contributes_other_texts():
    kinds = ["turncoat", "on", "half", "random", "off", "copyist"]
    crowd, twins = (
        simulated_crowd(corpus(), "joy", each, 5, 8, map_texts, np.random.default_rng(3))
        for each in (kinds, ["on", *kinds[1:]])
    )
    for over, whose in ((0.0, twins), (0.39, twins), (0.4, crowd), (1.0, crowd)):
        first = 0 if whose is twins else 1
        assert crowd.texts_at(over)[first:] == twins.texts_at(over)[first:]
        np.testing.assert_array_equal(crowd.means_at(over)[first:], twins.means_at(over)[first:])
    assert crowd.near_texts == twins.near_texts
    turned = crowd.texts_at(0.4)[0]
    assert turned == crowd.people[0].later and len({text.partition(":")[0] for text in turned} | {"joy"}) == 2
    np.testing.assert_allclose(crowd.means_at(0.4)[0], map_texts(turned).mean(axis=0))


def test_just_enough_texts_are_enough():
    source, kinds = corpus(11, ("joy", "fear")), ["on", "half", "random", "off", "spammer"]
    got = simulated_crowd(source, "joy", kinds, 4, 4, map_texts, np.random.default_rng(0))
    assert len({text for person in got.people for text in person.texts} | set(got.near_texts)) == 21
    told = refusal(simulated_crowd, source, "joy", kinds, 4, 5, map_texts, np.random.default_rng(0))
    assert "22 texts to deal, 23 are needed" in told


# Near-duplicates


def literally(people):
    """The definition, text by text."""

    def letters(text):
        return "".join(c for c in text.casefold() if c.isalnum()) or text

    def shingles(text):
        words = ["".join(c for c in word if c.isalnum()) for word in text.casefold().split()]
        words = [word for word in words if word]
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    def alike(a, b):
        x, y = shingles(a), shingles(b)
        return letters(a) == letters(b) or bool(x and y and len(x & y) / len(x | y) >= 0.8)

    return [
        sum(
            any(alike(text, other) for j, q in enumerate(people) if j != i for other in q.texts)
            for text in person.texts
        )
        for i, person in enumerate(people)
    ]


WORDS = st.lists(st.sampled_from(["a", "B", "b", "c!", "--", "d1", "ß", "SS"]), min_size=1, max_size=8).map(" ".join)
VARIANTS = st.tuples(st.integers(0, 3), st.integers(8, 20), st.integers(0, 2)).map(
    lambda v: " ".join(f"{'wW'[v[2] % 2]}{i}" for i in range(v[0], v[1]))
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(WORDS | VARIANTS, min_size=1, max_size=6), min_size=1, max_size=6))
def test_near_duplicates_are_those_of_the_definition(texts):
    people = [Person(str(i), "real", tuple(held)) for i, held in enumerate(texts)]
    got = near_duplicates(people)
    assert got.shape == (len(people),) and got.tolist() == literally(people)


def test_near_duplicates_by_hand():
    eleven = "one two three four five six seven eight nine ten eleven"
    people = [
        Person("a", "real", ("Well, thank-you!", eleven, "🎉🎉", "mine alone it is")),
        Person("b", "real", ("well THANKYOU", "well thankyou", eleven.replace("eleven", "last"), "🎈")),
        Person("c", "real", ("something else here", "something else here")),
    ]
    # eight of ten shingles are shared by eleven words whose last one differs: 8 / 10
    assert near_duplicates(people).tolist() == literally(people) == [2, 3, 0]
    assert near_duplicates([]).shape == (0,)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(WORDS | VARIANTS, min_size=1, max_size=4), min_size=1, max_size=5), st.floats(0.1, 1))
def test_who_is_taken_for_whom_by_the_definition(texts, share):
    """Two people alone: those of whom one holds alikes of enough of the other's texts; then chains."""
    people = [Person(str(i), "real", tuple(held)) for i, held in enumerate(texts)]
    n = len(people)
    linked = [[i == j for j in range(n)] for i in range(n)]
    for i, j in ((i, j) for i in range(n) for j in range(n) if i != j):
        if literally([people[i], people[j]])[0] >= share * len(people[i].texts):
            linked[i][j] = linked[j][i] = True
    expected = []
    for i in range(n):
        reached, waiting = set(), [i]
        while waiting:
            here = waiting.pop()
            reached.add(here)
            waiting += [k for k in range(n) if linked[here][k] and k not in reached]
        expected.append(min(reached))
    assert taken_for(people, share).tolist() == expected


def test_copyists_are_near_duplicates_and_spammers_alone_are_not():
    got = simulated_crowd(
        corpus(), "joy", ["on", "on", "copyist", "spammer"], 5, 5, map_texts, np.random.default_rng(0)
    )
    assert near_duplicates(got.people).tolist() == [5, 0, 5, 0]


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "", "a.csv: the file is empty"),
        ("a.csv", "usr,text\na,b\n", "a.csv, line 1: no column `user` (columns: usr, text)"),
        ("a.csv", "user,txt\na,b\n", "a.csv, line 1: no column `text` (columns: user, txt)"),
        ("a.csv", "user;text\na;b\n", "no column `user` (columns: user;text)"),
        ("a.csv", "user,text,user\na,b,c\n", "a.csv, line 1: column `user` stands twice"),
        ("a.csv", 'user,text\na,"b\nc"\n\nb,c,d\n', "a.csv, line 5: 3 fields where the header has 2; quote"),
        ("a.csv", "user,text\na\n", "a.csv, line 2: 1 fields where the header has 2"),
        ("a.csv", 'user,text\na,b\nb,"c\n', "a.csv, line 3: not valid CSV"),
        ("a.tsv", 'user\ttext\na\t"b" c\n', "a.tsv, line 2: not valid TSV"),
        ("a.csv", "user,text\na,b\n ,c\n", "a.csv, line 3: no `user` in this row"),
        ("a.csv", b"user,text\na,b\nb,caf\xe9\n", "a.csv, line 3: not UTF-8"),
        ("a.csv", "user,text\na,b\na,c\n", "a.csv: all texts are a's; a crowd needs at least two people"),
        ("a.csv", "user,text\n", "a.csv: nobody has a text"),
        ("a.csv", "user,text\na,x\na,y\nb,y\nb,x\n", "a.csv: all 2 people hold the same texts"),
        ("a.jsonl", '{"user": "a", "text": "b"}\n{"user": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: no JSON object"),
        ("a.jsonl", '\n{"usr": "a", "text": "b"}\n', "a.jsonl, line 2: no column `user` (columns: usr, text)"),
        ("a.jsonl", '{"user": "a", "txt": "b"}\n', "a.jsonl, line 1: no column `text` (columns: user, txt)"),
        ("a.jsonl", "{}\n", "a.jsonl, line 1: no column `user` (columns: none)"),
        ("a.jsonl", '{"user": true, "text": "b"}\n', "a.jsonl, line 1: `user` is neither"),
        ("a.jsonl", '{"user": "a", "text": null}\n', "a.jsonl, line 1: the text is NoneType, not a string"),
        ("a.jsonl", '{"user": "a", "messages": []}\n', "a.jsonl, line 1: `messages` has no message"),
        ("a.jsonl", '{"user": "a", "messages": {"role": 1}}\n', "a.jsonl, line 1: `messages` has no message"),
        ("a.jsonl", '{"user": "a", "messages": [{"role": "assistant"}]}\n', "a.jsonl, line 1: the text is NoneType"),
        ("a.jsonl", "[" * 200_000, "a.jsonl, line 1: JSON that is too deep"),
        ("a.jsonl", '{"user": ' + "1" * 5000 + "}", "a.jsonl, line 1: JSON that is too deep or holds too long"),
        ("a.jsonl", b"\xff\xfe{}", "a.jsonl, line 1: not UTF-8"),
        ("a.txt", "a", "unknown; give shipped, chitchat or a .csv, .tsv or .jsonl file"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, told):
    assert told in refusal(load_source, written(tmp_path, name, content))


def test_unknown_crowds_are_refused(tmp_path):
    assert refusal(load_source, "chitcat") == "crowd chitcat: unknown; did you mean chitchat?"
    assert "no such file" in refusal(load_source, str(tmp_path / "none.csv"))
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read (Is a directory)" in refusal(load_source, str(tmp_path / "folder.csv"))
    assert "cannot be read" in refusal(load_source, "x" * 300 + ".csv")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{\n]", "line 2: not valid JSON"),
        ("[]", "not in Chit-Chat's form"),
        ('{"a": {}}', "not in Chit-Chat's form"),
        ('{"a": {"messages": [["b"]]}}', "not in Chit-Chat's form"),
        ('{"a": {"messages": [[{"sender": "b", "text": 1}]]}}', "not in Chit-Chat's form"),
        ("{}", "nobody has a text"),
        (json.dumps({"c": chat(("a", "one two three four"))}), "all texts are a's"),
        (b'{\n"\xff', "line 2: not UTF-8"),
    ],
)
def test_what_is_not_chitchat_is_refused(tmp_path, content, told):
    assert told in refusal(read_chitchat, written(tmp_path, "dataset.json", content))


def test_crowds_that_cannot_be_drawn_are_refused():
    rng = np.random.default_rng(0)
    source = crowd_of([5, 5, 5, 1])
    assert "3 people have 5 texts or more, 4 are asked for" in refusal(
        real_crowd, source, "joy", 4, 5, 1, map_texts, rng
    )
    assert "1 texts are held by nobody in the crowd, 2 are needed" in refusal(
        real_crowd, source, "joy", 3, 5, 1, map_texts, rng
    )
    assert refusal(real_crowd, source, "joi", 2, 2, 1, map_texts, rng) == "target joi: unknown; did you mean joy?"
    told = refusal(real_crowd, crowd_of([5, 5, 5], "fear"), "joy", 2, 2, 2, map_texts, rng)
    assert "no held-out text is near joy (the nearest has a probability of 0.0" in told
    alike = Source("tiny", "", (Person("a", "real", ("x",)), Person("b", "real", ("x",)), source.people[0]))
    alike_crowds = (np.random.default_rng(seed) for seed in range(9))
    told = [message for rng in alike_crowds if (message := told_by(alike, rng))]
    assert told and all("all 2 people hold the same texts" in message for message in told)


def told_by(source, rng):
    try:
        real_crowd(source, "joy", 2, 1, 1, map_texts, rng)
    except InputError as error:
        return str(error)
    return None


def test_crowds_that_cannot_be_simulated_are_refused():
    rng = np.random.default_rng(0)
    source = corpus(9, ("joy", "fear"))
    for arguments, told in (
        (("joy", ["on", "of"], 2, 2), "kind of user of: unknown; did you mean off?"),
        (("loev", ["on"], 2, 2), "target loev: unknown; did you mean love?"),
        (("joy", ["copyist", "copyist"], 2, 2), "nobody but copyists"),
        (("joy", ["on", "copyist"], 2, 2), "all 2 people hold the same texts"),
        (("joy", ["on", "off"], 6, 6), "tiny: has 18 texts to deal, 19 are needed"),
        (("grief", ["on", "off"], 2, 2), "no held-out text is near grief"),
    ):
        assert told in refusal(simulated_crowd, source, *arguments, map_texts, rng)
